"""Published ViT-Adapter segmenters and detectors (github.com/czczup/ViT-Adapter, mmseg and mmdet) -> `VitAdapter`.

No tensor shows the number of heads, nor how heads and points share the deformable attention's outputs: every published
model has heads of 64 channels in its ViT and 4 points. What its detectors do otherwise than its segmenters, windows in
all but the last block of a group and one ViT map for every level, is taken from the head that the file holds.
"""

import math
import re
from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration.configuration_vit_adapter import VitAdapterConfig
from .checkpoint_layout import BrokenFileError, CheckpointLayout, StateDict
from .convert_timm_vit import heads_of
from .modeling_vit_adapter import PATCH, VitAdapterBackbone
from .rename_keys import count_indices, need, rename_keys

_FAMILY = "ViT-Adapter"
_PREFIX = r"^(?:module\.)?(?:backbone\.)?"
_PRIOR = _PREFIX + r"spm\."
_BLOCK, _OURS = _PREFIX + r"blocks\.(\d+)\.", r"blocks.\1."
_EXCHANGE = _PREFIX + r"(interactions\.\d+\.(?:injector|extractor|extra_extractors\.\d+)\.)"
_DETECTOR = (r"(module\.)?neck\.", r"(module\.)?rpn_head\.", r"(module\.)?roi_head\.", r"(module\.)?bbox_head\.")
_SEGMENTER = (r"(module\.)?decode_head\.", r"(module\.)?auxiliary_head\.")

_POINTS = 4
_DETECTOR_WINDOW = 14
_DROP_PATH = {192: 0.1, 384: 0.2, 768: 0.3, 1024: 0.4}
"""Width -> stochastic depth of the published segmenters."""


_RULES = (
    (_PREFIX + r"pos_embed$", "position_embeddings"),
    (_PREFIX + r"level_embed$", "level_embeddings"),
    (_PREFIX + r"patch_embed\.proj\.", "patch_embedding."),
    (_BLOCK + r"(norm1|norm2|mlp)\.", _OURS + r"\2."),
    (_BLOCK + r"attn\.qkv\.", _OURS + "attention.qkv."),
    (_BLOCK + r"attn\.proj\.", _OURS + "attention.out_proj."),
    (_BLOCK + r"gamma([12])$", _OURS + r"scale\2"),
    *((_PRIOR + rf"stem\.{3 * index}\.", f"spatial_prior.stem.{index}.conv.") for index in range(3)),
    *((_PRIOR + rf"stem\.{3 * index + 1}\.", f"spatial_prior.stem.{index}.norm.") for index in range(3)),
    (_PRIOR + r"conv([234])\.0\.", r"spatial_prior.stage\1.conv."),
    (_PRIOR + r"conv([234])\.1\.", r"spatial_prior.stage\1.norm."),
    (_PRIOR + r"fc([1234])\.", r"spatial_prior.projections.stage\1."),
    (_EXCHANGE + r"feat_norm\.", r"\1source_norm."),
    (_EXCHANGE + r"attn\.", r"\1attention."),
    (_EXCHANGE + r"ffn\.dwconv\.dwconv\.", r"\1ffn.conv."),
    (_EXCHANGE + r"gamma$", r"\1scale"),
    (_EXCHANGE + r"(query_norm|ffn|ffn_norm)\.", r"\1\2."),
    (_PREFIX + r"up\.", "upsample."),
    (_PREFIX + r"norm([1234])\.", r"norms.stage\1."),
)


def _recognises(tensors: Mapping[str, Tensor]) -> bool:
    return any(re.match(_PRIOR, key) for key in tensors)


def _is_detector(tensors: Mapping[str, Tensor]) -> bool:
    return any(re.match(pattern, key) for key in tensors for pattern in _DETECTOR)


def _infer(tensors: Mapping[str, Tensor]) -> tuple[type[PreTrainedModel], VitAdapterConfig]:
    own = {re.sub(_PREFIX, "", key): tensor for key, tensor in tensors.items()}
    width, channels, patch, _ = need(own, "patch_embed.proj.weight", _FAMILY).shape
    positions = need(own, "pos_embed", _FAMILY).shape[1] - 1
    side = math.isqrt(positions)
    if patch != PATCH or side**2 != positions:
        raise BrokenFileError(
            f"A ViT-Adapter has patches of {PATCH} pixels and a square of positions behind that of a class token; the "
            f"file has patches of {patch} and {1 + positions} positions."
        )
    detector, interactions = _is_detector(tensors), count_indices(own, r"interactions\.(\d+)\.")
    extractor = "interactions.0.extractor."
    reads = need(own, f"{extractor}attn.attention_weights.bias", _FAMILY).shape[0]
    if reads % _POINTS:
        raise BrokenFileError(f"The deformable attention reads {reads} points, which is no multiple of {_POINTS}.")
    ffn = own.get(f"{extractor}ffn.fc1.weight")
    config = VitAdapterConfig(
        image_size=[800, 1333] if detector else 512,
        pretrain_image_size=PATCH * side,
        num_channels=channels,
        hidden_size=width,
        num_hidden_layers=count_indices(own, r"blocks\.(\d+)\."),
        num_attention_heads=heads_of(width, _FAMILY),
        mlp_ratio=need(own, "blocks.0.mlp.fc1.weight", _FAMILY).shape[0] / width,
        qkv_bias="blocks.0.attn.qkv.bias" in own,
        layer_scale="blocks.0.gamma1" in own,
        window_size=_DETECTOR_WINDOW if detector else 0,
        num_interactions=interactions,
        conv_inner_size=need(own, "spm.stem.0.weight", _FAMILY).shape[0],
        deform_num_heads=reads // _POINTS,
        deform_num_points=_POINTS,
        deform_ratio=need(own, f"{extractor}attn.value_proj.weight", _FAMILY).shape[0] / width,
        conv_ffn_ratio=0.0 if ffn is None else ffn.shape[0] / width,
        num_extra_extractors=count_indices(own, rf"interactions\.{interactions - 1}\.extra_extractors\.(\d+)\."),
        # The light models, of one interaction, add none.
        added_vit_features="none" if interactions != 4 else "last" if detector else "each",
        drop_path_rate=_DROP_PATH.get(width, 0.0),
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return VitAdapterBackbone, config


def _convert(tensors: Mapping[str, Tensor], config: PreTrainedConfig) -> StateDict:
    converted = rename_keys(tensors, _RULES)
    if "position_embeddings" in converted:  # there is no class token; its position stays behind
        converted["position_embeddings"] = converted["position_embeddings"][:, 1:]
    return converted


VIT_ADAPTER_LAYOUT = CheckpointLayout(
    _recognises, _infer, _convert, discards=(*_SEGMENTER, *_DETECTOR), shows_size=True
)
"""mmseg's and mmdet's ViT-Adapter files; the whole pyramid is loaded, the segmenter or detector behind it left out."""

__all__ = ["VIT_ADAPTER_LAYOUT"]
