"""State dict of a timm `VisionTransformer` -> state dict of `HiddenStateBackbone` around a Transformers ViT."""

import re

import torch

_RENAMES = (
    (r"^patch_embed\.proj\.", "vision_model.embeddings.patch_embeddings.projection."),
    (r"^cls_token$", "vision_model.embeddings.cls_token"),
    (r"^pos_embed$", "vision_model.embeddings.position_embeddings"),
    (r"^norm\.", "norm."),
    (r"^blocks\.(\d+)\.norm1\.", r"vision_model.layers.\1.layernorm_before."),
    (r"^blocks\.(\d+)\.norm2\.", r"vision_model.layers.\1.layernorm_after."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"vision_model.layers.\1.attention.o_proj."),
    (r"^blocks\.(\d+)\.mlp\.", r"vision_model.layers.\1.mlp."),
)
_FUSED = re.compile(r"^blocks\.(\d+)\.attn\.qkv\.(weight|bias)$")


def convert_timm_vit(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the keys of a timm ViT and splits its fused query-key-value projections.

    Heads (`head.*`, `fc_norm.*`) keep their names: they are for the caller to discard.

    Args:
        state_dict: as timm stores it, `blocks.0.attn.qkv.weight` being [3 * C, C].

    Returns:
        A state dict with the names of `HiddenStateBackbone`; keys that no rule knows keep their names.
    """
    converted = {}
    for key, tensor in state_dict.items():
        if fused := _FUSED.match(key):
            block, kind = fused.groups()
            for name, part in zip("qkv", tensor.chunk(3, dim=0), strict=True):
                converted[f"vision_model.layers.{block}.attention.{name}_proj.{kind}"] = part.clone()
            continue
        for pattern, replacement in _RENAMES:
            renamed, hits = re.subn(pattern, replacement, key)
            if hits:
                key = renamed
                break
        converted[key] = tensor
    return converted


__all__ = ["convert_timm_vit"]
