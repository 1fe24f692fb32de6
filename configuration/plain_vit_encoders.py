"""Published plain vision transformers, tapped at the second-to-last block without norm, as the paper taps its ViTs.

Accuracies: AugReg and DeiT-III as measured in timm's results/results-imagenet.csv, DeiT as in its repository. The
models trained on ImageNet-21k alone have no ImageNet top-1; that of CLIP, SigLIP and DINO depends on a prompt
or a probe.
"""

from collections.abc import Callable
from functools import partial

from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    PreTrainedConfig,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    ViTConfig,
)

from .configuration_hidden_state_backbone import HiddenStateBackboneConfig
from .encoder_entry import HALF, IMAGENET, IN1K_224, NamedEncoder, Preprocessing, WeightSource

_AUGREG_224 = Preprocessing(224, 224, *HALF)
_OPENAI_336 = Preprocessing(
    336, 336, mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)
)

_SIZES = {  # width, blocks, and what they cost up to the tap at 224 pixels: parameters, operations
    "tiny": (192, 12, 5_079_168, 2_302_884_096),
    "small": (384, 12, 19_890_432, 8_440_214_016),
    "base": (768, 12, 78_709_248, 32_218_211_328),
    "large": (1024, 24, 290_703_360, 117_990_748_160),
}


def _plain(
    stock_class: Callable[..., PreTrainedConfig], width: int, depth: int = 12, **fields
) -> HiddenStateBackboneConfig:
    """A stock config with heads of 64 channels and MLPs four times as wide, where `fields` do not say otherwise."""
    usual = {"num_attention_heads": width // 64}
    if hasattr(stock_class, "intermediate_size"):  # DINOv2 has a ratio instead, 4 by default
        usual["intermediate_size"] = 4 * width
    stock = stock_class(hidden_size=width, num_hidden_layers=depth, **usual | fields)
    return HiddenStateBackboneConfig(vision_config=stock)


def _timm(family: str, tag: str, preprocessing: Preprocessing, top1: dict[str, float | None]) -> list[NamedEncoder]:
    """The sizes of one training: patch 16, 224 pixels, weights in timm's repositories.

    DeiT-III is the same model once its LayerScale is multiplied into the layers before it.
    """
    entries = []
    for size, accuracy in top1.items():
        width, depth, parameters, flops = _SIZES[size]
        entries.append(
            NamedEncoder(
                f"{family}_{size}_patch16.{tag}_224",
                partial(_plain, ViTConfig, width, depth, layer_norm_eps=1e-6),
                preprocessing,
                parameters,
                flops,
                "Apache-2.0",
                WeightSource("timm_vit", hub_id=f"timm/{family}_{size}_patch16_224.{tag}"),
                imagenet_top1=accuracy,
            )
        )
    return entries


def _transformers(
    name: str,
    hub_id: str,
    config: partial,
    preprocessing: Preprocessing,
    parameters: int,
    flops: int,
    licence: str = "Apache-2.0",
) -> NamedEncoder:
    source = WeightSource("transformers", hub_id=hub_id)
    return NamedEncoder(name, config, preprocessing, parameters, flops, licence, source)


_SO400M = partial(
    _plain,
    SiglipVisionConfig,
    1152,
    27,
    num_attention_heads=16,
    intermediate_size=4304,
    image_size=384,
    patch_size=14,
)

PLAIN_VIT_ENCODERS = [
    *_timm("vit", "augreg_in1k", _AUGREG_224, {"small": 78.8, "base": 79.2}),
    *_timm("vit", "augreg_in21k_ft_in1k", _AUGREG_224, {"tiny": 75.5, "small": 81.4, "base": 84.5, "large": 85.9}),
    *_timm("vit", "augreg2_in21k_ft_in1k", _AUGREG_224, {"base": 85.1}),
    *_timm("vit", "augreg_in21k", _AUGREG_224, {"tiny": None, "small": None, "base": None, "large": None}),
    *_timm("deit", "fb_in1k", IN1K_224, {"tiny": 72.2, "small": 79.9, "base": 81.8}),
    *_timm("deit3", "fb_in1k", IN1K_224, {"small": 81.4, "base": 83.8}),
    *_timm("deit3", "fb_in22k_ft_in1k", IN1K_224, {"small": 83.1, "base": 85.7}),
    _transformers(
        "clip_vit_large_patch14.openai_336",
        "openai/clip-vit-large-patch14-336",
        partial(_plain, CLIPVisionConfig, 1024, 24, image_size=336, patch_size=14, projection_dim=768),
        _OPENAI_336,
        parameters=290_909_184,
        flops=366_033_858_560,
        licence="MIT",
    ),
    _transformers(
        "siglip_base_patch16.webli_224",
        "google/siglip-base-patch16-224",
        partial(_plain, SiglipVisionConfig, 768),
        Preprocessing(224, 224, *HALF),
        parameters=78_707_712,
        flops=32_049_217_536,
    ),
    _transformers(
        "siglip_so400m_patch14.webli_384",
        "google/siglip-so400m-patch14-384",
        _SO400M,
        Preprocessing(384, 384, *HALF),
        parameters=397_745_440,
        flops=641_801_428_992,
    ),
    _transformers(
        "siglip2_base_patch16.webli_224",
        "google/siglip2-base-patch16-224",
        partial(_plain, SiglipVisionConfig, 768),
        Preprocessing(224, 224, *HALF, interpolation="bilinear"),
        parameters=78_707_712,
        flops=32_049_217_536,
    ),
    _transformers(
        "siglip2_so400m_patch14.webli_384",
        "google/siglip2-so400m-patch14-384",
        _SO400M,
        Preprocessing(384, 384, *HALF, interpolation="bilinear"),
        parameters=397_745_440,
        flops=641_801_428_992,
    ),
    _transformers(
        "siglip2_base_patch16.webli_naflex_256",
        "google/siglip2-base-patch16-naflex",
        partial(_plain, Siglip2VisionConfig, 768),
        Preprocessing(256, 256, *HALF, interpolation="bilinear"),
        parameters=78_753_792,
        flops=42_379_247_616,
    ),
    *(
        _transformers(
            f"dinov2_{size}_patch14.lvd142m_224",
            f"facebook/dinov2-{size}",
            partial(_plain, Dinov2Config, width, image_size=518, patch_size=14),
            IN1K_224,
            parameters,
            flops,
        )
        for size, width, parameters, flops in (
            ("small", 384, 20_280_192, 11_236_164_096),
            ("base", 768, 79_488_768, 42_481_517_568),
        )
    ),
    *(
        _transformers(
            f"dinov2_{size}_patch14_reg4.lvd142m_224",
            f"facebook/dinov2-with-registers-{size}",
            partial(_plain, Dinov2WithRegistersConfig, width, image_size=518, patch_size=14),
            IN1K_224,
            parameters,
            flops,
        )
        for size, width, parameters, flops in (
            ("small", 384, 20_281_728, 11_426_886_144),
            ("base", 768, 79_491_840, 43_174_388_736),
        )
    ),
    *(
        _transformers(
            f"dinov3_{size}_patch16.lvd1689m_224",
            f"facebook/dinov3-vit{size[0]}16-pretrain-lvd1689m",
            partial(_plain, DINOv3ViTConfig, width, num_register_tokens=4),
            Preprocessing(224, 224, *IMAGENET, interpolation="bilinear"),
            parameters,
            flops,
            licence="DINOv3",
        )
        for size, width, parameters, flops in (
            ("small", 384, 19_820_544, 8_622_825_984),
            ("base", 768, 78_569_472, 32_894_862_336),
        )
    ),
]

__all__ = ["PLAIN_VIT_ENCODERS"]
