"""Published Swin and ConvNeXt encoders: Transformers' own backbones, cut after stage 3.

Without a fourth stage these classes have no downsampling after the third, so the tap comes before it, as VMamba's does.
Both classes always norm their tap; classification files hold no such norm, so it stays neutral (scale 1, shift 0).
Accuracies are those of the authors' repositories.
"""

from functools import partial

from transformers import ConvNextConfig, SwinConfig

from .encoder_entry import IN1K_224, NamedEncoder, WeightSource


def _cut_drop_path(rate: float, depths: list[int]) -> float:
    """The rate that gives each kept block the stochastic depth that it has in the whole model."""
    return rate * (sum(depths[:3]) - 1) / (sum(depths) - 1)


def _swin(width: int, depths: list[int], drop_path: float) -> SwinConfig:
    return SwinConfig(
        embed_dim=width,
        depths=depths[:3],
        num_heads=[width // 32, width // 16, width // 8],
        drop_path_rate=_cut_drop_path(drop_path, depths),
        out_features=["stage3"],
    )


def _convnext(width: int, depths: list[int], drop_path: float) -> ConvNextConfig:
    return ConvNextConfig(
        hidden_sizes=[width, 2 * width, 4 * width],
        depths=depths[:3],
        num_stages=3,
        drop_path_rate=_cut_drop_path(drop_path, depths),
        out_features=["stage3"],
    )


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
        WeightSource("transformers", hub_id=f"facebook/convnext-{size}-224"),
        imagenet_top1=top1,
    )


HIERARCHICAL_ENCODERS = [
    _swin_in1k("tiny", 96, [2, 2, 6, 2], 0.2, 81.2, parameters=12_152_010, flops=7_461_974_016),
    _swin_in1k("small", 96, [2, 2, 18, 2], 0.3, 83.2, parameters=33_469_914, flops=15_962_591_232),
    _swin_in1k("base", 128, [2, 2, 18, 2], 0.5, 83.5, parameters=59_437_688, flops=28_168_404_992),
    _convnext_in1k("tiny", 96, [3, 3, 9, 3], 0.1, 82.1, parameters=12_348_768, flops=7_395_591_168),
    _convnext_in1k("small", 96, [3, 3, 27, 3], 0.4, 83.1, parameters=33_983_328, flops=15_851_953_152),
    _convnext_in1k("base", 128, [3, 3, 27, 3], 0.5, 83.8, parameters=60_122_240, flops=28_020_887_552),
]

__all__ = ["HIERARCHICAL_ENCODERS"]
