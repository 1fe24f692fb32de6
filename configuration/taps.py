"""From the config of a whole model to the Backbone config of the part before a tap.

Tap names: "stem", "stage1" ... "stage4" of hierarchical models, "block1" ... "blockN" of plain ones. Without a name a
hierarchical model is tapped at its third stage and a plain one at its second-to-last block, as the paper taps them.
"""

import dataclasses
from typing import Any

from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from .configuration_hidden_state_backbone import HIDDEN_STATE_FAMILIES, HiddenStateBackboneConfig
from .timm_stages import tapped_timm_config

PARTS = ("vision_config", "backbone_config")
"""Fields under which a composite config (CLIP, LLaVA, UPerNet, a detector, ...) keeps that of its vision part."""

_LABELS = ("architectures", "id2label", "label2id", "num_labels", "problem_type")


@dataclasses.dataclass(frozen=True)
class StageCut:
    """How the config of a stock hierarchical model loses its later stages.

    Args:
        lists: fields with one entry per stage.
        counts: fields that hold the number of stages.
    """

    lists: tuple[str, ...]
    counts: tuple[str, ...] = ()


STAGE_CUTS: dict[str, StageCut] = {
    "swin": StageCut(("depths", "num_heads")),
    "swinv2": StageCut(("depths", "num_heads", "pretrained_window_sizes")),
    "convnext": StageCut(("depths", "hidden_sizes"), ("num_stages",)),
    "convnextv2": StageCut(("depths", "hidden_sizes"), ("num_stages",)),
    "dinov3_convnext": StageCut(("depths", "hidden_sizes")),
    "resnet": StageCut(("depths", "hidden_sizes")),
    "pvt_v2": StageCut(
        (
            "depths",
            "hidden_sizes",
            "sr_ratios",
            "patch_sizes",
            "strides",
            "num_attention_heads",
            "mlp_ratios",
        ),
        ("num_encoder_blocks",),
    ),
}
"""`model_type` -> its cut. Another Backbone (bit, hgnet_v2, focalnet, ...) keeps its later stages: they are allocated
and computed, and only the tap is returned. FocalNet's own stages end after their downsampling."""

BLOCK_BACKBONES = {"vitdet": "num_hidden_layers"}
"""`model_type` of a plain Backbone that calls the output of its block K "stageK" -> field that counts its blocks."""

NORMED_TAPS = {
    "swin": "parameter-free",
    "convnext": "parameter-free",
    "convnextv2": "parameter-free",
    "pvt_v2": "trained",
    "vit_adapter": "trained",
}
"""`model_type` of a Backbone that norms its tap -> whether published classifiers hold that norm ("trained"). Where they
do not, the config says `output_norm="parameter_free"`, as VMamba's does: the norm stays at scale 1 and shift 0 and is
never trained. That of a detector or segmenter, whose files hold the norm, says "layernorm"."""

UNUSABLE = {
    "hiera": "the Backbone of this Transformers version leaves out the reordering of its tokens; timm's Hiera can be "
    "(such as timm/hiera_tiny_224.mae_in1k_ft_in1k)"
}
"""`model_type` of a Backbone that does not compute what its model computes -> why."""


def vision_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the vision model inside a composite one, however deep; a vision config is its own.

    Raises:
        ValueError: a composite whose vision part is not described.
    """
    if isinstance(config, HiddenStateBackboneConfig):
        return config
    for name in PARTS:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            return vision_part(part)
    return config


def tapped_config(config: PreTrainedConfig, tap: str | None = None) -> PreTrainedConfig:
    """The Backbone config of everything up to a tap.

    Args:
        config: of a whole model, stock or own, of a composite that holds one (CLIP, LLaVA, ...), or of a Backbone.
        tap: its name; None takes the third stage, or the second-to-last block. A Backbone config of this project
            that is already tapped, or that is part of a composite, keeps its tap where None is given.

    Returns:
        A new config whose last `out_features` is the tap: `HiddenStateBackboneConfig` for plain vision transformers,
        else one of the same class, without labels and with later stages cut where `STAGE_CUTS` knows how. Stochastic
        depth is rescaled, so that each kept block has the rate that it has in the whole model.

    Raises:
        ValueError: a model type that cannot be tapped, or a tap that the model does not have; each lists the choices.
    """
    part = vision_part(config)
    if isinstance(part, HiddenStateBackboneConfig):
        return _plain(part.stock_config, tap or part.out_features[-1], part.apply_final_norm)
    if part.model_type in HIDDEN_STATE_FAMILIES:
        return _plain(part, tap)
    if part.model_type == "timm_wrapper":
        return tapped_timm_config(part.architecture, tap, model_args=part.model_args)
    if part.model_type in UNUSABLE:
        raise ValueError(f"A {part.model_type!r} model cannot be tapped: {UNUSABLE[part.model_type]}.")
    if not isinstance(part, BackboneConfigMixin) or part.stage_names is None:
        raise ValueError(
            f"A {part.model_type!r} model cannot be tapped: it is no Backbone, and none of the plain vision "
            f"transformers that are known ({', '.join(sorted(HIDDEN_STATE_FAMILIES))})."
        )
    if tap is None and (part is not config or part.model_type == "tapped_timm"):
        tap = part.out_features[-1]
    if part.model_type in BLOCK_BACKBONES:
        return _blocks(part, tap)
    return _hierarchical(part, tap)


def _blocks(config: Any, tap: str | None) -> PreTrainedConfig:
    count = BLOCK_BACKBONES[config.model_type]
    names = {f"block{index}": f"stage{index}" for index in range(1, getattr(config, count) + 1)}
    stage = config.out_features[-1] if tap is None else names.get(tap, tap)
    if stage not in names.values():
        raise ValueError(f"A {config.model_type!r} model has no tap {tap!r}; choose block1 to block{len(names)}.")
    kept = list(names.values()).index(stage) + 1
    fields = {count: kept, "drop_path_rate": _cut_drop_path(config.drop_path_rate, kept, len(names))}
    return _copy(config, **fields, out_features=[stage])


def _cut_drop_path(rate: float, kept: int, whole: int) -> float:
    """The rate of the last of `kept` blocks, where it grows linearly from 0 over all `whole` of them."""
    return rate * (kept - 1) / (whole - 1) if rate and kept < whole else rate


def tap_norm(config: Any) -> str:
    """The norm of an encoder's own tap: "none", "parameter-free" or "trained".

    Args:
        config: a Backbone config, tapped.
    """
    if NORMED_TAPS.get(config.model_type) == "trained":
        return "trained"
    at_the_end = config.out_features[-1] == config.stage_names[-1]
    if getattr(config, "apply_final_norm", False) or (at_the_end and getattr(config, "final_norm", False)):
        return "trained"
    own = {"layernorm": "trained", "parameter_free": "parameter-free"}
    unsaid = "layernorm" if says_its_norm(config) else "none"
    return own.get(getattr(config, "output_norm", unsaid), "none")


def says_its_norm(config: PreTrainedConfig) -> bool:
    """Whether this is a stock config that says, in `output_norm`, whether its tap's norm was ever trained."""
    return NORMED_TAPS.get(config.model_type) == "parameter-free"


def _plain(stock: PreTrainedConfig, tap: str | None, apply_final_norm: bool = False) -> HiddenStateBackboneConfig:
    depth = stock.num_hidden_layers
    names = [f"block{index}" for index in range(1, depth + 1)]
    tap = names[max(depth - 2, 0)] if tap is None else tap
    _check(tap, names, stock.model_type)
    # Counted from the end, the second-to-last block stays what it is under another depth.
    layer = names.index(tap) - depth
    return HiddenStateBackboneConfig(
        vision_config=_copy(stock), tap_layer=layer, apply_final_norm=apply_final_norm and layer == -1
    )


def _hierarchical(config: Any, tap: str | None) -> PreTrainedConfig:
    stages = [name for name in config.stage_names if name.startswith("stage")]
    if tap is None and not stages and len(config.stage_names) > 1:
        tap = config.stage_names[-2]
    elif tap is None:
        tap = "stage3" if "stage3" in stages[:-1] else config.out_features[-1]
    _check(tap, config.stage_names, config.model_type)
    fields: dict[str, Any] = {"out_features": [tap]}
    if config.model_type in STAGE_CUTS:
        fields |= _cut(config, max(stages.index(tap) + 1 if tap in stages else 1, 1))
    if says_its_norm(config):
        fields["output_norm"] = getattr(config, "output_norm", "parameter_free")
    return _copy(config, **fields)


def _cut(config: Any, count: int) -> dict[str, Any]:
    """The fields of `config` that differ when only its first `count` stages exist."""
    cut = STAGE_CUTS[config.model_type]
    fields: dict[str, Any] = {name: list(getattr(config, name))[:count] for name in cut.lists}
    fields |= dict.fromkeys(cut.counts, count)
    if hasattr(config, "drop_path_rate"):
        rate = _cut_drop_path(config.drop_path_rate, sum(config.depths[:count]), sum(config.depths))
        fields["drop_path_rate"] = rate
    return fields


def _check(tap: str, names: list[str], model_type: str) -> None:
    if tap not in names:
        choices = ", ".join(names) if len(names) < 8 else f"{names[0]} to {names[-1]}"
        raise ValueError(f"A {model_type!r} model has no tap {tap!r}; choose {choices}.")


def _copy(config: Any, **changes: Any) -> Any:
    """A new config of the same class with these fields: what follows from fields is derived anew, labels are gone."""
    own = {field.name for field in dataclasses.fields(config)} - set(_LABELS)
    fields = {name: value for name, value in config.to_dict().items() if name in own}
    return type(config)(**fields | changes)


__all__ = [
    "BLOCK_BACKBONES",
    "NORMED_TAPS",
    "PARTS",
    "STAGE_CUTS",
    "UNUSABLE",
    "StageCut",
    "says_its_norm",
    "tap_norm",
    "tapped_config",
    "vision_part",
]
