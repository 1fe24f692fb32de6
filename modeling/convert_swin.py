"""Swin checkpoints -> Transformers' Swin: classifiers of Microsoft and timm, encoders of detectors and segmenters.

Microsoft (and Transformers) merge patches at the end of a stage, timm at the start of the next one. mmdetection and
mmsegmentation have names of their own, and merge with `nn.Unfold`, whose channels come in another order. The norms of
stages that a detector or segmenter trained become those of `SwinBackbone`.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, SwinBackbone, SwinConfig, SwinForImageClassification

from .checkpoint_layout import BrokenFileError, CheckpointLayout, StateDict
from .rename_keys import count_indices, need, rename_keys

_FAMILY = "Swin"
_BLOCK, _OURS = r"^layers\.(\d+)\.blocks\.(\d+)\.", r"swin.encoder.layers.\1.blocks.\2."
_TABLE = "attn.relative_position_bias_table"
_STAGE_NORM = r"^norm(\d)\."
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
    *((rf"^norm{index}\.", f"hidden_states_norms.stage{index + 1}.") for index in range(10)),
    (r"^head\.(?:fc\.)?(weight|bias)$", r"classifier.\1"),
)
_FUSED = (_BLOCK + r"attn\.qkv\.", _OURS + "attention.{}_proj.")
_ENCODER = "backbone."
_MM_RULES = (
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^stages\.(\d+\.blocks\.\d+\.)attn\.w_msa\.", r"layers.\1attn."),
    (r"^stages\.(\d+\.blocks\.\d+\.)ffn\.layers\.0\.0\.", r"layers.\1mlp.fc1."),
    (r"^stages\.(\d+\.blocks\.\d+\.)ffn\.layers\.1\.", r"layers.\1mlp.fc2."),
    (r"^stages\.", "layers."),
)
"""mmdetection's and mmsegmentation's names -> Microsoft's."""

_HEADS = (
    r"(neck|rpn_head|roi_head|bbox_head|mask_head|panoptic_head|panoptic_fusion_head|decode_head|auxiliary_head"
    r"|data_preprocessor)\.",
)


def _release_names(tensors: Mapping[str, Tensor]) -> StateDict:
    """Microsoft's name, and order of channels, of each tensor; those of a classifier stay as they are."""
    inner = {key.removeprefix(_ENCODER): tensor for key, tensor in tensors.items()}
    if len(inner) != len(tensors):
        raise BrokenFileError(f"it holds tensors both with and without {_ENCODER!r} before their names")
    if "patch_embed.projection.weight" in inner:
        inner = {
            key: _merged_by_slices(tensor) if re.match(r"stages\.\d+\.downsample\.", key) else tensor
            for key, tensor in inner.items()
        }
        return rename_keys(inner, _MM_RULES)
    return inner if any(re.match(_STAGE_NORM, key) for key in inner) else dict(tensors)


def _merged_by_slices(tensor: Tensor) -> Tensor:
    """Channels of a 2x2 neighbourhood [..., 4 C], as `nn.Unfold` orders them -> as Microsoft stacks them.

    Unfolded they are [C, row, column]; Microsoft's are [column, row, C].
    """
    return tensor.unflatten(-1, (-1, 2, 2)).transpose(-1, -3).flatten(-3)


def _recognises(tensors: Mapping[str, Tensor]) -> bool:
    names = rename_keys({key.removeprefix(_ENCODER): tensor for key, tensor in tensors.items()}, _MM_RULES)
    is_dense = any(re.match(_STAGE_NORM, key) for key in names)
    names = names if is_dense else dict(tensors)
    return "patch_embed.proj.weight" in names and any(re.fullmatch(_BLOCK + _TABLE, key) for key in names)


def _merges_late(tensors: Mapping[str, Tensor]) -> bool:
    """Whether patches are merged at the start of a stage (timm), not at the end of the one before."""
    return "layers.0.downsample.reduction.weight" not in tensors


def _infer(tensors: Mapping[str, Tensor]) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    tensors = _release_names(tensors)
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
    normed = sorted({int(match[1]) + 1 for key in tensors if (match := re.match(_STAGE_NORM, key))})
    if not normed:
        return SwinForImageClassification, SwinConfig(**fields)
    if normed[-1] > stages:
        raise BrokenFileError(f"The file holds a norm of stage {normed[-1]}, but only {stages} stages.")
    fields |= {"out_features": [f"stage{stage}" for stage in normed], "output_norm": "layernorm"}
    return SwinBackbone, SwinConfig(**fields)


def _convert(tensors: Mapping[str, Tensor], config: PreTrainedConfig) -> StateDict:
    tensors = _release_names(tensors)
    is_dense = any(re.match(_STAGE_NORM, key) for key in tensors)
    shift = 1 if not is_dense and _merges_late(tensors) else 0
    early = {
        re.sub(
            r"^layers\.(\d+)\.downsample\.", lambda match: f"layers.{int(match[1]) - shift}.downsample.", key
        ): tensor
        for key, tensor in tensors.items()
    }
    converted = rename_keys(early, _RULES, _FUSED)
    if is_dense:  # SwinBackbone has this one besides, and does not use it
        last = converted[f"hidden_states_norms.{config.out_features[-1]}.weight"]
        width = config.embed_dim * 2 ** (len(config.depths) - 1)
        converted["swin.layernorm.weight"] = torch.ones(width, dtype=last.dtype)
        converted["swin.layernorm.bias"] = torch.zeros(width, dtype=last.dtype)
    return converted


SWIN_LAYOUT = CheckpointLayout(
    _recognises, _infer, _convert, (r".*\.relative_position_index", r".*\.attn_mask", *_HEADS), shows_size=True
)
"""Any depths and widths, one window size. Classification files of Microsoft and of timm become
`SwinForImageClassification`; what detectors and segmenters trained becomes `SwinBackbone` with the norms of its stages,
their heads left out. Index and mask buffers, which the config determines, are dropped."""

__all__ = ["SWIN_LAYOUT"]
