"""Google's original `.npz` files of ViT and AugReg (JAX names and axis order) -> Transformers' ViT.

Kernels are [in, out], convolutions [height, width, in, out]; attention keeps its heads apart: query, key and value are
[C, heads, C / heads], the output is [heads, C / heads, C].
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, ViTConfig, ViTForImageClassification

from .checkpoint_layout import BrokenFileError, StateDict
from .rename_keys import count_indices, need

_FAMILY = "JAX ViT"
_PREFIX = "opt/target/"
_BLOCK = r"Transformer/encoderblock_(\d+)/"
_ATTENTION = _BLOCK + r"MultiHeadDotProductAttention_1/"
_NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_RULES = (
    (r"embedding/(kernel|bias)", "vit.embeddings.patch_embeddings.projection."),
    (r"Transformer/encoder_norm/(scale|bias)", "vit.layernorm."),
    (r"head/(kernel|bias)", "classifier."),
    (_BLOCK + r"LayerNorm_0/(scale|bias)", r"vit.layers.\1.layernorm_before."),
    (_BLOCK + r"LayerNorm_2/(scale|bias)", r"vit.layers.\1.layernorm_after."),
    (_BLOCK + r"MlpBlock_3/Dense_0/(kernel|bias)", r"vit.layers.\1.mlp.fc1."),
    (_BLOCK + r"MlpBlock_3/Dense_1/(kernel|bias)", r"vit.layers.\1.mlp.fc2."),
    (_ATTENTION + r"query/(kernel|bias)", r"vit.layers.\1.attention.q_proj."),
    (_ATTENTION + r"key/(kernel|bias)", r"vit.layers.\1.attention.k_proj."),
    (_ATTENTION + r"value/(kernel|bias)", r"vit.layers.\1.attention.v_proj."),
    (_ATTENTION + r"out/(kernel|bias)", r"vit.layers.\1.attention.o_proj."),
)
_VERBATIM = {
    "cls": "vit.embeddings.cls_token",
    "Transformer/posembed_input/pos_embedding": "vit.embeddings.position_embeddings",
}


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()}


def recognises_jax(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the keys are Google's, with or without `opt/target/`."""
    plain = _plain(tensors)
    return "embedding/kernel" in plain and any(re.match(_BLOCK, key) for key in plain)


def infer_jax(tensors: Mapping[str, Tensor]) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """Class and config of the whole model, any depth and width; these files do tell the number of heads."""
    plain = _plain(tensors)
    patch, _, channels, width = need(plain, "embedding/kernel", _FAMILY).shape
    positions = need(plain, "Transformer/posembed_input/pos_embedding", _FAMILY).shape[1]
    grid = math.isqrt(positions - 1)
    if grid**2 != positions - 1:
        raise BrokenFileError(
            f"pos_embedding has {positions} positions, which is no square of patches and a CLS token."
        )
    query = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"
    fields: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": count_indices(plain, _BLOCK),
        "num_attention_heads": need(plain, query, _FAMILY).shape[1],
        "intermediate_size": need(plain, "Transformer/encoderblock_0/MlpBlock_3/Dense_0/bias", _FAMILY).shape[0],
        "image_size": grid * patch,
        "patch_size": patch,
        "num_channels": channels,
        "layer_norm_eps": 1e-6,
        "num_labels": plain["head/bias"].shape[0] if "head/bias" in plain else 0,
    }
    return ViTForImageClassification, ViTConfig(**fields)


def _in_torch_order(key: str, tensor: Tensor) -> Tensor:
    if not key.endswith("kernel"):
        return tensor.flatten()
    if key == "embedding/kernel":
        return tensor.permute(3, 2, 0, 1)  # [height, width, in, out] -> [out, in, height, width]
    if tensor.dim() == 3:  # [heads, C / heads, C] or [C, heads, C / heads] -> [in, out]
        tensor = tensor.flatten(0, 1) if "/out/" in key else tensor.flatten(1)
    return tensor.T


def convert_jax(tensors: Mapping[str, Tensor]) -> StateDict:
    """Tensors under the names and in the axis order of `ViTForImageClassification`."""
    converted: StateDict = {}
    for key, tensor in _plain(tensors).items():
        if key in _VERBATIM:
            converted[_VERBATIM[key]] = tensor
            continue
        for pattern, replacement in _RULES:
            if match := re.fullmatch(pattern, key):
                name = match.expand(replacement) + _NAMES[match.groups()[-1]]
                converted[name] = _in_torch_order(key, tensor)
                break
        else:
            converted[key] = tensor
    return converted


__all__ = ["convert_jax", "infer_jax", "recognises_jax"]
