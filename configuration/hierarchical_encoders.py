"""Published Swin, ConvNeXt and PVT v2 encoders: Transformers' own backbones, cut after stage 3.

Without a fourth stage these classes have no downsampling after the third, so the tap comes before it, as VMamba's does.
Swin's and ConvNeXt's classes always norm their tap; classification files hold no such norm, so it has no parameters to
speak of (scale 1, shift 0, never trained). PVT v2 ends every stage with a norm of its own, which is trained. Accuracies
are those of the authors' repositories.
"""

from functools import partial

from transformers import ConvNextConfig, PreTrainedConfig, PvtV2Config, SwinConfig

from .configuration_tapped_timm import TappedTimmConfig
from .encoder_entry import IN1K_224, NamedEncoder, WeightSource
from .taps import tapped_config

_HIERA_STAGES = ["stage1", "stage2", "stage3", "stage4"]


def _hiera(size: str) -> TappedTimmConfig:
    """timm's: the Backbone of Transformers 5.23 leaves out the reordering of Hiera's tokens (see `taps.UNUSABLE`)."""
    return TappedTimmConfig(
        backbone=f"hiera_{size}_224",
        stage_names=_HIERA_STAGES,
        stage_channels=[96, 192, 384, 768],
        stage_downsampling=[[4, "ceil"], [2, "ceil"], [2, "ceil"], [2, "ceil"]],
        only_size=[224, 224],
        out_features=["stage3"],
    )


def _swin(width: int, depths: list[int], drop_path: float) -> PreTrainedConfig:
    heads = [width // 32 * 2**stage for stage in range(4)]
    return tapped_config(SwinConfig(embed_dim=width, depths=depths, num_heads=heads, drop_path_rate=drop_path))


def _convnext(width: int, depths: list[int], drop_path: float) -> PreTrainedConfig:
    widths = [width * 2**stage for stage in range(4)]
    whole = ConvNextConfig(hidden_sizes=widths, depths=depths, drop_path_rate=drop_path, layer_norm_eps=1e-6)
    return tapped_config(whole)


def _pvt_v2(depths: list[int]) -> PreTrainedConfig:
    return tapped_config(PvtV2Config(hidden_sizes=[64, 128, 320, 512], depths=depths))


def _swin_in1k(
    size: str, width: int, depths: list[int], drop_path: float, top1: float, parameters: int, flops: int
) -> NamedEncoder:
    """Microsoft's own release: the Hub's copy of the base model may be the one pretrained on ImageNet-22k."""
    url = "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
    return NamedEncoder(
        f"swin_{size}.in1k_224",
        partial(_swin, width, depths, drop_path),
        IN1K_224,
        parameters,
        flops,
        "MIT",
        WeightSource("swin", url=f"{url}swin_{size}_patch4_window7_224.pth"),
        imagenet_top1=top1,
    )


def _convnext_in1k(
    size: str, width: int, depths: list[int], drop_path: float, top1: float, parameters: int, flops: int
) -> NamedEncoder:
    return NamedEncoder(
        f"convnext_{size}.in1k_224",
        partial(_convnext, width, depths, drop_path),
        IN1K_224,
        parameters,
        flops,
        "Apache-2.0",
        WeightSource("convnext", hub_id=f"timm/convnext_{size}.fb_in1k"),
        imagenet_top1=top1,
    )


def _hiera_in1k(size: str, top1: float, parameters: int, flops: int) -> NamedEncoder:
    tag = "mae_in1k_ft_in1k"
    return NamedEncoder(
        f"hiera_{size}.{tag}_224",
        partial(_hiera, size),
        IN1K_224,
        parameters,
        flops,
        "CC-BY-NC-4.0",
        WeightSource("transformers", hub_id=f"timm/hiera_{size}_224.{tag}"),
        imagenet_top1=top1,
    )


def _pvt_v2_in1k(size: str, depths: list[int], top1: float, parameters: int, flops: int) -> NamedEncoder:
    return NamedEncoder(
        f"pvt_v2_{size}.in1k_224",
        partial(_pvt_v2, depths),
        IN1K_224,
        parameters,
        flops,
        "Apache-2.0",
        WeightSource("transformers", hub_id=f"OpenGVLab/pvt_v2_{size}"),
        imagenet_top1=top1,
    )


HIERARCHICAL_ENCODERS = [
    _swin_in1k("tiny", 96, [2, 2, 6, 2], 0.2, 81.2, parameters=12_152_010, flops=7_461_974_016),
    _swin_in1k("small", 96, [2, 2, 18, 2], 0.3, 83.2, parameters=33_469_914, flops=15_962_591_232),
    _swin_in1k("base", 128, [2, 2, 18, 2], 0.5, 83.5, parameters=59_437_688, flops=28_168_404_992),
    _convnext_in1k("tiny", 96, [3, 3, 9, 3], 0.1, 82.1, parameters=12_348_768, flops=7_395_591_168),
    _convnext_in1k("small", 96, [3, 3, 27, 3], 0.4, 83.1, parameters=33_983_328, flops=15_851_953_152),
    _convnext_in1k("base", 128, [3, 3, 27, 3], 0.5, 83.8, parameters=60_122_240, flops=28_020_887_552),
    _pvt_v2_in1k("b2", [3, 4, 6, 3], 82.0, parameters=13_854_144, flops=6_962_923_520),
    _pvt_v2_in1k("b3", [3, 4, 18, 3], 83.1, parameters=33_729_984, flops=12_704_061_440),
    _hiera_in1k("tiny", 82.8, parameters=13_553_760, flops=8_086_966_272),
    _hiera_in1k("small", 83.9, parameters=20_651_616, flops=11_097_526_272),
    _hiera_in1k("base", 84.5, parameters=30_080_640, flops=16_334_696_448),
]

__all__ = ["HIERARCHICAL_ENCODERS"]
