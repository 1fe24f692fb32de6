"""State dict of a timm `VisionTransformer` -> state dict of `HiddenStateBackbone` around a Transformers ViT."""

import torch

from .rename_keys import rename_keys

_RULES = (
    (r"^patch_embed\.proj\.", "vision_model.embeddings.patch_embeddings.projection."),
    (r"^cls_token$", "vision_model.embeddings.cls_token"),
    (r"^pos_embed$", "vision_model.embeddings.position_embeddings"),
    (r"^norm\.", "norm."),
    (r"^blocks\.(\d+)\.norm1\.", r"vision_model.layers.\1.layernorm_before."),
    (r"^blocks\.(\d+)\.norm2\.", r"vision_model.layers.\1.layernorm_after."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"vision_model.layers.\1.attention.o_proj."),
    (r"^blocks\.(\d+)\.mlp\.", r"vision_model.layers.\1.mlp."),
)
_FUSED = (r"^blocks\.(\d+)\.attn\.qkv\.", r"vision_model.layers.\1.attention.{}_proj.")


def convert_timm_vit(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the keys of a timm ViT or DeiT and splits its fused query-key-value projections.

    Args:
        state_dict: as timm stores it, `blocks.0.attn.qkv.weight` being [3 * C, C].

    Returns:
        A state dict with the names of `HiddenStateBackbone`; keys that no rule knows (`head.*`) keep theirs.
    """
    return rename_keys(state_dict, _RULES, _FUSED)


__all__ = ["convert_timm_vit"]
