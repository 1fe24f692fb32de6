"""Published ViTDet encoders (arXiv 2203.16527): Transformers' `VitDetBackbone`, tapped at its last block.

Sizes, window blocks, stochastic depth, pixels and file names are those of detectron2 (projects/ViTDet and
configs/common/models/mask_rcnn_vitdet.py), whose ViTDet reads RGB, unlike its other detectors. Every quarter of the
blocks ends with one that sees the whole picture; the others see windows of 14x14 cells. There is no norm after the last
block, and nothing of the detector's pyramid belongs to the encoder.

Any canvas of 16 pixels or more works, without the last rows and columns that do not fill a patch. At other sizes than
1024x1024 both the absolute and the global blocks' relative positions are interpolated, as detectron2 does it.

The weights were fine-tuned from MAE's. Neither the ViTDet page nor the files state a licence for them (detectron2's
code is Apache-2.0, MAE's release CC-BY-NC-4.0), hence NOASSERTION.
"""

from functools import partial

from transformers import VitDetConfig

from .encoder_entry import IMAGENET, NamedEncoder, Preprocessing, WeightSource

_COCO = Preprocessing(1024, 1024, *IMAGENET, interpolation="bilinear", geometry="letterbox_corner")
_ZOO = "https://dl.fbaipublicfiles.com/detectron2/ViTDet/COCO/mask_rcnn_vitdet_"


def _vitdet(width: int, depth: int, heads: int, drop_path: float) -> VitDetConfig:
    return VitDetConfig(  # type: ignore[call-arg]  # takes out_features by keyword
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        image_size=1024,
        drop_path_rate=drop_path,
        window_block_indices=[block for block in range(depth) if (block + 1) % (depth // 4)],
        window_size=14,
        use_relative_position_embeddings=True,
        out_features=[f"stage{depth}"],
    )


def _coco(
    size: str, width: int, depth: int, heads: int, drop_path: float, file: str, parameters: int, flops: int
) -> NamedEncoder:
    """A zoo file's name ends with the beginning of its checksum."""
    return NamedEncoder(
        f"vitdet_{size}_patch16.coco_maskrcnn_1024",
        partial(_vitdet, width, depth, heads, drop_path),
        _COCO,
        parameters,
        flops,
        "NOASSERTION",
        WeightSource("vitdet", url=_ZOO + file, sha256=file.removesuffix(".pkl")[-6:]),
    )


VITDET_ENCODERS = [
    _coco(
        "base", 768, 12, 12, 0.1, "b/f325346929/model_final_61ccd1.pkl", parameters=85_889_024, flops=965_634_883_584
    ),
    _coco(
        "large",
        1024,
        24,
        16,
        0.4,
        "l/f325599698/model_final_6146ed.pkl",
        parameters=303_432_704,
        flops=2_978_700_984_320,
    ),
    _coco(
        "huge",
        1280,
        32,
        16,
        0.5,
        "h/f329145471/model_final_7224f1.pkl",
        parameters=631_116_800,
        flops=5_953_566_638_080,
    ),
]

__all__ = ["VITDET_ENCODERS"]
