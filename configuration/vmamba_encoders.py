"""Published VMamba encoders (arXiv 2401.10166), tapped at the end of stage 3, before the downsampling to stage 4.

Accuracies, names of release files and sizes are those of https://github.com/MzeroMiko/VMamba.
"""

from functools import partial

from .configuration_ssm_vision import SSMVisionConfig
from .encoder_entry import IMAGENET, IN1K_224, NamedEncoder, Preprocessing, WeightSource

_COCO = Preprocessing(800, 1333, *IMAGENET, interpolation="bilinear", geometry="letterbox_corner")
_ADE20K = Preprocessing(512, 512, *IMAGENET, interpolation="bilinear", geometry="letterbox_corner")

_VMAMBA_RELEASES = "https://github.com/MzeroMiko/VMamba/releases/download/"
_VMAMBA_V2 = {  # variant: first width, blocks in stage 3, inner width over width, stochastic depth
    "tiny_s2l5": (96, 5, 2.0, 0.2),
    "tiny_s1l8": (96, 8, 1.0, 0.2),
    "small_s2l15": (96, 15, 2.0, 0.3),
    "small_s1l20": (96, 20, 1.0, 0.3),
    "base_s2l15": (128, 15, 2.0, 0.6),
    "base_s1l20": (128, 20, 1.0, 0.5),
}
_VMAMBA_V0 = {"tiny_v0": (96, 9, 0.2), "small_v0": (96, 27, 0.3), "base_v0": (128, 27, 0.6)}


def _vmamba(variant: str, image_size: int | list[int] = 224, output_norm: str = "parameter_free") -> SSMVisionConfig:
    """Sizes of the release; v0 has a gate, 16 states, a 4x4 stem and patch merging, and no MLP."""
    if variant in _VMAMBA_V0:
        width, blocks, drop_path = _VMAMBA_V0[variant]
        form = {"stem": "conv4", "downsample": "patch_merge", "mlp_ratio": 0.0, "ssm_ratio": 2.0, "d_state": 16}
        form |= {"gated": True, "conv_bias": True}
    else:
        width, blocks, ssm_ratio, drop_path = _VMAMBA_V2[variant]
        form = {"stem": "conv3x2", "downsample": "conv3", "mlp_ratio": 4.0, "ssm_ratio": ssm_ratio, "d_state": 1}
    return SSMVisionConfig(
        image_size=image_size,
        hidden_sizes=[width, 2 * width, 4 * width, 8 * width],
        depths=[2, 2, blocks, 2],
        drop_path_rate=drop_path,
        output_norm=output_norm,
        out_features=["stage3"],
        **form,
    )


def _vmamba_in1k(variant: str, file: str, top1: float, parameters: int, flops: int) -> NamedEncoder:
    return NamedEncoder(
        f"vmamba_{variant}.in1k_224",
        partial(_vmamba, variant),
        IN1K_224,
        parameters,
        flops,
        "MIT",
        WeightSource("vmamba", url=_VMAMBA_RELEASES + file),
        imagenet_top1=top1,
    )


def _vmamba_dense(name: str, preprocessing: Preprocessing, file: str, parameters: int, flops: int) -> NamedEncoder:
    """A detector's or segmenter's encoder: it holds a trained norm for the output of each stage."""
    variant = name.partition(".")[0]
    return NamedEncoder(
        f"vmamba_{name}",
        partial(_vmamba, variant, [preprocessing.height, preprocessing.width], "layernorm"),
        preprocessing,
        parameters,
        flops,
        "MIT",
        WeightSource("vmamba", url=_VMAMBA_RELEASES + file),
    )


_DET, _SEG = "%23v2det/mask_rcnn_vssm_fpn_coco_", "%23v2seg/upernet_vssm_4xb4-160k_ade20k-512x512_"

VMAMBA_ENCODERS = [
    _vmamba_in1k(
        "tiny_s2l5", "%23v2cls/vssm_tiny_0230_ckpt_epoch_262.pth", 82.5, parameters=11_834_304, flops=7_775_373_312
    ),
    _vmamba_in1k(
        "tiny_s1l8", "%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth", 82.6, parameters=14_374_272, flops=8_213_409_792
    ),
    _vmamba_in1k(
        "small_s2l15", "%23v2cls/vssm_small_0229_ckpt_epoch_222.pth", 83.6, parameters=31_276_224, flops=15_407_142_912
    ),
    _vmamba_in1k(
        "small_s1l20",
        "%23v2cls/vssm1_small_0229s_ckpt_epoch_240.pth",
        83.3,
        parameters=33_138_048,
        flops=15_567_003_648,
    ),
    _vmamba_in1k(
        "base_s2l15", "%23v2cls/vssm_base_0229_ckpt_epoch_237.pth", 83.9, parameters=55_400_704, flops=27_235_131_392
    ),
    _vmamba_in1k(
        "base_s1l20", "%23v2cls/vssm1_base_0229s_ckpt_epoch_225.pth", 83.8, parameters=58_763_776, flops=27_576_729_600
    ),
    _vmamba_in1k(
        "tiny_v0", "%23v0cls/vssmtiny_dp01_ckpt_epoch_292.pth", 82.2, parameters=12_028_320, flops=8_232_376_320
    ),
    _vmamba_in1k(
        "small_v0", "%23v0cls/vssmsmall_dp03_ckpt_epoch_238.pth", 83.5, parameters=33_552_288, flops=17_840_277_504
    ),
    _vmamba_in1k(
        "base_v0", "%23v0cls/vssmbase_dp06_ckpt_epoch_241.pth", 83.7, parameters=57_573_248, flops=29_464_551_424
    ),
    _vmamba_dense(
        "tiny_s2l5.coco_maskrcnn_1x", _COCO, _DET + "tiny_epoch_12.pth", parameters=11_835_072, flops=166_142_246_400
    ),
    _vmamba_dense(
        "tiny_s1l8.coco_maskrcnn_1x", _COCO, _DET + "tiny_s_epoch_12.pth", parameters=14_375_040, flops=175_611_456_000
    ),
    _vmamba_dense(
        "small_s2l15.coco_maskrcnn_1x", _COCO, _DET + "small_epoch_11.pth", parameters=31_276_992, flops=329_680_166_400
    ),
    _vmamba_dense(
        "base_s2l15.coco_maskrcnn_1x", _COCO, _DET + "base_epoch_11.pth", parameters=55_401_728, flops=582_779_545_600
    ),
    _vmamba_dense(
        "tiny_s2l5.coco_maskrcnn_3x",
        _COCO,
        _DET + "tiny_ms_3x_epoch_36.pth",
        parameters=11_835_072,
        flops=166_142_246_400,
    ),
    _vmamba_dense(
        "tiny_s1l8.coco_maskrcnn_3x",
        _COCO,
        _DET + "tiny_ms_3x_s_epoch_31.pth",
        parameters=14_375_040,
        flops=175_611_456_000,
    ),
    _vmamba_dense(
        "small_s2l15.coco_maskrcnn_3x",
        _COCO,
        _DET + "small_ms_3x_epoch_32.pth",
        parameters=31_276_992,
        flops=329_680_166_400,
    ),
    _vmamba_dense(
        "tiny_s2l5.ade20k_upernet_512",
        _ADE20K,
        _SEG + "tiny_iter_160000.pth",
        parameters=11_835_072,
        flops=40_622_358_528,
    ),
    _vmamba_dense(
        "tiny_s1l8.ade20k_upernet_512",
        _ADE20K,
        _SEG + "tiny_s_iter_160000.pth",
        parameters=14_375_040,
        flops=42_910_875_648,
    ),
    _vmamba_dense(
        "small_s2l15.ade20k_upernet_512",
        _ADE20K,
        _SEG + "small_iter_144000.pth",
        parameters=31_276_992,
        flops=80_494_460_928,
    ),
    _vmamba_dense(
        "base_s2l15.ade20k_upernet_512",
        _ADE20K,
        _SEG + "base_iter_160000.pth",
        parameters=55_401_728,
        flops=142_289_666_048,
    ),
]

__all__ = ["VMAMBA_ENCODERS"]
