"""Keeping ranks in step when one of them has a batch without images.

Under DistributedDataParallel every trainable parameter must get a gradient on every rank. Under ZeRO-3 and FSDP every
rank must call a sharded module equally often, forward and backward, since each call gathers its parameters from all
ranks. A rank with less to do therefore runs dummy pictures whose features count zero times.
"""

from typing import NamedTuple

import torch
from torch import distributed as dist
from torch import nn


class ExtraWork(NamedTuple):
    """What this rank has to run beyond its own images."""

    tower_calls: int
    project: bool


def is_sharded(module: nn.Module) -> bool:
    """Whether parameters of `module` are spread over ranks, by DeepSpeed ZeRO-3 or by FSDP of either version."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    return any(hasattr(p, "ds_id") or isinstance(p, DTensor) for p in module.parameters()) or any(
        isinstance(m, FullyShardedDataParallel) for m in module.modules()
    )


def extra_work(
    tower: nn.Module, connector: nn.Module, tower_calls: int, have_images: bool, learning: bool
) -> ExtraWork:
    """What to run beyond one's own images, so that no other rank waits for this one for ever.

    With a sharded tower or connector this is a collective call: every rank has to make it, before its first picture.

    Args:
        tower_calls: How often this rank will call the tower on its own images.
        have_images: Whether this rank will call the connector on its own images, cached features included.
        learning: Whether a backward pass will follow.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return ExtraWork(0, False)
    if is_sharded(tower) or is_sharded(connector):
        device = next(connector.parameters()).device
        most = torch.tensor([tower_calls, int(have_images or learning)], device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        most_calls, someone_projects = most.tolist()
        return ExtraWork(most_calls - tower_calls, bool(someone_projects) and not have_images)
    idle_tower = tower_calls == 0 and any(p.requires_grad for p in tower.parameters())
    return ExtraWork(int(learning and idle_tower), learning and not have_images)


def dummy_picture(vision_config) -> torch.Tensor:
    """A grey picture [1, channels, H, W] of a size that the encoder surely takes."""
    size = getattr(vision_config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    return torch.zeros(1, getattr(vision_config, "num_channels", 3), height, width)
