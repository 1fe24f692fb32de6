"""Renaming of state dict keys by a table of rules, for checkpoints whose transformer blocks fuse q, k and v."""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from .checkpoint_layout import BrokenFileError, StateDict


def rename_keys(
    state_dict: Mapping[str, Tensor], rules: Sequence[tuple[str, str]], fused_rule: tuple[str, str] | None = None
) -> StateDict:
    """Applies to each key the first rule that matches; keys that no rule knows keep their names.

    Args:
        state_dict: name -> tensor.
        rules: (regular expression, replacement), as for `re.sub`.
        fused_rule: the same for query, key and value stacked along the first dimension; its replacement holds `{}`
            where "q", "k" or "v" goes.

    Returns:
        A new dict of the same tensors; fused ones are split into three views.
    """
    renamed: StateDict = {}
    for key, tensor in state_dict.items():
        if fused_rule is not None:
            template, is_fused = re.subn(*fused_rule, key)
            if is_fused:
                renamed |= zip((template.format(name) for name in "qkv"), tensor.chunk(3), strict=True)
                continue
        for pattern, replacement in rules:
            key, hit = re.subn(pattern, replacement, key)
            if hit:
                break
        renamed[key] = tensor
    return renamed


def count_indices(keys: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the largest index that the group of `pattern` meets at the beginning of a key; 0 if none does."""
    return max((int(match[1]) + 1 for key in keys if (match := re.match(pattern, key))), default=0)


def need(tensors: Mapping[str, Tensor], key: str, family: str) -> Tensor:
    """The tensor `key`.

    Raises:
        BrokenFileError: the file does not hold it.
    """
    if key not in tensors:
        raise BrokenFileError(f"The file looks like a {family} checkpoint, but it holds no {key}.")
    return tensors[key]


__all__ = ["count_indices", "need", "rename_keys"]
