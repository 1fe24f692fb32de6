"""What an encoder costs up to its tap: parameters and floating point operations, heads never counted.

A multiply and an add are two operations here (papers often print half of that and call it FLOPs). Matrix products,
convolutions, attention and selective scans are counted by `torch.utils.flop_counter` (scans by `selective_scan_flops`
of the op); norms, activations and additions are not.

    python -m ssm_vlm.eval.encoder_cost vmamba_small_s2l15.in1k_224 vit_small_patch16.augreg_in1k_224
"""

import argparse
import copy
import json
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoBackbone, PreTrainedConfig

from ..configuration.named_encoders import get_named_encoder


class EncoderCost(NamedTuple):
    """Cost of one picture through an encoder, up to its tap."""

    parameters: int
    flops: int


def encoder_cost(config: PreTrainedConfig, height: int, width: int) -> EncoderCost:
    """Counts an encoder from its Backbone config, on the meta device: nothing is allocated and nothing is computed.

    Args:
        config: a Backbone config; the tap is the last of its `out_features`.
        height: canvas height in pixels.
        width: canvas width in pixels.

    Returns:
        `parameters`: those that the features at the tap depend on. `flops`: for one picture, multiply and add as two.
    """
    with torch.device("meta"):
        # Eager attention shows its two matrix products to the counter on every device.
        backbone = AutoBackbone.from_config(copy.deepcopy(config), attn_implementation="eager").train(False)
        pixels = torch.empty(1, config.num_channels, height, width)
        with FlopCounterMode(display=False) as counter:
            features = backbone(pixels).feature_maps[-1]
        features.sum().backward()
    return EncoderCost(sum(p.numel() for p in backbone.parameters() if p.grad is not None), counter.get_total_flops())


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
