"""How pictures become pixels for an encoder: from the table, or from what was saved beside the model."""

from os import PathLike
from typing import Any

from PIL.Image import Resampling
from transformers import AutoImageProcessor, PreTrainedConfig

from ..configuration.named_encoders import ENCODERS, get_named_encoder
from ..configuration.timm_stages import timm_picture_size
from .image_processing_llava_style import LlavaStyleImageProcessor
from .token_grid import encoder_downsampling


def image_processor_arguments(name: str) -> dict[str, Any]:
    """Arguments of `LlavaStyleImageProcessor` for a named encoder: its preprocessing and its token arithmetic."""
    encoder = get_named_encoder(name)
    preprocessing = encoder.preprocessing
    return {
        "geometry": preprocessing.geometry,
        "size": {"height": preprocessing.height, "width": preprocessing.width},
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
        "resample": Resampling[preprocessing.interpolation.upper()],
        "downsampling": encoder_downsampling(encoder.config()),
    }


def picture_size(config: Any) -> tuple[int, int] | None:
    """Height and width of the pictures that a whole model is for, where its config says so; timm's, timm knows."""
    size = getattr(config, "image_size", None)
    if config.model_type == "timm_wrapper":
        size = (config.model_args or {}).get("img_size") or timm_picture_size(config.architecture)
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def encoder_image_processor(
    name_or_dir: str | PathLike, config: PreTrainedConfig, size: tuple[int, int] | None = None
) -> LlavaStyleImageProcessor:
    """The image processor of an encoder as `load_encoder` takes it.

    A stock image processor gives its mean, standard deviation, interpolation and picture size, that of its centre crop
    where it has one; pictures are letterboxed instead of cropped, so that boxes keep their frame.

    Args:
        name_or_dir: exact name in `ENCODERS`, or a folder or Hub id with a saved image processor.
        config: Backbone config of the encoder, tapped; it decides the number of tokens.
        size: height and width of the canvas, where it is not the one that the table has for the name.

    Raises:
        OSError: no image processor is saved there.
        ValueError: one that does not say which size pictures have.
    """
    downsampling = encoder_downsampling(config)
    if name_or_dir in ENCODERS:
        arguments = image_processor_arguments(str(name_or_dir)) | {"downsampling": downsampling}
        asked = arguments["size"] if size is None else dict(zip(("height", "width"), size, strict=True))
        return LlavaStyleImageProcessor(**arguments | {"size": _canvas(asked, config)})
    try:
        saved = AutoImageProcessor.from_pretrained(name_or_dir)
    except (OSError, ValueError, ImportError) as error:
        raise OSError(
            f"{str(name_or_dir)!r} holds no image processor that can be read, so it is not known how pictures become "
            "pixels for it: save one beside the model, such as ssm_vlm.LlavaStyleImageProcessor(size=224, "
            "image_mean=..., image_std=...).save_pretrained(FOLDER)."
        ) from error
    if isinstance(saved, LlavaStyleImageProcessor):
        return LlavaStyleImageProcessor(**saved.to_dict() | {"downsampling": downsampling})
    return LlavaStyleImageProcessor(**_arguments_of_stock(saved.to_dict(), str(name_or_dir)), downsampling=downsampling)


def _canvas(size: dict[str, int], config: PreTrainedConfig) -> dict[str, int]:
    """The next larger size that a timm model with fixed windows takes, or its only one; that of any other as it is."""
    only, multiple = getattr(config, "only_size", None), getattr(config, "canvas_multiple", None) or 1
    if only:
        return dict(zip(("height", "width"), only, strict=True))
    return {side: length + -length % multiple for side, length in size.items()}


def _arguments_of_timm(data: dict[str, Any]) -> dict[str, Any]:
    _, height, width = data["input_size"]
    return {
        "geometry": "letterbox" if height == width else "letterbox_corner",
        "size": {"height": height, "width": width},
        "image_mean": list(data["mean"]),
        "image_std": list(data["std"]),
        "resample": Resampling[data["interpolation"].upper()],
    }


def _arguments_of_stock(stock: dict[str, Any], where: str) -> dict[str, Any]:
    if "data_config" in stock:
        return _arguments_of_timm(stock["data_config"])
    side = stock.get("crop_size") if stock.get("do_center_crop") else None
    side = side or stock.get("size") or {}
    side = {"height": side, "width": side} if isinstance(side, int) else dict(side)
    height = side.get("height") or side.get("shortest_edge") or side.get("longest_edge")
    width = side.get("width") or height
    if not height:
        raise ValueError(
            f"The image processor in {where!r} ({stock.get('image_processor_type')}) does not say how large pictures "
            "are: give image_size and geometry in a LlavaStyleImageProcessor saved in its place."
        )
    normalised = stock.get("do_normalize", True) and stock.get("image_mean") is not None
    rescaled = {key: stock[key] for key in ("do_rescale", "rescale_factor") if stock.get(key) is not None}
    return rescaled | {
        "geometry": "letterbox" if height == width else "letterbox_corner",
        "size": {"height": height, "width": width},
        "image_mean": list(stock["image_mean"]) if normalised else [0.0, 0.0, 0.0],
        "image_std": list(stock["image_std"]) if normalised else [1.0, 1.0, 1.0],
        "resample": stock.get("resample", Resampling.BICUBIC),
    }


__all__ = ["encoder_image_processor", "image_processor_arguments", "picture_size"]
