"""Encoders of the embedded study on DigitScenes: 64 pixels in, 8x8 = 64 tokens out, trained by this project.

One macro-architecture in which only the mixer differs; the width of the MLP takes up the difference, so that all have
about as many parameters up to the tap. The ViT beside them is a plain one. Tests hold all within 5 percent of another.
"""

from functools import partial
from typing import Any

from transformers import ViTConfig

from .configuration_hidden_state_backbone import HiddenStateBackboneConfig
from .configuration_ssm_vision import SSMVisionConfig
from .encoder_entry import IMAGENET, NamedEncoder, Preprocessing

_DIGITS = Preprocessing(64, 64, *IMAGENET, interpolation="bilinear")
# the customary 0.02 suits widths near 1000: at width 96 it starts training an order of magnitude too flat
_INITIALIZER_RANGE = 0.08


def _digit(mixer: str, mlp_ratio: float, **mixer_fields: Any) -> SSMVisionConfig:
    return SSMVisionConfig(
        image_size=64,
        stem="conv3x2",
        hidden_sizes=[32, 96],
        depths=[1, 4],
        initializer_range=_INITIALIZER_RANGE,
        mixer=mixer,
        mlp_ratio=mlp_ratio,
        out_features=["stage2"],
        **mixer_fields,
    )


def _digit_vit() -> HiddenStateBackboneConfig:
    """Five blocks, tapped at the second to last."""
    vit = ViTConfig(
        hidden_size=96,
        num_hidden_layers=5,
        num_attention_heads=3,
        intermediate_size=304,
        image_size=64,
        patch_size=8,
        layer_norm_eps=1e-6,
        initializer_range=_INITIALIZER_RANGE,
    )
    return HiddenStateBackboneConfig(vision_config=vit, tap_layer=-2)


_digit_entry = partial(NamedEncoder, preprocessing=_DIGITS, licence="Apache-2.0")

DIGIT_ENCODERS = [
    _digit_entry(
        "digit_vmamba.digitscenes_64",
        partial(_digit, "ss2d", 3.5, ssm_ratio=1.0, d_state=1),
        parameters=409_488,
        flops=59_146_240,
    ),
    _digit_entry("digit_dwconv.digitscenes_64", partial(_digit, "dwconv", 3.5), parameters=399_280, flops=57_180_160),
    _digit_entry(
        "digit_window_attention.digitscenes_64",
        partial(_digit, "window_attention", 3.0, head_dim=16, window_size=4),
        parameters=416_992,
        flops=62_291_968,
    ),
    _digit_entry(
        "digit_global_attention.digitscenes_64",
        partial(_digit, "global_attention", 3.0, head_dim=16),
        parameters=416_992,
        flops=73_891_840,
    ),
    _digit_entry(
        "digit_identity.digitscenes_64", partial(_digit, "identity", 5.0), parameters=416_160, flops=59_211_776
    ),
    _digit_entry("digit_vit.digitscenes_64", _digit_vit, parameters=410_464, flops=58_369_536),
]

__all__ = ["DIGIT_ENCODERS"]
