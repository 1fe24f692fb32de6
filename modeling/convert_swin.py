"""State dict of Microsoft's Swin release -> state dict of Transformers' `SwinBackbone`."""

import torch

from .rename_keys import rename_keys

_BLOCK, _OURS = r"^layers\.(\d+)\.blocks\.(\d+)\.", r"swin.encoder.layers.\1.blocks.\2."
_RULES = (
    (r"^patch_embed\.proj\.", "swin.embeddings.patch_embeddings.projection."),
    (r"^patch_embed\.norm\.", "swin.embeddings.norm."),
    (r"^layers\.(\d+)\.downsample\.", r"swin.encoder.layers.\1.downsample."),
    (_BLOCK + r"norm1\.", _OURS + "layernorm_before."),
    (_BLOCK + r"norm2\.", _OURS + "layernorm_after."),
    (_BLOCK + r"mlp\.", _OURS + "mlp."),
    (_BLOCK + r"attn\.proj\.", _OURS + "attention.o_proj."),
    (
        _BLOCK + r"attn\.relative_position_bias_table$",
        _OURS + "attention.relative_position_bias.relative_position_bias_table",
    ),
)
_FUSED = (_BLOCK + r"attn\.qkv\.", _OURS + "attention.{}_proj.")


def convert_swin(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the keys of a released Swin and splits its fused query-key-value projections.

    Args:
        state_dict: what the release holds under "model"; `layers.0.blocks.0.attn.qkv.weight` is [3 * C, C].

    Returns:
        A state dict with the names of `SwinBackbone`; keys that no rule knows keep theirs.
    """
    return rename_keys(state_dict, _RULES, _FUSED)


__all__ = ["convert_swin"]
