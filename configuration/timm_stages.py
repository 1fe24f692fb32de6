"""What timm says of a model: stages, widths, strides, rounding and the canvases that it takes, as a config.

Everything here needs timm. The config that comes out is complete: counting tokens with it needs none.
"""

import copy
import functools
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.utils import is_timm_available

from .configuration_tapped_timm import TappedTimmConfig

_CUTTING = ("FeatureListNet", "FeatureGetterNet")
"""timm's feature extractors that drop what lies after the tap; the default ones of some families keep it."""

_ANY_SIZE = ({"dynamic_img_size": True}, {"strict_img_size": False})
"""Arguments by which families of timm models take other picture sizes than their own: plain ones resize their position
embedding, windowed ones pad. The weights and the result at the model's own size stay the same."""


def require_timm() -> Any:
    """timm, imported; raises ImportError with what to install where it is absent."""
    if not is_timm_available():
        raise ImportError("A timm model was asked for, and timm is not installed: run `pip install ssm-vlm[timm]`.")
    import timm

    return timm


def create_timm_model(architecture: str, **arguments: Any) -> Any:
    """A timm model (`nn.Module`) without memory; `feature_cls` counts where there are to be `features_only`.

    Raises:
        ValueError: timm has no such model, or it takes no such argument.
    """
    timm = require_timm()
    if not timm.is_model(architecture):
        raise ValueError(f"timm {timm.__version__} has no model named {architecture!r}.")
    if not arguments.get("features_only"):
        arguments.pop("feature_cls", None)
    with torch.device("meta"):
        return timm.create_model(architecture, **arguments).eval()


def timm_picture_size(architecture: str) -> tuple[int, int]:
    """Height and width of the pictures that a timm model is for.

    Raises:
        ImportError: timm is not installed.
    """
    _, height, width = require_timm().get_pretrained_cfg_value(architecture, "input_size")
    return height, width


def _created_for_any_size(architecture: str, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The whole model, and the arguments that made it, with the one of `_ANY_SIZE` that it takes."""
    for more in _ANY_SIZE:
        try:
            return create_timm_model(architecture, **more | arguments), more | arguments
        except TypeError:
            continue
    return create_timm_model(architecture, **arguments), arguments


def _grids(backbone: nn.Module, channels: int, height: int, width: int) -> list[tuple[int, int]] | None:
    """Rows and columns of each feature map, or None for a canvas that the model does not take."""
    try:
        maps = backbone(torch.empty(1, channels, height, width, device="meta"))
    except (AssertionError, RuntimeError, ValueError, IndexError):
        return None
    last = str(getattr(backbone, "output_fmt", "NCHW")).endswith("NHWC")
    return [tuple(feature_map.shape[1:3] if last else feature_map.shape[2:]) for feature_map in maps]


def _rounding(before: list[int], after: list[int], stride: int) -> str | None:
    """How sizes `before` a stage become those `after` it; None where neither way fits."""
    ways = {"ceil": [-(-size // stride) for size in before], "floor": [size // stride for size in before]}
    return next((way for way, sizes in ways.items() if sizes == after), None)


def tapped_timm_config(
    architecture: str,
    tap: str | None = None,
    *,
    model_args: Mapping[str, Any] | None = None,
    apply_final_norm: bool = False,
) -> TappedTimmConfig:
    """Asks timm about a model: its stages, their widths and strides, which way they round, which canvases it takes.

    Nothing is allocated. The model is run without memory at a few sizes; where it takes canvases of other sizes only
    in some multiple, or not at all, the config says so.

    Args:
        architecture: timm's name, with or without the tag of its weights.
        tap: "stem", "stage1", ... of a hierarchical model, "block1", ... of a plain one. By default the third stage
            of four, or the second-to-last block.
        model_args: arguments of `timm.create_model`.
        apply_final_norm: apply a plain model's final norm to its features; they are un-normed otherwise.

    Raises:
        ImportError: timm is not installed.
        ValueError: no such model or tap, or one whose feature maps timm does not offer.
    """
    return copy.deepcopy(
        _ask_timm(architecture.split(".")[0], tap, json.dumps(dict(model_args or {})), apply_final_norm)
    )


@functools.cache
def _ask_timm(architecture: str, tap: str | None, model_args: str, apply_final_norm: bool) -> TappedTimmConfig:
    whole, arguments = _created_for_any_size(architecture, json.loads(model_args))
    infos = [dict(info) for info in getattr(whole, "feature_info", None) or []]
    if not infos:
        raise ValueError(f"timm offers no feature maps of {architecture!r}, so it cannot be tapped.")
    every = {"features_only": True, "out_indices": tuple(range(len(infos)))}
    try:
        backbone = create_timm_model(architecture, **every, **arguments)
        if type(backbone).__name__ not in _CUTTING and hasattr(whole, "prune_intermediate_layers"):
            arguments["feature_cls"] = "getter"
            backbone = create_timm_model(architecture, **every, **arguments)
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError, KeyError) as error:
        raise ValueError(
            f"timm offers no feature maps of {architecture!r}, so it cannot be tapped: {error}."
        ) from error
    channels, height, width = (int(size) for size in whole.pretrained_cfg["input_size"])
    if "img_size" in arguments:
        size = arguments["img_size"]
        height, width = size if isinstance(size, list | tuple) else (size, size)
    strides = [int(info["reduction"]) for info in infos]
    names = _stage_names(strides)
    tap = _default_tap(names) if tap is None else tap
    if tap not in names:
        choices = ", ".join(names) if len(names) < 8 else f"{names[0]} to {names[-1]}"
        raise ValueError(f"{architecture} has no tap {tap!r}; choose {choices}.")
    canvas, index = (channels, height, width), names.index(tap)
    grid = _grids(backbone, *canvas)
    exact = (height / strides[index], width / strides[index])
    if grid is None or any(abs(cells - size) >= 1 for cells, size in zip(grid[index], exact, strict=True)):
        raise ValueError(f"The feature maps of timm's {architecture!r} are not as large as timm says: {grid}.")
    multiple, only_size, steps = None, None, None
    if _sizes_taken(backbone, canvas, strides[-1]) == (None, None):
        steps = _steps(backbone, canvas, strides, any_size=True)
        multiple = None if steps else 1
    else:
        to_tap = create_timm_model(architecture, features_only=True, out_indices=(index,), **arguments)
        multiple, only_size = _sizes_taken(to_tap, canvas, strides[index])
    steps = steps or _steps(backbone, canvas, strides, any_size=False)
    if steps is None:
        raise ValueError(f"The feature maps of timm's {architecture!r} do not follow their strides {strides}.")
    return TappedTimmConfig(
        backbone=architecture,
        model_args=arguments,
        num_channels=channels,
        stage_names=names,
        stage_channels=[int(info["num_chs"]) for info in infos],
        stage_downsampling=steps,
        grid_multiple=multiple,
        only_size=only_size,
        apply_final_norm=apply_final_norm,
        out_features=[tap],
    )


def _stage_names(strides: list[int]) -> list[str]:
    if len(set(strides)) == 1:
        return [f"block{index}" for index in range(1, len(strides) + 1)]
    stem = ["stem"] if strides[0] == 2 else []
    return stem + [f"stage{index}" for index in range(1, len(strides) - len(stem) + 1)]


def _default_tap(names: list[str]) -> str:
    if names[0] == "block1":
        return names[max(len(names) - 2, 0)]
    return "stage3" if "stage3" in names else names[-1]


def _sizes_taken(backbone: nn.Module, canvas: tuple[int, int, int], stride: int) -> tuple[int | None, list[int] | None]:
    """(None, None) for a model that takes any canvas, else the multiple in cells at the tap, or its only size."""
    channels, height, width = canvas
    if all(_grids(backbone, channels, height + more, width + stride) for more in (1, stride // 2 + 1, stride)):
        return None, None
    for cells in range(1, height // stride + 1):
        if height % (cells * stride) == 0 and _grids(backbone, channels, height + cells * stride, width):
            return cells, None
    return None, [height, width]


def _steps(backbone: nn.Module, canvas: tuple[int, int, int], strides: list[int], any_size: bool) -> list[list] | None:
    """One step `[stride, rounding]` per stage, measured at sizes that have to be rounded where `any_size`.

    None for a model that rounds in neither way; it is then held to canvases that need no rounding.
    """
    channels, height, _ = canvas
    last = strides[-1]
    odd = (1, last // 4 + 1, last // 2 + 1, last - 1) if any_size else ()
    before, stride_before = sorted({height, *(height + more for more in odd)}), 1
    measured = []
    for size in before:
        grids = _grids(backbone, channels, size, size)
        if grids is None:
            return None
        measured.append(grids)
    steps = []
    for stage, stride in enumerate(strides):
        after, step = [grids[stage][0] for grids in measured], stride // stride_before
        rounding = _rounding(before, after, step)
        if rounding is None:
            return None
        steps.append([step, rounding])
        before, stride_before = after, stride
    return steps


__all__ = ["create_timm_model", "require_timm", "tapped_timm_config", "timm_picture_size"]
