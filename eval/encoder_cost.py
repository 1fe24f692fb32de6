"""What an encoder costs up to its tap: parameters and floating point operations, heads never counted.

A multiply and an add are two operations here (papers often print half of that and call it FLOPs). Matrix products,
convolutions and attention are counted by `torch.utils.flop_counter`; norms, activations and additions are not. The
selective scan is counted by its own formula, `selective_scan_flops`, whatever backend would run.

    python -m ssm_vlm.eval.encoder_cost vmamba_small_s2l15.in1k_224 vit_small_patch16.augreg_in1k_224
"""

import argparse
import contextlib
import copy
import json
import os
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoBackbone, PreTrainedConfig

from ..configuration.named_encoders import get_named_encoder
from ..modeling.ops.scan_backends import BACKEND_VARIABLE
from ..modeling.ops.selective_scan_1d import BACKENDS as BACKENDS_1D
from ..modeling.ops.selective_scan_2d import BACKENDS as BACKENDS_2D


class EncoderCost(NamedTuple):
    """Cost of one picture through an encoder, up to its tap."""

    parameters: int
    flops: int


def selective_scan_flops(positions: int, channels: int, states: int, rank: int, directions: int = 4) -> int:
    """Operations of one scan: of a map in four directions, of a sequence in one.

    Per direction, position and channel: 9 per state and 2 for the skip (the convention of VMamba's own counter, after
    https://github.com/state-spaces/mamba/issues/110), and 2 per rank for the step size projection, a matrix product.
    """
    return directions * positions * channels * (9 * states + 2 + 2 * rank)


@contextlib.contextmanager
def _counted_scans() -> Iterator[list[int]]:
    """Replaces the scans by ones that only note their cost, and let gradients reach all their parameters."""
    counts: list[int] = []

    def count(directions: int, x: Tensor, dt_low_rank: Tensor, b: Tensor, *others: Tensor) -> Tensor:
        sizes = x[..., 0].numel(), x.shape[-1], b.shape[-1], dt_low_rank.shape[-1]
        counts.append(selective_scan_flops(*sizes, directions))
        return x + sum(tensor.sum() for tensor in (dt_low_rank, b, *others))

    before = os.environ.get(BACKEND_VARIABLE)
    BACKENDS_1D["count"], BACKENDS_2D["count"] = partial(count, 1), partial(count, 4)
    os.environ[BACKEND_VARIABLE] = "count"
    try:
        yield counts
    finally:
        del BACKENDS_1D["count"], BACKENDS_2D["count"], os.environ[BACKEND_VARIABLE]
        if before is not None:
            os.environ[BACKEND_VARIABLE] = before


def encoder_cost(config: PreTrainedConfig, height: int, width: int) -> EncoderCost:
    """Counts an encoder from its Backbone config, on the meta device: nothing is allocated and nothing is computed.

    Args:
        config: a Backbone config; the tap is the last of its `out_features`.
        height: canvas height in pixels.
        width: canvas width in pixels.

    Returns:
        `parameters`: those that the features at the tap depend on. `flops`: for one picture, multiply and add as two.
    """
    with torch.device("meta"), _counted_scans() as scans:
        # Eager attention shows its two matrix products to the counter on every device.
        backbone = AutoBackbone.from_config(copy.deepcopy(config), attn_implementation="eager").train(False)
        pixels = torch.empty(1, config.num_channels, height, width)
        with FlopCounterMode(display=False) as counter:
            features = backbone(pixels).feature_maps[-1]
        flops = counter.get_total_flops() + sum(scans)
        features.sum().backward()
    return EncoderCost(sum(p.numel() for p in backbone.parameters() if p.grad is not None), flops)


def main(argv: list[str] | None = None) -> None:
    """Prints, as JSON, the cost of named encoders at the size of their own preprocessing."""
    parser = argparse.ArgumentParser(prog="python -m ssm_vlm.eval.encoder_cost", description=main.__doc__)
    parser.add_argument("names", nargs="+", help="names as in `ssm-vlm encoders`")
    for name in parser.parse_args(argv).names:
        encoder = get_named_encoder(name)
        size = (encoder.preprocessing.height, encoder.preprocessing.width)
        print(json.dumps({"name": name, "size": size} | encoder_cost(encoder.config(), *size)._asdict()))


if __name__ == "__main__":
    main()
