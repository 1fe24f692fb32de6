"""Checkpoints of timm's `VisionTransformer` (AugReg, DeiT, DeiT-III), of the DeiT releases and Google's -> stock ViT.

PyTorch files do not say how many heads there are: every published ViT and DeiT has heads of 64 channels, and so has the
converted model. Where 64 does not divide the width (toy models) heads of 16 channels are taken, with a warning.
"""

import logging
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from .checkpoint_layout import BrokenFileError, CheckpointLayout, StateDict
from .convert_jax_vit import convert_jax, infer_jax, recognises_jax
from .rename_keys import count_indices, need, rename_keys

logger = logging.getLogger(__name__)

_FAMILY = "timm ViT"
_RULES = (
    (r"^patch_embed\.proj\.", "{0}.embeddings.patch_embeddings.projection."),
    (r"^cls_token$", "{0}.embeddings.cls_token"),
    (r"^dist_token$", "{0}.embeddings.distillation_token"),
    (r"^pos_embed$", "{0}.embeddings.position_embeddings"),
    (r"^norm\.", "{0}.layernorm."),
    (r"^blocks\.(\d+)\.norm1\.", r"{0}.layers.\1.layernorm_before."),
    (r"^blocks\.(\d+)\.norm2\.", r"{0}.layers.\1.layernorm_after."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"{0}.layers.\1.attention.o_proj."),
    (r"^blocks\.(\d+)\.mlp\.(fc[12])\.", r"{0}.layers.\1.mlp.\2."),
)
_HEADS = {
    "vit": ((r"^head\.(weight|bias)$", r"classifier.\1"),),
    "deit": (
        (r"^head\.(weight|bias)$", r"cls_classifier.\1"),
        (r"^head_dist\.(weight|bias)$", r"distillation_classifier.\1"),
    ),
}
_LAYER_SCALE = re.compile(r"blocks\.(\d+)\.(?:ls([12])\.gamma|gamma_([12]))")
_SCALED = {"1": "attn.proj", "2": "mlp.fc2"}


def heads_of(width: int, family: str) -> int:
    """Number of attention heads of a transformer of this width, where its file does not tell."""
    if width % 64 == 0:
        return width // 64
    if width % 16:
        raise BrokenFileError(
            f"The number of heads of this {family} of width {width} is unknown: the file does not hold it, published "
            "models have heads of 64 channels, and neither 64 nor 16 divides the width."
        )
    logger.warning("Width %d is no multiple of 64: %d heads of 16 channels are assumed.", width, width // 16)
    return width // 16


def _recognises(tensors: Mapping[str, Tensor]) -> bool:
    if recognises_jax(tensors):
        return True
    another = ("spm.", "interactions.", "decoder_", "net.")
    return (
        "patch_embed.proj.weight" in tensors
        and any(re.match(r"blocks\.\d+\.attn\.qkv\.weight", key) for key in tensors)
        and not any(key.startswith(another) for key in tensors)
    )


def _infer(tensors: Mapping[str, Tensor]) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    if recognises_jax(tensors):
        return infer_jax(tensors)
    width, channels, patch, _ = need(tensors, "patch_embed.proj.weight", _FAMILY).shape
    positions = need(tensors, "pos_embed", _FAMILY).shape[1]
    distilled = "dist_token" in tensors
    patches = positions - 1 - distilled
    if any(_LAYER_SCALE.fullmatch(key) for key in tensors) and math.isqrt(positions) ** 2 == positions:
        patches = positions  # DeiT-III; without its LayerScale this is a picture that is no square
    grid = math.isqrt(max(patches, 0))
    if grid**2 != patches or not grid:
        raise BrokenFileError(
            f"pos_embed has {positions} positions, which is no square of patches behind "
            f"{1 + distilled} for other tokens: only models trained on square pictures, with a class token, are read."
        )
    labels = tensors["head.weight"].shape[0] if "head.weight" in tensors else 0
    config_class: type[Any] = DeiTConfig if distilled else ViTConfig
    config = config_class(
        hidden_size=width,
        num_hidden_layers=count_indices(tensors, r"blocks\.(\d+)\."),
        num_attention_heads=heads_of(width, _FAMILY),
        intermediate_size=need(tensors, "blocks.0.mlp.fc1.weight", _FAMILY).shape[0],
        image_size=grid * patch,
        patch_size=patch,
        num_channels=channels,
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
        layer_norm_eps=1e-6,
        num_labels=labels,
    )
    return (DeiTForImageClassificationWithTeacher if distilled else ViTForImageClassification), config


def _without_layer_scale(tensors: Mapping[str, Tensor]) -> StateDict:
    """LayerScale multiplies what a linear layer gives, so it goes into that layer's rows and bias."""
    folded = dict(tensors)
    for key in tensors:
        if match := _LAYER_SCALE.fullmatch(key):
            scale = folded.pop(key).float()
            layer = f"blocks.{match[1]}.{_SCALED[match[2] or match[3]]}"
            for name in (f"{layer}.weight", f"{layer}.bias"):
                if name in folded:
                    tensor = folded[name]
                    by_row = scale.view(-1, *[1] * (tensor.dim() - 1))
                    folded[name] = (tensor.float() * by_row).to(tensor.dtype)
    return folded


def _convert(tensors: Mapping[str, Tensor], config: PreTrainedConfig) -> StateDict:
    if recognises_jax(tensors):
        return convert_jax(tensors)
    prefix = config.model_type
    folded = _without_layer_scale(tensors)
    position = folded.get("pos_embed")
    if position is not None and position.shape[1] == (config.image_size // config.patch_size) ** 2:
        # DeiT-III adds no position to its CLS token.
        none = position.new_zeros(1, 2 if prefix == "deit" else 1, position.shape[2])
        folded["pos_embed"] = torch.cat([none, position], dim=1)
    rules = [(pattern, replacement.format(prefix)) for pattern, replacement in _RULES]
    fused = (r"^blocks\.(\d+)\.attn\.qkv\.", prefix + r".layers.\1.attention.{}_proj.")
    return rename_keys(folded, [*rules, *_HEADS[prefix]], fused)


TIMM_VIT_LAYOUT = CheckpointLayout(_recognises, _infer, _convert, shows_size=True)
"""Files of timm's ViT and DeiT, of the DeiT repository and of google-research/vision_transformer: any depth, width,
patch and picture size, with or without classifier, LayerScale (`ls1.gamma` or `gamma_1`), position of the CLS token,
and distillation token."""

__all__ = ["TIMM_VIT_LAYOUT", "heads_of"]
