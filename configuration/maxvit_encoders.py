"""Published MaxViT encoders (arXiv 2204.01697): the weights that timm ported from the authors' release.

The tap is the output of stage 3 as it is: these models have no norm there. Attention windows have a fixed size, a
32nd of the picture's side, so at another size the canvas must be made of whole windows. Accuracies are those of timm's
results/results-imagenet.csv, at each entry's own size; mean and standard deviation those of each published
`config.json`: ImageNet's at 224 pixels without ImageNet-21k, 0.5 for all others (arXiv 2603.19209 took ImageNet's for
every model without ImageNet-21k).
"""

from functools import partial

from .configuration_tapped_timm import TappedTimmConfig
from .encoder_entry import HALF, IMAGENET, NamedEncoder, Preprocessing, WeightSource

_STAGES = ["stem", "stage1", "stage2", "stage3", "stage4"]
VARIANTS = {
    "tiny": ([64, 64, 128, 256, 512], [2, 2, 5, 2]),
    "small": ([64, 96, 192, 384, 768], [2, 2, 5, 2]),
    "base": ([64, 96, 192, 384, 768], [2, 6, 14, 2]),
    "large": ([128, 128, 256, 512, 1024], [2, 6, 14, 2]),
    "xlarge": ([192, 192, 384, 768, 1536], [2, 6, 14, 2]),
}
"""Variant -> widths of the stem and the four stages, blocks per stage. Heads have 32 channels."""


def _maxvit(variant: str, size: int) -> TappedTimmConfig:
    return TappedTimmConfig(
        backbone=f"maxvit_{variant}_tf_{size}",
        stage_names=_STAGES,
        stage_channels=VARIANTS[variant][0],
        # every convolution of these models pads like TensorFlow's "same", which rounds up
        stage_downsampling=[[2, "ceil"]] * 5,
        grid_multiple=size // 32,
        out_features=["stage3"],
    )


def _entry(
    variant: str, tag: str, size: int, top1: float | None = None, *, parameters: int, flops: int
) -> NamedEncoder:
    return NamedEncoder(
        f"maxvit_{variant}.{tag}_{size}",
        partial(_maxvit, variant, size),
        Preprocessing(size, size, *(IMAGENET if (tag, size) == ("in1k", 224) else HALF)),
        parameters,
        flops,
        "Apache-2.0",
        WeightSource("timm_maxvit", hub_id=f"timm/maxvit_{variant}_tf_{size}.{tag}"),
        imagenet_top1=top1,
    )


MAXVIT_ENCODERS = [
    _entry("tiny", "in1k", 224, 83.426, parameters=12_609_160, flops=9_311_918_304),
    _entry("tiny", "in1k", 384, 85.106, parameters=12_646_600, flops=29_358_814_464),
    _entry("tiny", "in1k", 512, 85.658, parameters=12_691_528, flops=56_454_500_352),
    _entry("small", "in1k", 224, 84.452, parameters=28_196_364, flops=19_168_822_608),
    _entry("small", "in1k", 384, 85.534, parameters=28_252_524, flops=59_320_487_808),
    _entry("small", "in1k", 512, 86.102, parameters=28_319_916, flops=111_849_363_456),
    _entry("base", "in1k", 224, 84.884, parameters=78_736_116, flops=43_835_200_944),
    _entry("base", "in1k", 384, 86.290, parameters=78_887_316, flops=134_886_455_424),
    _entry("base", "in1k", 512, 86.598, parameters=79_068_756, flops=252_857_149_440),
    _entry("large", "in1k", 224, 84.938, parameters=139_782_384, flops=79_931_175_488),
    _entry("large", "in1k", 384, 86.242, parameters=139_983_984, flops=242_978_027_008),
    _entry("large", "in1k", 512, 86.534, parameters=140_225_904, flops=449_369_759_744),
    _entry("base", "in21k", 224, parameters=78_736_116, flops=43_835_200_944),
    _entry("large", "in21k", 224, parameters=139_782_384, flops=79_931_175_488),
    _entry("xlarge", "in21k", 224, parameters=313_863_528, flops=178_559_576_928),
    _entry("base", "in21k_ft_in1k", 384, 87.930, parameters=78_887_316, flops=134_886_455_424),
    _entry("base", "in21k_ft_in1k", 512, 88.214, parameters=79_068_756, flops=252_857_149_440),
    _entry("large", "in21k_ft_in1k", 384, 87.994, parameters=139_983_984, flops=242_978_027_008),
    _entry("large", "in21k_ft_in1k", 512, 88.236, parameters=140_225_904, flops=449_369_759_744),
    _entry("xlarge", "in21k_ft_in1k", 384, 88.302, parameters=314_165_928, flops=536_840_057_088),
    _entry("xlarge", "in21k_ft_in1k", 512, 88.540, parameters=314_528_808, flops=980_486_000_640),
]

__all__ = ["MAXVIT_ENCODERS", "VARIANTS"]
