"""Work on each position of a large map, strip by strip: what lies between input and result stays in the cache."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

STRIP = 1024
"""Positions. Measured for MLPs of 96 to 384 channels: shorter strips read the weights too often, and from 2048 on the
hidden values of wide ones leave the cache."""

MIN_STRIPS = 4
"""Smaller maps gain nothing."""


def in_strips(module: nn.Module, function: Callable[..., Tensor], *maps: Tensor) -> Tensor:
    """`function(*maps)`, strip by strip on CPUs where no gradient is recorded and nobody watches the modules inside.

    The hidden map of an MLP over 256x256 positions of 96 channels is 100 MB, that of a strip 1.5.

    Args:
        module: holds all that `function` calls.
        function: maps [..., C] to [..., C'], each position alone and nothing at random.
        maps: [B, H, W, C], equal but for C.
    """
    first = maps[0]
    if (
        torch.is_grad_enabled()
        or first.device.type != "cpu"
        or torch.compiler.is_compiling()  # the number of strips would tie the program to one size of map
        or torch.jit.is_tracing()
        or first.shape[:-1].numel() < MIN_STRIPS * STRIP
        or _is_watched(module)
    ):
        return function(*maps)
    strips = zip(*(values.flatten(0, -2).split(STRIP) for values in maps), strict=True)
    return torch.cat([function(*strip) for strip in strips]).unflatten(0, first.shape[:-1])


def _is_watched(module: nn.Module) -> bool:
    """Whether hooks expect whole maps, or fetch weights at each call: ZeRO-3, on all ranks together, and offloading."""
    return any(each._forward_hooks or each._forward_pre_hooks or hasattr(each, "_hf_hook") for each in module.modules())


__all__ = ["in_strips"]
