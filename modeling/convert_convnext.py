"""ConvNeXt and ConvNeXt V2 checkpoints, Facebook's release and timm's -> Transformers' classifiers."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from .checkpoint_layout import CheckpointLayout, StateDict
from .rename_keys import count_indices, need, rename_keys

_FAMILY = "ConvNeXt"
_TO_TIMM = (  # the release's names in timm's
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.dwconv\.", r"stages.\1.blocks.\2.conv_dw."),
    (r"^stages\.(\d+)\.(\d+)\.pwconv([12])\.", r"stages.\1.blocks.\2.mlp.fc\3."),
    (r"^stages\.(\d+)\.(\d+)\.grn\.gamma$", r"stages.\1.blocks.\2.mlp.grn.weight"),
    (r"^stages\.(\d+)\.(\d+)\.grn\.beta$", r"stages.\1.blocks.\2.mlp.grn.bias"),
    (r"^stages\.(\d+)\.(\d+)\.(norm|gamma)", r"stages.\1.blocks.\2.\3"),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)
_BLOCK, _OURS = r"^stages\.(\d+)\.blocks\.(\d+)\.", r"{0}.encoder.stages.\1.layers.\2."
_RULES = (
    (r"^stem\.0\.", "{0}.embeddings.patch_embeddings."),
    (r"^stem\.1\.", "{0}.embeddings.layernorm."),
    (r"^stages\.(\d+)\.downsample\.([01])\.", r"{0}.encoder.stages.\1.downsampling_layer.\2."),
    (_BLOCK + r"conv_dw\.", _OURS + "dwconv."),
    (_BLOCK + r"norm\.", _OURS + "layernorm."),
    (_BLOCK + r"mlp\.fc([12])\.", _OURS + r"pwconv\3."),
    (_BLOCK + r"mlp\.grn\.", _OURS + "grn."),
    (_BLOCK + r"gamma$", _OURS + "layer_scale_parameter"),
    (r"^head\.norm\.", "{0}.layernorm."),
    (r"^head\.fc\.", "classifier."),
)


def _recognises(tensors: Mapping[str, Tensor]) -> bool:
    return any(re.match(r"stages\.\d+\.(blocks\.\d+\.conv_dw|\d+\.dwconv)\.weight", key) for key in tensors) and (
        "stem.0.weight" in tensors or "downsample_layers.0.0.weight" in tensors
    )


def _infer(tensors: Mapping[str, Tensor]) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    timm = rename_keys(tensors, _TO_TIMM)
    stem = need(timm, "stem.0.weight", _FAMILY)
    stages = count_indices(timm, r"stages\.(\d+)\.")
    widths = [need(timm, f"stages.{stage}.blocks.0.norm.weight", _FAMILY).shape[0] for stage in range(stages)]
    fields: dict[str, Any] = {
        "num_channels": stem.shape[1],
        "patch_size": stem.shape[2],
        "num_stages": stages,
        "hidden_sizes": widths,
        "depths": [count_indices(timm, rf"stages\.{stage}\.blocks\.(\d+)\.") for stage in range(stages)],
        "layer_norm_eps": 1e-6,
        "num_labels": timm["head.fc.weight"].shape[0] if "head.fc.weight" in timm else 0,
    }
    if any(".grn." in key for key in timm):
        return ConvNextV2ForImageClassification, ConvNextV2Config(**fields)
    scaled = "stages.0.blocks.0.gamma" in timm
    return ConvNextForImageClassification, ConvNextConfig(**fields, layer_scale_init_value=1e-6 if scaled else 0.0)


def _convert(tensors: Mapping[str, Tensor], config: PreTrainedConfig) -> StateDict:
    rules = [(pattern, replacement.replace("{0}", config.model_type)) for pattern, replacement in _RULES]
    renamed = rename_keys(rename_keys(tensors, _TO_TIMM), rules)
    for key, tensor in renamed.items():
        if ".grn." in key:
            renamed[key] = tensor.view(1, 1, 1, -1)
        elif ".pwconv" in key and key.endswith("weight"):  # timm's small variants use 1x1 convolutions
            renamed[key] = tensor.flatten(1)
    return renamed


CONVNEXT_LAYOUT = CheckpointLayout(_recognises, _infer, _convert)
"""Classification files of Facebook's ConvNeXt and ConvNeXt V2 and of timm's, any depths and widths."""

__all__ = ["CONVNEXT_LAYOUT"]
