"""Published ViT-Adapter encoders (arXiv 2205.08534): UperNet segmenters of ADE20K, tapped at the deepest level.

Sizes, stochastic depth, pixels and file names are those of https://github.com/czczup/ViT-Adapter (segmentation/); two
of the AugReg models have pixels in [-1, 1] and positions for 384 pixels. The file of the tiny DeiT model is gone, so it
is not here. The paper of this library's study reads the deepest level, stride 32, after its BatchNorm: 256 tokens of a
512x512 canvas, although its tables say 1024, which is what tap "stage3" has.
"""

from functools import partial

from .configuration_vit_adapter import VitAdapterConfig
from .encoder_entry import HALF, IMAGENET, NamedEncoder, Preprocessing, WeightSource

_CENTRED = Preprocessing(512, 512, *IMAGENET, interpolation="bilinear", geometry="letterbox_corner")
_SYMMETRIC = Preprocessing(512, 512, *HALF, interpolation="bilinear", geometry="letterbox_corner")
_RELEASE = "https://github.com/czczup/ViT-Adapter/releases/download/v0.3.1/upernet_"
_SIZES = {  # size: width, depth, heads, heads of the deformable attention, its width, stochastic depth
    "tiny": (192, 12, 3, 6, 1.0, 0.1),
    "small": (384, 12, 6, 6, 1.0, 0.2),
    "base": (768, 12, 12, 12, 0.5, 0.3),
    "large": (1024, 24, 16, 16, 0.5, 0.4),
}


def _vit_adapter(size: str, pretrain_image_size: int) -> VitAdapterConfig:
    width, depth, heads, deform_heads, deform_ratio, drop_path = _SIZES[size]
    return VitAdapterConfig(
        pretrain_image_size=pretrain_image_size,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        deform_num_heads=deform_heads,
        deform_ratio=deform_ratio,
        drop_path_rate=drop_path,
        out_features=["stage4"],
    )


def _ade20k(
    size: str,
    start: str,
    pretrain_image_size: int,
    preprocessing: Preprocessing,
    file: str,
    parameters: int,
    flops: int,
) -> NamedEncoder:
    return NamedEncoder(
        f"vit_adapter_{size}.{start}_ade20k_upernet_512",
        partial(_vit_adapter, size, pretrain_image_size),
        preprocessing,
        parameters,
        flops,
        "Apache-2.0",
        WeightSource("vit_adapter", url=f"{_RELEASE}{start}_adapter_{size}_512_{file}"),
    )


VIT_ADAPTER_ENCODERS = [
    _ade20k("small", "deit", 224, _CENTRED, "160k_ade20k.pth", parameters=26_886_032, flops=93_951_197_184),
    _ade20k("base", "deit", 224, _CENTRED, "160k_ade20k.pth.tar", parameters=97_080_032, flops=271_685_713_920),
    _ade20k("tiny", "augreg", 224, _CENTRED, "160_ade20k.pth.tar", parameters=7_805_168, flops=37_595_037_696),
    _ade20k("base", "augreg", 384, _SYMMETRIC, "160k_ade20k.pth.tar", parameters=97_371_872, flops=271_685_713_920),
    _ade20k("large", "augreg", 384, _SYMMETRIC, "160k_ade20k.pth.tar", parameters=322_704_576, flops=816_583_016_448),
]

__all__ = ["VIT_ADAPTER_ENCODERS"]
