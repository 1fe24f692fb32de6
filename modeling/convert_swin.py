"""Swin checkpoints, Microsoft's release and timm's -> Transformers' `SwinForImageClassification`.

Microsoft (and Transformers) merge patches at the end of a stage, timm at the start of the next one.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, SwinConfig, SwinForImageClassification

from .checkpoint_layout import CheckpointLayout, StateDict
from .rename_keys import count_indices, need, rename_keys

_FAMILY = "Swin"
_BLOCK, _OURS = r"^layers\.(\d+)\.blocks\.(\d+)\.", r"swin.encoder.layers.\1.blocks.\2."
_TABLE = "attn.relative_position_bias_table"
_RULES = (
    (r"^patch_embed\.proj\.", "swin.embeddings.patch_embeddings.projection."),
    (r"^patch_embed\.norm\.", "swin.embeddings.norm."),
    (r"^absolute_pos_embed$", "swin.embeddings.position_embeddings"),
    (r"^layers\.(\d+)\.downsample\.(norm|reduction)\.", r"swin.encoder.layers.\1.downsample.\2."),
    (_BLOCK + r"norm1\.", _OURS + "layernorm_before."),
    (_BLOCK + r"norm2\.", _OURS + "layernorm_after."),
    (_BLOCK + r"mlp\.(fc[12])\.", _OURS + r"mlp.\3."),
    (_BLOCK + r"attn\.proj\.", _OURS + "attention.o_proj."),
    (
        _BLOCK + _TABLE.replace(".", r"\.") + "$",
        _OURS + "attention.relative_position_bias.relative_position_bias_table",
    ),
    (r"^norm\.", "swin.layernorm."),
    (r"^head\.(?:fc\.)?(weight|bias)$", r"classifier.\1"),
)
_FUSED = (_BLOCK + r"attn\.qkv\.", _OURS + "attention.{}_proj.")


def _recognises(tensors: Mapping[str, Tensor]) -> bool:
    return "patch_embed.proj.weight" in tensors and any(re.fullmatch(_BLOCK + _TABLE, key) for key in tensors)


def _merges_late(tensors: Mapping[str, Tensor]) -> bool:
    """Whether patches are merged at the start of a stage (timm), not at the end of the one before."""
    return "layers.0.downsample.reduction.weight" not in tensors


def _infer(tensors: Mapping[str, Tensor]) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    width, channels, patch, _ = need(tensors, "patch_embed.proj.weight", _FAMILY).shape
    stages = count_indices(tensors, r"layers\.(\d+)\.blocks\.")
    tables = [need(tensors, f"layers.{stage}.blocks.0.{_TABLE}", _FAMILY) for stage in range(stages)]
    window = (math.isqrt(tables[0].shape[0]) + 1) // 2
    absolute = tensors.get("absolute_pos_embed")
    mask = tensors.get("layers.0.blocks.1.attn_mask")
    if absolute is not None:
        size = math.isqrt(absolute.shape[1]) * patch
    elif mask is not None:  # one mask per window of the first stage
        size = math.isqrt(mask.shape[0]) * window * patch
    else:  # published models have one window in their last stage
        size = window * patch * 2 ** (stages - 1)
    head = tensors.get("head.fc.weight", tensors.get("head.weight"))
    fields: dict[str, Any] = {
        "image_size": size,
        "patch_size": patch,
        "num_channels": channels,
        "embed_dim": width,
        "depths": [count_indices(tensors, rf"layers\.{stage}\.blocks\.(\d+)\.") for stage in range(stages)],
        "num_heads": [table.shape[1] for table in tables],
        "window_size": window,
        "mlp_ratio": need(tensors, "layers.0.blocks.0.mlp.fc1.weight", _FAMILY).shape[0] / width,
        "qkv_bias": "layers.0.blocks.0.attn.qkv.bias" in tensors,
        "use_absolute_embeddings": absolute is not None,
        "num_labels": 0 if head is None else head.shape[0],
    }
    return SwinForImageClassification, SwinConfig(**fields)


def _convert(tensors: Mapping[str, Tensor], config: PreTrainedConfig) -> StateDict:
    shift = 1 if _merges_late(tensors) else 0
    early = {
        re.sub(
            r"^layers\.(\d+)\.downsample\.", lambda match: f"layers.{int(match[1]) - shift}.downsample.", key
        ): tensor
        for key, tensor in tensors.items()
    }
    return rename_keys(early, _RULES, _FUSED)


SWIN_LAYOUT = CheckpointLayout(
    _recognises, _infer, _convert, (r".*\.relative_position_index", r".*\.attn_mask"), shows_size=True
)
"""Classification files of Microsoft's Swin and of timm's, any depths and widths, one window size. Index and mask
buffers, which the config determines, are dropped."""

__all__ = ["SWIN_LAYOUT"]
