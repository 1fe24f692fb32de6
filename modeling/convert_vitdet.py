"""Published ViTDet detectors (arXiv 2203.16527, detectron2's model zoo) -> Transformers' `VitDetBackbone`.

The file holds a whole Mask R-CNN; what we keep is its plain transformer, `backbone.net`. It ends with its last block:
there is no final norm, and the pyramid behind it (`backbone.simfp_*`) belongs to the detector.
"""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, VitDetBackbone, VitDetConfig

from .checkpoint_layout import BrokenFileError, CheckpointLayout, StateDict
from .rename_keys import count_indices, rename_keys

_NET = r"^(?:module\.)?backbone\.net\."
_BLOCK, _OURS = _NET + r"blocks\.(\d+)\.", r"encoder.layer.\1."
_RULES = (
    (_NET + r"pos_embed$", "embeddings.position_embeddings"),
    (_NET + r"patch_embed\.proj\.", "embeddings.projection."),
    (_BLOCK + r"attn\.", _OURS + "attention."),
    (_BLOCK + r"(norm1|norm2|mlp|residual)\.", _OURS + r"\2."),
)
_WINDOW = 14
"""Side of every published ViTDet's windows; it decides where all blocks of a file have tables of one length."""

_DROP_PATH = {(768, 12): 0.1, (1024, 24): 0.4, (1280, 32): 0.5}
"""(width, depth) -> stochastic depth that the release was trained with; no tensor shows it."""


def _net(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The transformer's tensors, under the names that they have inside `backbone.net`."""
    return {key[match.end() :]: tensor for key, tensor in state_dict.items() if (match := re.match(_NET, key))}


def _recognises(state_dict: Mapping[str, Tensor]) -> bool:
    return any(re.match(_NET + r"(blocks|patch_embed)\.", key) for key in state_dict)


def _reach(table: Tensor) -> int:
    """Side of the square of tokens whose relative positions a table [2 * side - 1, C] holds."""
    return (table.shape[0] + 1) // 2


def _infer(state_dict: Mapping[str, Tensor]) -> tuple[type[PreTrainedModel], VitDetConfig]:
    net = _net(state_dict)
    depth = count_indices(net, r"blocks\.(\d+)\.")
    needed = ["patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"]
    needed += [f"blocks.{block}.attn.rel_pos_{axis}" for block in range(depth) for axis in "hw"]
    missing = [f"backbone.net.{key}" for key in needed if key not in net]
    if missing:
        raise BrokenFileError(
            f"The checkpoint holds no whole ViTDet encoder: {', '.join(missing[:5])} of {len(missing)} tensors that "
            "tell its sizes are missing. (Without relative positions a file does not show which blocks have windows.)"
        )
    width, channels, patch, _ = net["patch_embed.proj.weight"].shape
    reach = [tuple(_reach(net[f"blocks.{block}.attn.rel_pos_{axis}"]) for axis in "hw") for block in range(depth)]
    narrow, wide = min(reach), max(reach)
    if len(set(reach)) > 2 or (narrow != wide and narrow[0] != narrow[1]):
        raise BrokenFileError(
            "The checkpoint holds no ViTDet encoder: its blocks have relative positions for grids of "
            f"{sorted(set(reach))} tokens, where a ViTDet has one square window and one whole picture."
        )
    windowed = narrow if narrow != wide or narrow == (_WINDOW, _WINDOW) else None
    # Where every block has windows, no tensor shows the picture's size, and nothing depends on it.
    whole = wide if wide != windowed else (1024 // patch, 1024 // patch)
    side = math.isqrt(net["pos_embed"].shape[1])
    if net["pos_embed"].shape[1] - side**2 not in (0, 1):
        raise BrokenFileError(
            f"The checkpoint holds no ViTDet encoder: its pos_embed has {net['pos_embed'].shape[1]} rows, which is no "
            "square grid, with or without a class token."
        )
    mlp_ratio, rest = divmod(net["blocks.0.mlp.fc1.weight"].shape[0], width)
    if rest:
        raise BrokenFileError(
            "Transformers' VitDetConfig takes MLPs that are a whole number of times as wide as the model."
        )
    head_dim = net["blocks.0.attn.rel_pos_h"].shape[1]
    height_width = [patch * whole[0], patch * whole[1]]
    config = VitDetConfig(  # type: ignore[call-arg]  # takes out_features by keyword
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=width // head_dim,
        mlp_ratio=mlp_ratio,
        image_size=height_width[0] if height_width[0] == height_width[1] else height_width,
        pretrain_image_size=patch * side,
        patch_size=patch,
        num_channels=channels,
        qkv_bias="blocks.0.attn.qkv.bias" in net,
        drop_path_rate=_DROP_PATH.get((width, depth), 0.0),
        window_block_indices=[block for block in range(depth) if reach[block] == windowed],
        residual_block_indices=[block for block in range(depth) if f"blocks.{block}.residual.conv1.weight" in net],
        use_relative_position_embeddings=True,
        window_size=windowed[0] if windowed else 0,
        out_features=[f"stage{depth}"],
    )
    return VitDetBackbone, config


def _convert(state_dict: Mapping[str, Tensor], config: PreTrainedConfig) -> StateDict:
    converted = rename_keys(state_dict, _RULES)
    positions = converted.get("embeddings.position_embeddings")
    if positions is not None and math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:
        # Transformers drops the first row, a class token's, which a model pretrained without one lacks.
        none = positions.new_zeros(1, 1, positions.shape[2])
        converted["embeddings.position_embeddings"] = torch.cat([none, positions], dim=1)
    return converted


VITDET_LAYOUT = CheckpointLayout(
    recognises=_recognises,
    infer=_infer,
    convert=_convert,
    discards=(
        r"(module\.)?backbone\.simfp_\d+\.",
        r"(module\.)?proposal_generator\.",
        r"(module\.)?roi_heads\.",
        r"(module\.)?pixel_(mean|std)$",
    ),
    shows_size=True,
)
"""detectron2's ViTDet files: `backbone.net.` is loaded whole, the detector around it is left out."""

__all__ = ["VITDET_LAYOUT"]
