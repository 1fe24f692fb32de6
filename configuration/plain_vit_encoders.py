"""Published plain vision transformers, tapped at the second-to-last block without norm, as the paper taps its ViTs.

Accuracies: AugReg as measured in timm's results/results-imagenet.csv, DeiT as in its repository.
"""

from functools import partial

from transformers import CLIPVisionConfig, Dinov2Config, SiglipVisionConfig, ViTConfig

from .configuration_hidden_state_backbone import HiddenStateBackboneConfig
from .encoder_entry import HALF, IN1K_224, NamedEncoder, Preprocessing, WeightSource

_AUGREG_224 = Preprocessing(224, 224, *HALF)
_OPENAI_336 = Preprocessing(
    336, 336, mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)
)


def _vit(width: int) -> HiddenStateBackboneConfig:
    """timm's ViT and DeiT, patch 16, 12 blocks; heads of 64 channels."""
    return HiddenStateBackboneConfig(
        vision_config=ViTConfig(
            hidden_size=width,
            num_hidden_layers=12,
            num_attention_heads=width // 64,
            intermediate_size=4 * width,
            layer_norm_eps=1e-6,
        )
    )


def _timm_vit(
    name: str, hub_id: str, width: int, preprocessing: Preprocessing, top1: float, parameters: int, flops: int
) -> NamedEncoder:
    return NamedEncoder(
        name,
        partial(_vit, width),
        preprocessing,
        parameters,
        flops,
        "Apache-2.0",
        WeightSource("timm_vit", hub_id=hub_id),
        imagenet_top1=top1,
    )


def _clip_large() -> HiddenStateBackboneConfig:
    return HiddenStateBackboneConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
            image_size=336,
            patch_size=14,
        )
    )


def _siglip(width: int, depth: int, heads: int, mlp_width: int, patch: int, size: int) -> HiddenStateBackboneConfig:
    return HiddenStateBackboneConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=mlp_width,
            image_size=size,
            patch_size=patch,
        )
    )


def _dinov2(width: int) -> HiddenStateBackboneConfig:
    return HiddenStateBackboneConfig(
        vision_config=Dinov2Config(
            hidden_size=width, num_hidden_layers=12, num_attention_heads=width // 64, image_size=518, patch_size=14
        )
    )


PLAIN_VIT_ENCODERS = [
    _timm_vit(
        "vit_small_patch16.augreg_in1k_224",
        "timm/vit_small_patch16_224.augreg_in1k",
        384,
        _AUGREG_224,
        78.8,
        parameters=19_890_432,
        flops=8_440_214_016,
    ),
    _timm_vit(
        "vit_base_patch16.augreg_in1k_224",
        "timm/vit_base_patch16_224.augreg_in1k",
        768,
        _AUGREG_224,
        79.2,
        parameters=78_709_248,
        flops=32_218_211_328,
    ),
    _timm_vit(
        "deit_tiny_patch16.fb_in1k_224",
        "timm/deit_tiny_patch16_224.fb_in1k",
        192,
        IN1K_224,
        72.2,
        parameters=5_079_168,
        flops=2_302_884_096,
    ),
    _timm_vit(
        "deit_small_patch16.fb_in1k_224",
        "timm/deit_small_patch16_224.fb_in1k",
        384,
        IN1K_224,
        79.9,
        parameters=19_890_432,
        flops=8_440_214_016,
    ),
    _timm_vit(
        "deit_base_patch16.fb_in1k_224",
        "timm/deit_base_patch16_224.fb_in1k",
        768,
        IN1K_224,
        81.8,
        parameters=78_709_248,
        flops=32_218_211_328,
    ),
    NamedEncoder(
        "clip_vit_large_patch14.openai_336",
        _clip_large,
        _OPENAI_336,
        parameters=290_909_184,
        flops=366_033_858_560,
        licence="MIT",
        weights=WeightSource("transformers", hub_id="openai/clip-vit-large-patch14-336"),
    ),
    NamedEncoder(
        "siglip_base_patch16.webli_224",
        partial(_siglip, 768, 12, 12, 3072, patch=16, size=224),
        Preprocessing(224, 224, *HALF),
        parameters=78_707_712,
        flops=32_049_217_536,
        licence="Apache-2.0",
        weights=WeightSource("transformers", hub_id="google/siglip-base-patch16-224"),
    ),
    NamedEncoder(
        "siglip_so400m_patch14.webli_384",
        partial(_siglip, 1152, 27, 16, 4304, patch=14, size=384),
        Preprocessing(384, 384, *HALF),
        parameters=397_745_440,
        flops=641_801_428_992,
        licence="Apache-2.0",
        weights=WeightSource("transformers", hub_id="google/siglip-so400m-patch14-384"),
    ),
    NamedEncoder(
        "dinov2_small_patch14.lvd142m_224",
        partial(_dinov2, 384),
        IN1K_224,
        parameters=20_280_192,
        flops=11_236_164_096,
        licence="Apache-2.0",
        weights=WeightSource("transformers", hub_id="facebook/dinov2-small"),
    ),
    NamedEncoder(
        "dinov2_base_patch14.lvd142m_224",
        partial(_dinov2, 768),
        IN1K_224,
        parameters=79_488_768,
        flops=42_481_517_568,
        licence="Apache-2.0",
        weights=WeightSource("transformers", hub_id="facebook/dinov2-base"),
    ),
]

__all__ = ["PLAIN_VIT_ENCODERS"]
