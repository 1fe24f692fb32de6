"""timm's MaxViT files (the weights ported from the authors' TensorFlow release) -> the whole model in Transformers.

The whole model is timm's own, in Transformers' `TimmWrapperForImageClassification`; keys stay as they are behind its
prefix. What a model's depth, widths, heads and picture size are is read off the file.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration.maxvit_encoders import VARIANTS
from ..configuration.timm_stages import require_timm
from .checkpoint_layout import CheckpointLayout, StateDict

_SE = "stages.0.blocks.0.conv.se.fc1.weight"
_TABLE = "stages.{}.blocks.0.attn_block.attn.rel_pos.relative_position_bias_table"
_SIZES = (224, 384, 512)


def _recognises(state_dict: Mapping[str, Tensor]) -> bool:
    return {"stem.conv1.weight", _SE, _TABLE.format(0)} <= set(state_dict)


def _architecture(state_dict: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """timm's name of the model and the arguments in which it differs from the one of that name."""
    blocks = [re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", key) for key in state_dict]
    found = {(int(match[1]), int(match[2])) for match in blocks if match}
    depths = [
        1 + max(block for at, block in found if at == stage) for stage in range(1 + max(stage for stage, _ in found))
    ]
    tables = [state_dict[_TABLE.format(stage)] for stage in range(len(depths))]  # [heads, 2 * window - 1, same]
    widths = [len(state_dict[f"stages.{stage}.blocks.0.attn_block.norm1.weight"]) for stage in range(len(depths))]
    size = 32 * (tables[0].shape[1] + 1) // 2
    shape = (len(state_dict["stem.conv1.weight"]), *widths)
    for variant, (known, known_depths) in VARIANTS.items():
        if shape == tuple(known) and depths == known_depths and widths[0] // len(tables[0]) == 32 and size in _SIZES:
            return f"maxvit_{variant}_tf_{size}", {}
    hidden = state_dict.get("head.pre_logits.fc.weight")
    return "maxvit_tiny_tf_224", {
        "img_size": size,
        "embed_dim": widths,
        "depths": depths,
        "stem_width": shape[0],
        "transformer_dim_head": widths[0] // len(tables[0]),
        "head_hidden_size": widths[-1] if hidden is None else len(hidden),
    }


def _infer(state_dict: Mapping[str, Tensor]) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    require_timm()  # which these import
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperModel

    architecture, model_args = _architecture(state_dict)
    head = state_dict.get("head.fc.weight")
    # from_dict names the classes of ImageNet
    config = TimmWrapperConfig.from_dict(
        {"architecture": architecture, "model_args": model_args, "num_classes": 0 if head is None else len(head)}
    )
    return TimmWrapperModel if head is None else TimmWrapperForImageClassification, config


def _convert(state_dict: Mapping[str, Tensor], config: PreTrainedConfig) -> StateDict:
    return {f"timm_model.{key}": tensor for key, tensor in state_dict.items()}


TIMM_MAXVIT_LAYOUT = CheckpointLayout(_recognises, _infer, _convert, shows_size=True)
"""MaxViT as timm publishes it."""

__all__ = ["TIMM_MAXVIT_LAYOUT"]
