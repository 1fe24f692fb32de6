"""MambaVision's published checkpoints (github.com/NVlabs/MambaVision, `.pth.tar` and the Hub's safetensors) as ours.

Depths, widths and every other size are read off the tensors. Two things no tensor shows, the number of attention heads
and the side of the windows; they are taken to be those of the published models: 8 and 16 heads in stages 3 and 4, twice
as many from a width of 784 in stage 3 on (L, L2, L3), and windows of 14 and 7 positions, which cover the whole map at
224 pixels. Models made for 256 or 512 pixels have larger windows: name the encoder. For a width that was never
published a warning tells what was assumed; both fields can be corrected in the `config.json` of the converted folder.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..configuration.configuration_mambavision import MambaVisionConfig
from .checkpoint_layout import BrokenFileError, CheckpointLayout, StateDict
from .modeling_mambavision import MambaVisionBackbone, MambaVisionForImageClassification

logger = logging.get_logger(__name__)

_PREFIXES = re.compile(r"^((module|model|encoder)\.)+")
_PUBLISHED_WIDTHS = (80, 96, 128, 196, 256)
_WIDE = 784

_BLOCK, _OURS = r"levels\.(\d+)\.blocks\.(\d+)\.", r"stages.\1.blocks.\2."
_RULES = (
    (r"patch_embed\.conv_down\.0\.(.+)", r"stem.conv1.\1"),
    (r"patch_embed\.conv_down\.1\.(.+)", r"stem.norm1.\1"),
    (r"patch_embed\.conv_down\.3\.(.+)", r"stem.conv2.\1"),
    (r"patch_embed\.conv_down\.4\.(.+)", r"stem.norm2.\1"),
    (_BLOCK + r"((conv|norm)[12]\..+|mlp\.fc[12]\..+|mixer\.(in_proj|x_proj|out_proj|qkv)\..+)", _OURS + r"\3"),
    (_BLOCK + r"gamma", _OURS + "layer_scale.scale"),
    (_BLOCK + r"gamma_([12])", _OURS + r"layer_scale\3.scale"),
    (_BLOCK + r"mixer\.conv1d_x\.weight", _OURS + "mixer.conv_scanned.weight"),
    (_BLOCK + r"mixer\.conv1d_z\.weight", _OURS + "mixer.conv_direct.weight"),
    (_BLOCK + r"mixer\.dt_proj\.(weight|bias)", _OURS + r"mixer.dt_\3"),
    (_BLOCK + r"mixer\.A_log", _OURS + "mixer.a_log"),
    (_BLOCK + r"mixer\.D", _OURS + "mixer.d"),
    (_BLOCK + r"mixer\.proj\.(.+)", _OURS + r"mixer.out_proj.\3"),
    (r"levels\.(\d+)\.downsample\.reduction\.0\.weight", r"downsamples.\1.weight"),
    (r"norm\.(.+)", r"norm.\1"),
    (r"head\.(weight|bias)", r"classifier.\1"),
)


def _reference_names(tensors: Mapping[str, Tensor]) -> StateDict:
    return {_PREFIXES.sub("", key): tensor for key, tensor in tensors.items()}


def _recognises(tensors: Mapping[str, Tensor]) -> bool:
    return "patch_embed.conv_down.0.weight" in _reference_names(tensors)


def _infer(tensors: Mapping[str, Tensor]) -> tuple[type[PreTrainedModel], MambaVisionConfig]:
    """Every field that a checkpoint decides, read off keys and shapes; heads and windows by convention."""
    reference = _reference_names(tensors)
    blocks = {(int(m[1]), int(m[2])) for key in reference if (m := re.match(_BLOCK, key))}

    def shape(key: str) -> list[int]:
        if key not in reference:
            raise BrokenFileError(f"The file is not a whole MambaVision encoder: it lacks {key}.")
        return list(reference[key].shape)

    widths = [shape(f"levels.{stage}.blocks.0.norm1.weight")[0] for stage in range(4)]
    mixer = "levels.2.blocks.0.mixer."
    rank = shape(mixer + "dt_proj.weight")[1]
    has_head = "head.weight" in reference
    usual = (16, 32) if widths[2] >= _WIDE else (8, 16)
    heads = [math.gcd(width, count) for width, count in zip(widths[2:], usual, strict=True)]
    if widths[0] not in _PUBLISHED_WIDTHS:
        logger.warning(
            "No published MambaVision has a first width of %d, and no tensor shows attention heads and windows: "
            "num_attention_heads=%s and window_sizes=[14, 7] are assumed; correct them in config.json if they differ.",
            widths[0],
            heads,
        )
    labels: dict[str, Any] = {"num_labels": shape("head.weight")[0]} if has_head else {}
    config = MambaVisionConfig(
        num_channels=shape("patch_embed.conv_down.0.weight")[1],
        stem_width=shape("patch_embed.conv_down.0.weight")[0],
        hidden_sizes=widths,
        depths=[sum(1 for stage, _ in blocks if stage == index) for index in range(4)],
        num_attention_heads=heads,
        window_sizes=[14, 7],
        mlp_ratio=shape("levels.2.blocks.0.mlp.fc1.weight")[0] / widths[2],
        qkv_bias=any(key.endswith(".qkv.bias") for key in reference),
        d_state=shape(mixer + "A_log")[1],
        dt_rank=None if rank == -(-widths[2] // 16) else rank,
        layer_scale=1e-5 if "levels.2.blocks.0.gamma_1" in reference else None,
        conv_layer_scale=1e-5 if "levels.0.blocks.0.gamma" in reference else None,
        final_norm="norm.weight" in reference,
        **labels,
    )
    if has_head:
        return MambaVisionForImageClassification, config
    config.out_features = config.stage_names[1:]
    return MambaVisionBackbone, config


def _convert(tensors: Mapping[str, Tensor], config: PreTrainedConfig) -> StateDict:
    """Ours of each tensor; a whole classifier keeps its trunk under `model.`."""
    reference = _reference_names(tensors)
    trunk = "model." if "head.weight" in reference else ""
    converted = {}
    for key, tensor in reference.items():
        for pattern, replacement in _RULES:
            if match := re.fullmatch(pattern, key):
                name = match.expand(replacement)
                # The published model adds this bias twice, in the projection and again in the scan; ours does once.
                tensor = tensor * 2 if name.endswith("mixer.dt_bias") else tensor
                converted[name if name.startswith("classifier.") else trunk + name] = tensor
                break
        else:
            converted[key] = tensor
    for key in [key for key in converted if key.endswith(".running_mean")]:
        # A count of batches, which evaluation never reads; files saved by older versions of torch hold none.
        converted.setdefault(f"{key.removesuffix('running_mean')}num_batches_tracked", torch.tensor(0))
    return converted


MAMBAVISION_LAYOUT = CheckpointLayout(
    _recognises, _infer, _convert, unseen=("num_attention_heads", "window_sizes", "image_size")
)
"""A file with a classifier becomes `MambaVisionForImageClassification`, one without becomes `MambaVisionBackbone`."""

__all__ = ["MAMBAVISION_LAYOUT"]
