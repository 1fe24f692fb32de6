"""Published MambaVision encoders (arXiv 2407.08083), each with two taps.

`NAME` is tapped at the end of the true third stage, behind its mixers and its attention, as VMamba is. What arXiv
2603.19209 calls "stage 3" is `NAME_before_mixers`, the input of that stage: it comes from the convolutions of stages 1
and 2 alone, and no scan and no attention has seen it. Its other tap, stage 4 behind the last norm, is `tap="stage4"`.

Sizes, accuracies (at each entry's own size) and the licence of the weights are those of
https://github.com/NVlabs/MambaVision; the Hub repositories name NVIDIA's one-way noncommercial licence (nvclv1) beside
it. Neither allows commercial use.
"""

from functools import partial

from .configuration_mambavision import MambaVisionConfig
from .encoder_entry import IMAGENET, NamedEncoder, Preprocessing, WeightSource

_VARIANTS = {  # widths of the stem and stage 1, blocks per stage, heads of stages 3 and 4, stochastic depth, LayerScale
    "tiny": (32, 80, [1, 3, 8, 4], [8, 16], 0.2, None),
    "tiny2": (32, 80, [1, 3, 11, 4], [8, 16], 0.2, None),
    "small": (64, 96, [3, 3, 7, 5], [8, 16], 0.2, None),
    "base": (64, 128, [3, 3, 10, 5], [8, 16], 0.3, 1e-5),
    "large": (64, 196, [3, 3, 10, 5], [16, 32], 0.3, 1e-5),
    "large2": (64, 196, [3, 3, 12, 5], [16, 32], 0.3, 1e-5),
    "large3": (64, 256, [3, 3, 20, 10], [16, 32], 0.3, 1e-5),
}
_TRUE_STAGE_3, _BEFORE_MIXERS = "stage3", "stage2_downsampled"


def _mambavision(variant: str, size: int, tap: str) -> MambaVisionConfig:
    """Windows are as large as the whole map of their stage at the size of training."""
    stem_width, width, depths, heads, drop_path, layer_scale = _VARIANTS[variant]
    return MambaVisionConfig(
        image_size=size,
        stem_width=stem_width,
        hidden_sizes=[width, 2 * width, 4 * width, 8 * width],
        depths=depths,
        num_attention_heads=heads,
        window_sizes=[size // 16, size // 32],
        drop_path_rate=drop_path,
        layer_scale=layer_scale,
        out_features=[tap],
    )


def _both_taps(
    variant: str, tag: str, size: int, repository: str, top1: float, *costs: tuple[int, int]
) -> list[NamedEncoder]:
    """Two entries; `costs` are parameters and operations at the true third stage, and before its mixers."""
    return [
        NamedEncoder(
            f"mambavision_{variant}.{tag}_{size}{suffix}",
            partial(_mambavision, variant, size, tap),
            Preprocessing(size, size, *IMAGENET),
            parameters,
            flops,
            "CC-BY-NC-SA-4.0",
            WeightSource("mambavision", hub_id=f"nvidia/MambaVision-{repository}"),
            imagenet_top1=top1,
        )
        for (suffix, tap), (parameters, flops) in zip(
            (("", _TRUE_STAGE_3), ("_before_mixers", _BEFORE_MIXERS)), costs, strict=True
        )
    ]


MAMBAVISION_ENCODERS = [
    *_both_taps("tiny", "in1k", 224, "T-1K", 82.3, (11_186_528, 7_171_505_152), (2_101_088, 3_417_587_712)),
    *_both_taps("tiny2", "in1k", 224, "T2-1K", 82.7, (14_496_288, 8_517_601_792), (2_101_088, 3_417_587_712)),
    *_both_taps("small", "in1k", 224, "S-1K", 83.3, (14_677_184, 11_755_333_632), (3_380_288, 7_153_090_560)),
    *_both_taps("base", "in1k", 224, "B-1K", 84.2, (35_006_272, 24_287_492_096), (5_980_992, 12_528_746_496)),
    *_both_taps("large", "in1k", 224, "L-1K", 85.0, (81_924_368, 56_168_974_400), (13_955_488, 28_942_018_560)),
    *_both_taps("large2", "in1k", 224, "L2-1K", 85.3, (95_518_144, 61_614_365_568), (13_955_488, 28_942_018_560)),
    *_both_taps("base", "in21k_ft_in1k", 224, "B-21K", 84.9, (35_006_272, 24_287_492_096), (5_980_992, 12_528_746_496)),
    *_both_taps(
        "large", "in21k_ft_in1k", 224, "L-21K", 86.1, (81_924_368, 56_168_974_400), (13_955_488, 28_942_018_560)
    ),
    *_both_taps(
        "large2", "in21k_ft_in1k", 512, "L2-512-21K", 87.3, (95_518_144, 337_857_183_744), (13_955_488, 151_207_280_640)
    ),
    *_both_taps(
        "large3", "in21k_ft_in1k", 256, "L3-256-21K", 87.3, (255_528_768, 185_364_643_840), (23_756_608, 64_078_479_360)
    ),
    *_both_taps(
        "large3",
        "in21k_ft_in1k",
        512,
        "L3-512-21K",
        88.1,
        (255_528_768, 773_670_830_080),
        (23_756_608, 256_313_917_440),
    ),
]

__all__ = ["MAMBAVISION_ENCODERS"]
