"""Published VMamba encoders (arXiv 2401.10166), tapped at the end of stage 3, before the downsampling to stage 4.

Accuracies, names of release files and sizes are those of https://github.com/MzeroMiko/VMamba.
"""

from functools import partial
from typing import Any

from .configuration_ssm_vision import SSMVisionConfig
from .encoder_entry import IMAGENET, IN1K_224, NamedEncoder, Preprocessing, WeightSource

_COCO = Preprocessing(800, 1333, *IMAGENET, interpolation="bilinear", geometry="letterbox_corner")
_ADE20K = Preprocessing(512, 512, *IMAGENET, interpolation="bilinear", geometry="letterbox_corner")

_RELEASES = "https://github.com/MzeroMiko/VMamba/releases/download/"
_UPERNET_V2 = "%23v2seg/upernet_vssm_4xb4-160k_ade20k-512x512_"
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
        form: dict[str, Any] = {
            "stem": "conv4",
            "downsample": "patch_merge",
            "mlp_ratio": 0.0,
            "ssm_ratio": 2.0,
            "d_state": 16,
        }
        form |= {"gated": True, "conv_bias": True}
    else:
        width, blocks, ssm_ratio, drop_path = _VMAMBA_V2[variant]
        form = {"stem": "conv3x2", "downsample": "conv3", "mlp_ratio": 4.0, "ssm_ratio": ssm_ratio, "d_state": 1}
    form |= {"image_size": image_size, "output_norm": output_norm, "out_features": ["stage3"]}
    return SSMVisionConfig(
        hidden_sizes=[width, 2 * width, 4 * width, 8 * width],
        depths=[2, 2, blocks, 2],
        drop_path_rate=drop_path,
        **form,
    )


def _in1k(variant: str, file: str, top1: float, parameters: int, flops: int) -> NamedEncoder:
    return NamedEncoder(
        f"vmamba_{variant}.in1k_224",
        partial(_vmamba, variant),
        IN1K_224,
        parameters,
        flops,
        "MIT",
        WeightSource("vmamba", url=_RELEASES + file),
        imagenet_top1=top1,
    )


def _dense(variant: str, tag: str, file: str) -> NamedEncoder:
    """A detector's or segmenter's encoder: it holds a trained norm for the output of each stage."""
    preprocessing = _COCO if tag.startswith("coco") else _ADE20K
    parameters, *flops = _DENSE_COSTS[variant]
    return NamedEncoder(
        f"vmamba_{variant}.{tag}",
        partial(_vmamba, variant, [preprocessing.height, preprocessing.width], "layernorm"),
        preprocessing,
        parameters,
        flops[preprocessing is _ADE20K],
        "MIT",
        WeightSource("vmamba", url=_RELEASES + file),
    )


_DENSE_COSTS = {  # variant: parameters with the tap's norm, FLOPs at 800x1333, FLOPs at 512x512
    "tiny_v0": (12_029_088, 175_866_163_200, 43_009_966_080),
    "small_v0": (33_553_056, 381_749_760_000, 93_206_347_776),
    "base_v0": (57_574_272, 630_539_468_800, 153_937_248_256),
    "tiny_s2l5": (11_835_072, 166_142_246_400, 40_622_358_528),
    "tiny_s1l8": (14_375_040, 175_611_456_000, 42_910_875_648),
    "small_s2l15": (31_276_992, 329_680_166_400, 80_494_460_928),
    "base_s2l15": (55_401_728, 582_779_545_600, 142_289_666_048),
}

VMAMBA_ENCODERS = [
    _in1k("tiny_v0", "%23v0cls/vssmtiny_dp01_ckpt_epoch_292.pth", 82.2, 12_028_320, 8_232_376_320),
    _in1k("small_v0", "%23v0cls/vssmsmall_dp03_ckpt_epoch_238.pth", 83.5, 33_552_288, 17_840_277_504),
    _in1k("base_v0", "%23v0cls/vssmbase_dp06_ckpt_epoch_241.pth", 83.7, 57_573_248, 29_464_551_424),
    _in1k("tiny_s2l5", "%23v2cls/vssm_tiny_0230_ckpt_epoch_262.pth", 82.5, 11_834_304, 7_775_373_312),
    _in1k("tiny_s1l8", "%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth", 82.6, 14_374_272, 8_213_409_792),
    _in1k("small_s2l15", "%23v2cls/vssm_small_0229_ckpt_epoch_222.pth", 83.6, 31_276_224, 15_407_142_912),
    _in1k("small_s1l20", "%23v2cls/vssm1_small_0229s_ckpt_epoch_240.pth", 83.3, 33_138_048, 15_567_003_648),
    _in1k("base_s2l15", "%23v2cls/vssm_base_0229_ckpt_epoch_237.pth", 83.9, 55_400_704, 27_235_131_392),
    _in1k("base_s1l20", "%23v2cls/vssm1_base_0229s_ckpt_epoch_225.pth", 83.8, 58_763_776, 27_576_729_600),
    _dense("tiny_v0", "coco_maskrcnn_1x", "%23v0det/vssmtiny_mask_rcnn_swin_fpn_coco_epoch_12.pth"),
    _dense("small_v0", "coco_maskrcnn_1x", "%23v0det/vssmsmall_mask_rcnn_swin_fpn_coco_epoch_12.pth"),
    _dense("base_v0", "coco_maskrcnn_1x", "%23v0det/vssmbase_mask_rcnn_swin_fpn_coco_epoch_12.pth"),
    _dense("tiny_s2l5", "coco_maskrcnn_1x", "%23v2det/mask_rcnn_vssm_fpn_coco_tiny_epoch_12.pth"),
    _dense("tiny_s1l8", "coco_maskrcnn_1x", "%23v2det/mask_rcnn_vssm_fpn_coco_tiny_s_epoch_12.pth"),
    _dense("small_s2l15", "coco_maskrcnn_1x", "%23v2det/mask_rcnn_vssm_fpn_coco_small_epoch_11.pth"),
    _dense("base_s2l15", "coco_maskrcnn_1x", "%23v2det/mask_rcnn_vssm_fpn_coco_base_epoch_11.pth"),
    _dense("base_s2l15", "coco_maskrcnn_1x_bs8", "%23v2det/mask_rcnn_vssm_fpn_coco_base_epoch_12_bs8.pth"),
    _dense("tiny_v0", "coco_maskrcnn_3x", "%23v0det/vssmtiny_mask_rcnn_swin_fpn_coco_ms_3x_epoch_34.pth"),
    _dense("small_v0", "coco_maskrcnn_3x", "%23v0det/vssmsmall_mask_rcnn_swin_fpn_coco_ms_3x_epoch_34.pth"),
    _dense("tiny_s2l5", "coco_maskrcnn_3x", "%23v2det/mask_rcnn_vssm_fpn_coco_tiny_ms_3x_epoch_36.pth"),
    _dense("tiny_s1l8", "coco_maskrcnn_3x", "%23v2det/mask_rcnn_vssm_fpn_coco_tiny_ms_3x_s_epoch_31.pth"),
    _dense("small_s2l15", "coco_maskrcnn_3x", "%23v2det/mask_rcnn_vssm_fpn_coco_small_ms_3x_epoch_32.pth"),
    _dense("tiny_v0", "ade20k_upernet_512", "%23v0seg/vssmtiny_upernet_4xb4-160k_ade20k-512x512_iter_160000.pth"),
    _dense("small_v0", "ade20k_upernet_512", "%23v0seg/vssmsmall_upernet_4xb4-160k_ade20k-512x512_iter_160000.pth"),
    _dense("base_v0", "ade20k_upernet_512", "%23v0seg/vssmbase_upernet_4xb4-160k_ade20k-512x512_iter_128000.pth"),
    _dense("tiny_s2l5", "ade20k_upernet_512", _UPERNET_V2 + "tiny_iter_160000.pth"),
    _dense("tiny_s1l8", "ade20k_upernet_512", _UPERNET_V2 + "tiny_s_iter_160000.pth"),
    _dense("small_s2l15", "ade20k_upernet_512", _UPERNET_V2 + "small_iter_144000.pth"),
    _dense("base_s2l15", "ade20k_upernet_512", _UPERNET_V2 + "base_iter_160000.pth"),
]

__all__ = ["VMAMBA_ENCODERS"]
