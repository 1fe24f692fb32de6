"""Renaming of state dict keys by a table of rules, for checkpoints whose transformer blocks fuse q, k and v."""

import re
from collections.abc import Sequence

import torch


def rename_keys(
    state_dict: dict[str, torch.Tensor], rules: Sequence[tuple[str, str]], fused_rule: tuple[str, str]
) -> dict[str, torch.Tensor]:
    """Applies to each key the first rule that matches; keys that no rule knows keep their names.

    Args:
        state_dict: name -> tensor.
        rules: (regular expression, replacement), as for `re.sub`.
        fused_rule: the same for query, key and value stacked along the first dimension; its replacement holds `{}`
            where "q", "k" or "v" goes.

    Returns:
        A new dict; fused tensors are split in three.
    """
    renamed = {}
    for key, tensor in state_dict.items():
        template, is_fused = re.subn(*fused_rule, key)
        if is_fused:
            for name, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[template.format(name)] = part.clone()
            continue
        for pattern, replacement in rules:
            key, hit = re.subn(pattern, replacement, key)
            if hit:
                break
        renamed[key] = tensor
    return renamed


__all__ = ["rename_keys"]
