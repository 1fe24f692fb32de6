"""The table of named encoders, timm-style `variant.tag`: everything a study has to know about an encoder, in one place.

A new encoder is one entry in one of the lists at the end. `parameters` and `flops` are counted up to the tap, at the
size of the entry's own preprocessing, heads never, a multiply and an add as two operations; the tests recount every
entry and print the right figures (so does `python -m ssm_vlm.eval.encoder_cost NAME`).
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedConfig, ViTConfig

from .configuration_hidden_state_backbone import HiddenStateBackboneConfig
from .configuration_ssm_vision import SSMVisionConfig


@dataclass(frozen=True)
class Preprocessing:
    """How pictures became pixels when the weights were made; it travels with them.

    Args:
        height: canvas height in pixels.
        width: canvas width in pixels.
        mean: per channel, of values in [0, 1].
        std: per channel, of values in [0, 1].
        interpolation: "bicubic", "bilinear" or "nearest".
        geometry: name of the geometry that lays a picture on the canvas. Classification weights take the letterbox of
            LLaVA's box labels, as the paper does, not the centre crop of their own evaluation.
    """

    height: int
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    geometry: str = "letterbox"


@dataclass(frozen=True)
class WeightSource:
    """Where published weights come from and what of them is left behind.

    Args:
        layout: name of the function that renames the file's keys, see `LAYOUTS` of `encoder_loading`.
        hub_id: Hugging Face repository that holds them as safetensors.
        url: a release file, to be downloaded by hand and given to `convert_encoder`.
        discards: regular expressions of the keys (after renaming) that are declared to be dropped: heads, stages and
            blocks after the tap. Each must meet at least one key, and no other key may be dropped.
        neutral: regular expressions of the parameters that the file does not hold and that stay at their neutral
            start (a norm's scale 1 and shift 0).
    """

    layout: str
    hub_id: str | None = None
    url: str | None = None
    discards: tuple[str, ...] = ()
    neutral: tuple[str, ...] = ()


@dataclass(frozen=True)
class NamedEncoder:
    """One row of the table.

    Args:
        name: `variant.tag`.
        config: builds the Backbone config, tapped.
        preprocessing: what the weights expect.
        parameters: number of parameters that the tap depends on.
        flops: operations for one picture up to the tap (multiply and add are two).
        licence: SPDX identifier of the weights' licence.
        weights: where they come from; None for encoders that this project trains.
        imagenet_top1: percent at 224 pixels of the whole published model, with its head.
        loaded_from_real_file: whether the published file itself was ever loaded by this code. Where it is False, the
            conversion is tested on random weights of the reference implementation only.
    """

    name: str
    config: Callable[[], PreTrainedConfig]
    preprocessing: Preprocessing
    parameters: int
    flops: int
    licence: str
    weights: WeightSource | None = None
    imagenet_top1: float | None = None
    loaded_from_real_file: bool = False


_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}

_IN1K_224 = Preprocessing(224, 224, **_IMAGENET)
_AUGREG_224 = Preprocessing(224, 224, **_HALF)
_COCO = Preprocessing(800, 1333, **_IMAGENET, interpolation="bilinear", geometry="letterbox_corner")
_ADE20K = Preprocessing(512, 512, **_IMAGENET, interpolation="bilinear", geometry="letterbox_corner")
_DIGITS = Preprocessing(64, 64, **_HALF, interpolation="bilinear")


# --- DigitScenes: encoders of the embedded study --------------------------------------------------------------------
# One macro-architecture, 64 pixels, 8x8 = 64 tokens at stage 2. Only the mixer differs; the width of the MLP takes up
# the difference, so that all have about as many parameters up to the tap (tests hold them within 5 percent).


def _digit(mixer: str, mlp_ratio: float, **mixer_fields: Any) -> SSMVisionConfig:
    return SSMVisionConfig(
        image_size=64,
        stem="conv3x2",
        hidden_sizes=[48, 96],
        depths=[2, 4],
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
        intermediate_size=384,
        image_size=64,
        patch_size=8,
        layer_norm_eps=1e-6,
    )
    return HiddenStateBackboneConfig(vision_config=vit, tap_layer=-2)


_digit_entry = partial(NamedEncoder, preprocessing=_DIGITS, licence="Apache-2.0")

_DIGIT_ENCODERS = [
    _digit_entry(
        "digit_vmamba.digitscenes_64",
        partial(_digit, "ss2d", 3.5, ssm_ratio=1.0, d_state=1),
        parameters=465_936,
        flops=83_017_728,
    ),
    _digit_entry("digit_dwconv.digitscenes_64", partial(_digit, "dwconv", 3.5), parameters=455_280, flops=80_461_824),
    _digit_entry(
        "digit_window_attention.digitscenes_64",
        partial(_digit, "window_attention", 3.0, head_dim=16, window_size=4),
        parameters=473_472,
        flops=87_293_952,
    ),
    _digit_entry(
        "digit_global_attention.digitscenes_64",
        partial(_digit, "global_attention", 3.0, head_dim=16),
        parameters=473_472,
        flops=114_180_096,
    ),
    _digit_entry(
        "digit_identity.digitscenes_64", partial(_digit, "identity", 5.0), parameters=472_512, flops=82_722_816
    ),
    _digit_entry("digit_vit.digitscenes_64", _digit_vit, parameters=472_224, flops=66_356_736),
]


def _table(*groups: list[NamedEncoder]) -> dict[str, NamedEncoder]:
    table: dict[str, NamedEncoder] = {}
    for entry in (entry for group in groups for entry in group):
        if entry.name in table:
            raise ValueError(f"Two encoders are named {entry.name!r}.")
        table[entry.name] = entry
    return table


ENCODERS = _table(_DIGIT_ENCODERS)
"""Name -> entry, in the order in which tables show them."""


def get_named_encoder(name: str) -> NamedEncoder:
    """The entry with exactly this name.

    Raises:
        ValueError: for a name that is not in the table; the message gives the nearest ones.
    """
    if name not in ENCODERS:
        near = difflib.get_close_matches(name, ENCODERS, n=3, cutoff=0.0)
        raise ValueError(
            f"There is no encoder named {name!r}; the nearest names are {', '.join(near)} (`ssm-vlm encoders` lists "
            "all)."
        )
    return ENCODERS[name]


__all__ = ["ENCODERS", "NamedEncoder", "Preprocessing", "WeightSource", "get_named_encoder"]
