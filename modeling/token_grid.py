"""How many tokens a picture becomes: the one place where encoder strides and their rounding are known.

Every stage that shrinks a feature map is one step `[stride, rounding]`. A padded 3x3 stride-2 convolution rounds up
("ceil"), a convolution whose kernel equals its stride drops what does not fit ("floor"). Pooling to a grid is the step
`[[rows, columns], "at_most"]`. The processor expands image placeholders with these numbers, the models check against
them and the tests hold every encoder to them. VMamba v2 at 800x1333 is 50x84 = 4200 tokens; the floor arithmetic of the
reference (50x83 = 4150) is wrong.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoBackbone

Downsampling = list[list]
"""Steps in the order they are applied, each `[stride: int, "ceil" | "floor"]` or `[[rows, columns], "at_most"]`."""

_STEPS: dict[str, Callable[[int, int], int]] = {
    "ceil": lambda size, stride: -(-size // stride),
    "floor": lambda size, stride: size // stride,
    "at_most": min,
}


def grid_size(height: int, width: int, downsampling: Sequence[Sequence]) -> tuple[int, int]:
    """Height and width, in cells, of what a `height` x `width` pixel canvas becomes.

    Args:
        height: canvas height in pixels.
        width: canvas width in pixels.
        downsampling: steps `[stride, "ceil" | "floor"]` or `[[rows, columns], "at_most"]`, in their order.

    Raises:
        ValueError: for a step that is none of these, or a canvas too small for one cell.
    """
    rows, columns = int(height), int(width)
    for step in downsampling:
        try:
            amount, kind = step
            shrink = _STEPS[kind]
            by_row, by_column = amount if kind == "at_most" else (amount, amount)
            valid = all(int(number) == number >= 1 for number in (by_row, by_column))
        except (TypeError, ValueError, KeyError):
            valid = False
        if not valid:
            raise ValueError(
                'A downsampling step must be [positive int, "ceil" | "floor"] or [[rows, columns], "at_most"], got '
                f"{step!r}."
            )
        rows, columns = shrink(rows, int(by_row)), shrink(columns, int(by_column))
    if rows < 1 or columns < 1:
        raise ValueError(
            f"A {height}x{width} pixel canvas gives a {rows}x{columns} grid, which holds no token; "
            f"downsampling {[list(step) for step in downsampling]} needs a larger canvas."
        )
    return rows, columns


def num_image_tokens(height: int, width: int, downsampling: Sequence[Sequence]) -> int:
    """Number of image tokens, rows times columns of `grid_size`, for a `height` x `width` pixel canvas."""
    rows, columns = grid_size(height, width, downsampling)
    return rows * columns


def _tap_stage(config: Any) -> int:
    """Index in `stage_names` of the deepest output, the tap; 0 is the stem."""
    return config.stage_names.index(config.out_features[-1])


def _ssm_vision(config: Any) -> Downsampling:
    stem = {"conv4": [[4, "floor"]], "conv3x2": [[2, "ceil"], [2, "ceil"]]}[config.stem]
    # Both downsamplings round up: "conv3" is padded, and "patch_merge" pads an odd map by one row or column.
    return stem + [[2, "ceil"] for _ in range(_tap_stage(config) - 1)]


def _mambavision(config: Any) -> Downsampling:
    # The stem's two convolutions and those between stages are padded; every second stage name lies behind one.
    return [[2, "ceil"] for _ in range(2 + _tap_stage(config) // 2)]


def _swin(config: Any) -> Downsampling:
    # Patch embedding and patch merging both pad to a multiple of their stride.
    return [[config.patch_size, "ceil"]] + [[2, "ceil"] for _ in range(_tap_stage(config) - 1)]


def _convnext(config: Any) -> Downsampling:
    # Stem and downsampling are convolutions whose kernel equals their stride, without padding.
    stem = getattr(config, "patch_size", 4)
    return [[stem, "floor"]] + [[2, "floor"] for _ in range(_tap_stage(config) - 1)]


def _resnet(config: Any) -> Downsampling:
    # Convolution and pooling of the stem are padded, and so are the convolutions that start a stage.
    first = 2 if config.downsample_in_first_stage else 1
    strides = [2, 2, first, 2, 2, 2]
    return [[stride, "ceil"] for stride in strides[: 2 + _tap_stage(config)] if stride > 1]


def _pvt_v2(config: Any) -> Downsampling:
    # Padded convolutions; there is no stem before the first stage.
    return [[stride, "ceil"] for stride in config.strides[: _tap_stage(config) + 1]]


def _patch(config: Any) -> Downsampling:
    return [[config.patch_size, "floor"]]


def _timm_backbone(config: Any) -> Downsampling:
    """Measured, since a timm config is only a name: one row more than four strides shows which way it rounds.

    A timm model that takes its own picture size only (an AssertionError) never has anything to round.
    """
    with torch.device("meta"):
        backbone = AutoBackbone.from_config(config).eval()
        stride = backbone._backbone.feature_info.reduction()[-1]
        try:
            rows = backbone(torch.empty(1, config.num_channels, 4 * stride + 1, 4 * stride)).feature_maps[-1].shape[2]
        except AssertionError:
            rows = 4
    return [[stride, "ceil" if rows == 5 else "floor"]]


def _vit_adapter(config: Any) -> Downsampling:
    # The canvas is filled up for the deepest level, and each level's map is cut to the cells that hold picture.
    return [[config.patch_size, "ceil"]]


DOWNSAMPLING: dict[str, Callable[[Any], Downsampling]] = {
    "ssm_vision": _ssm_vision,
    "mambavision": _mambavision,
    "hidden_state_backbone": _patch,
    "swin": _swin,
    "swinv2": _swin,
    "convnext": _convnext,
    "convnextv2": _convnext,
    "dinov3_convnext": _convnext,
    "pvt_v2": _pvt_v2,
    "resnet": _resnet,
    "dinov2": _patch,
    "dinov2_with_registers": _patch,
    "tapped_timm": lambda config: config.downsampling,
    "timm_backbone": _timm_backbone,
    "vitdet": _patch,
    "vit_adapter": _vit_adapter,
}
"""`model_type` of an encoder config -> its steps up to the tap. A new family of encoders adds one line here."""


def encoder_downsampling(config: Any) -> Downsampling:
    """Steps `[stride, "ceil" | "floor"]` from pixels to the tap of a Backbone config (its last `out_features`).

    Raises:
        ValueError: for a `model_type` whose stride arithmetic is not in `DOWNSAMPLING`.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in DOWNSAMPLING:
        raise ValueError(
            f"The stride arithmetic of encoder type {model_type!r} is not known: wrap a model with hidden states in "
            f'model_type "hidden_state_backbone", or add it to DOWNSAMPLING (known: {", ".join(sorted(DOWNSAMPLING))}).'
        )
    return DOWNSAMPLING[model_type](config)
