"""Image processor: any picture -> the pixels an encoder sees, with the geometry its boxes need.

There is one class for every machine: resizing is always Pillow's, as in the reference, so that a model sees the same
pixels whether or not torchvision is installed.
"""

import os
from collections.abc import Iterator
from contextlib import nullcontext
from http.client import HTTPException
from io import BytesIO
from typing import Any
from urllib.request import urlopen

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ChannelDimension, PILImageResampling
from transformers.processing_utils import ImagesKwargs, Unpack

from .geometry import Geometry, make_geometry, square_side

_TRANSPARENT_BACKGROUND = (255, 255, 255, 255)
_HIGH_DEPTH_MODES = {"I;16", "I;16L", "I;16B", "I;16N", "I", "F"}
_REMOTE = ("http://", "https://", "data:image/")
_SECONDS_TO_WAIT = 30
_SHOWN = 300  # characters of a URL or path; a data URL may have millions


class LlavaStyleImagesKwargs(ImagesKwargs, total=False):
    """What `LlavaStyleImageProcessor` takes beside the common arguments; see there."""

    geometry: str
    size_divisor: int | None
    crop_pct: float | None
    fill: list[int] | tuple[int, ...] | None
    downsampling: list | None
    return_geometry: bool
    return_image_sizes: bool | None


def load_image(source: Any, input_data_format: str | ChannelDimension | None = None) -> Image.Image:
    """Any picture as an upright RGB picture.

    EXIF rotation is applied and what is transparent becomes white. 16-bit pictures are scaled to 8 bits; grey, palette
    and CMYK pictures are converted. Arrays may be [H, W], [C, H, W] or [H, W, C] with 1 to 4 channels, of bool, 8- or
    16-bit integers, or floats in [0, 1]; where both ends could be channels, a numpy array is taken as [H, W, C] and a
    torch tensor as [C, H, W], unless `input_data_format` says otherwise.

    Args:
        source: a path, an http(s) or data URL, bytes of an image file, a PIL picture, or an array.
        input_data_format: `"channels_first"` or `"channels_last"`, for arrays.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the URL cannot be read.
        ValueError: the file cannot be decoded, or the array is not a picture.
        TypeError: `source` is none of the above.
    """
    if isinstance(source, np.ndarray | torch.Tensor):
        return _array_to_rgb(source, input_data_format)
    if isinstance(source, str) and source.startswith(_REMOTE):
        source = _download(source)
    if isinstance(source, Image.Image):
        what, opened = "the given picture", nullcontext(source)
    elif isinstance(source, bytes | bytearray):
        what, opened = "the given bytes", None
        source = BytesIO(source)
    elif isinstance(source, str | os.PathLike):
        what, opened = f"the image file {_shown(os.fspath(source))!r}", None
        if not os.path.isfile(source):
            raise FileNotFoundError(f"There is no image file {_shown(os.fspath(source))!r}.")
    else:
        raise TypeError(
            "A picture must be a path, URL, bytes, PIL picture, numpy array or torch tensor, got "
            f"{type(source).__name__}."
        )
    try:
        with opened or Image.open(source) as image:
            return _to_rgb(image)
    except UnidentifiedImageError:
        raise ValueError(f"Cannot decode {what}: it is not of an image format that Pillow reads.") from None
    except Exception as error:  # on broken data Pillow's decoders raise OSError, SyntaxError, RuntimeError and others
        raise ValueError(f"Cannot decode {what}: {str(error).rstrip('.')}.") from error


def _shown(text: str) -> str:
    """The text as messages show it."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _download(url: str) -> bytes:
    """What an http(s) or data URL holds."""
    try:
        with urlopen(url, timeout=_SECONDS_TO_WAIT) as response:
            return response.read()
    except (OSError, HTTPException, ValueError) as error:  # ValueError: no base64, no host
        raise OSError(f"Cannot read the picture at {_shown(url)!r}: {str(error).rstrip('.')}.") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode in _HIGH_DEPTH_MODES:
        return _array_to_rgb(np.asarray(image), None)
    if image.has_transparency_data:
        background = Image.new("RGBA", image.size, _TRANSPARENT_BACKGROUND)
        image = Image.alpha_composite(background, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _channels_last(array: np.ndarray, data_format: str | ChannelDimension | None, prefer_last: bool) -> np.ndarray:
    """[H, W], [C, H, W] or [H, W, C] -> [H, W, C]."""
    if array.ndim == 2:
        return array[:, :, None]
    if array.ndim != 3:
        raise ValueError(
            f"An array with shape {array.shape} is not a picture: expected [H, W], [C, H, W] or [H, W, C]."
        )
    if data_format is None:
        # Three and four are more telling than one: [1, 1, 3] is one RGB pixel.
        for channels in ((3, 4), (1, 2)):
            first, last = array.shape[0] in channels, array.shape[2] in channels
            if first or last:
                is_last = last and (prefer_last or not first)
                break
        else:
            raise ValueError(f"An array with shape {array.shape} is not a picture: neither end has 1 to 4 channels.")
    else:
        is_last = ChannelDimension(data_format) == ChannelDimension.LAST
    return array if is_last else np.moveaxis(array, 0, -1)


def _to_uint8(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    low, high = array.min(), array.max()
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if np.issubdtype(array.dtype, np.floating):
        if not (low >= 0 and high <= 1):  # also false for NaN
            raise ValueError(f"A picture of floats must lie in [0, 1], got values from {low:g} to {high:g}.")
        return np.round(array * 255).astype(np.uint8)
    limit = 255 if high <= 255 and array.dtype.itemsize != 2 else 65535
    if low < 0 or high > limit:
        raise ValueError(f"A picture of integers must lie in 0 to 65535, got values from {low} to {high}.")
    return np.round(array * (255 / limit)).astype(np.uint8)


def _array_to_rgb(array: Any, data_format: str | ChannelDimension | None) -> Image.Image:
    is_tensor = isinstance(array, torch.Tensor)
    if is_tensor:
        array = (array.float() if array.is_floating_point() else array).detach().cpu().numpy()
    if array.size == 0:
        raise ValueError(f"An array with shape {array.shape} is not a picture: it has no pixels.")
    array = _to_uint8(_channels_last(array, data_format, prefer_last=not is_tensor))
    modes = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
    if array.shape[2] not in modes:
        raise ValueError(f"A picture must have 1 to 4 channels, got {array.shape[2]}.")
    mode = modes[array.shape[2]]
    return _to_rgb(Image.fromarray(np.ascontiguousarray(array if mode != "L" else array[:, :, 0]), mode))


def _flatten(images: Any) -> Iterator[Any]:
    """Every picture of nested lists, in order; a 4-dimensional array is a list of pictures."""
    if isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4:
        for item in images:
            yield from _flatten(item)
    else:
        yield images


class LlavaStyleImageProcessor(PilBackend):
    """Paints each picture onto its canvas by a named geometry, normalises it and remembers the canvas size.

    Args:
        geometry (`str`): see `make_geometry`.
        size (`int` or `dict`): the canvas, `{"height": ..., "width": ...}`; an int is a square. `square_N` needs none.
        size_divisor (`int`, *optional*), crop_pct (`float`, *optional*): see `make_geometry`.
        resample (`int`): a `PIL.Image.Resampling`; bicubic by default.
        image_mean, image_std (`list[float]`): per channel, for pixels in [0, 1]; ImageNet's by default.
        fill (`list[int]`, *optional*): RGB, 0 to 255, of canvas the picture does not cover; where not given,
            `int(255 * image_mean)` as in the reference.
        downsampling (`list`): the encoder's steps from canvas to tokens, `[[stride, "ceil" | "floor"], ...]`; the
            processor counts image tokens with it.
        do_rescale, rescale_factor, do_normalize: as everywhere in Transformers.

    Calling it with pictures (see `load_image` for what counts as one, nested lists are flattened) returns
    `pixel_values` [n, 3, H, W], float32, smaller canvases padded right and bottom with 0 to the largest, where the
    canvases differ also `image_sizes` [n, 2], int64, each canvas's own height and width, and with
    `return_geometry=True` also `geometry`, a list of n `Geometry`. Where all canvases are of one size `pixel_values`
    says it, and the stock `LlavaForConditionalGeneration` would take `image_sizes` for Pixtral's;
    `return_image_sizes=True` returns them all the same, as `LlavaStyleProcessor` does, and False refuses canvases that
    differ.
    """

    size: Any  # a SizeDict with height and width
    size_divisor: int | None
    crop_pct: float | None
    valid_kwargs = LlavaStyleImagesKwargs
    model_input_names = ["pixel_values", "image_sizes"]

    geometry = "letterbox"
    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    downsampling = [[16, "floor"]]
    do_rescale = True
    do_normalize = True
    return_geometry = False
    return_image_sizes = None

    def __init__(self, **kwargs: Unpack[LlavaStyleImagesKwargs]):
        super().__init__(**kwargs)  # type: ignore[misc]  # annotated with the common arguments only
        self.get_geometry(1, 1)  # a bad combination is told here, not at the first picture

    def _standardize_kwargs(  # type: ignore[override]  # called by keyword, with the fields of `valid_kwargs`
        self, geometry: str = "letterbox", size: Any = None, **kwargs: Any
    ) -> dict:
        kwargs = super()._standardize_kwargs(size=size or square_side(geometry) or 224, **kwargs)
        if not (kwargs["size"].height and kwargs["size"].width):
            raise ValueError(f"size must be an int or have a height and a width, got {dict(kwargs['size'])}.")
        unread = [
            name for name in ("do_resize", "do_center_crop", "do_pad", "crop_size", "pad_size") if kwargs.get(name)
        ]
        if unread:
            raise ValueError(
                f"{', '.join(unread)} cannot be set: the geometry ({geometry!r}) decides resizing and padding."
            )
        return {"geometry": geometry, **kwargs}

    def get_geometry(self, raw_height: int, raw_width: int) -> Geometry:
        """The geometry of a picture of this raw size (after EXIF rotation), in pixels."""
        return make_geometry(
            self.geometry,
            raw_height,
            raw_width,
            (self.size.height, self.size.width),
            size_divisor=self.size_divisor,
            crop_pct=self.crop_pct,
        )

    def fetch_images(self, images: Any) -> list[Image.Image]:
        """Pictures of any kind and nesting -> a flat list of upright RGB pictures."""
        return [load_image(image) for image in _flatten(images)]

    def _preprocess_image_like_inputs(  # type: ignore[override]  # as `_standardize_kwargs`
        self,
        images: Any,
        *,
        geometry: str,
        size: Any,
        resample: int,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: tuple[float, ...],
        image_std: tuple[float, ...],
        fill: list[int] | None = None,
        size_divisor: int | None = None,
        crop_pct: float | None = None,
        input_data_format: str | ChannelDimension | None = None,
        return_geometry: bool = False,
        return_image_sizes: bool | None = None,
        return_tensors: str | None = None,
        **_: Any,
    ) -> BatchFeature:
        pictures = [load_image(image, input_data_format) for image in _flatten(images)]
        if not pictures:
            raise ValueError("No picture was given: expected at least one.")
        canvas_size = (size.height, size.width)
        geometries = [
            make_geometry(geometry, p.height, p.width, canvas_size, size_divisor=size_divisor, crop_pct=crop_pct)
            for p in pictures
        ]
        red, green, blue = [int(255 * mean) for mean in np.broadcast_to(image_mean, 3)] if fill is None else fill
        image_sizes = np.array([(g.canvas_height, g.canvas_width) for g in geometries], dtype=np.int64)
        # (x * rescale_factor - mean) / std as one product and one sum
        mean, std = (np.asarray(x, np.float32) for x in ((image_mean, image_std) if do_normalize else (0.0, 1.0)))
        scale, shift = np.float32(rescale_factor if do_rescale else 1.0) / std, mean / std
        pixel_values = np.zeros((len(pictures), 3, *image_sizes.max(axis=0)), dtype=np.float32)  # [n, 3, H, W]
        for row, picture, placed in zip(pixel_values, pictures, geometries, strict=True):
            canvas = np.asarray(placed.paint(picture, (red, green, blue), resample))  # [h, w, 3]
            row[:, : placed.canvas_height, : placed.canvas_width] = (canvas * scale - shift).transpose(2, 0, 1)
        features: dict[str, Any] = {"pixel_values": pixel_values}
        differ = bool((image_sizes != image_sizes[0]).any())
        if return_image_sizes or (differ and return_image_sizes is None):
            features["image_sizes"] = image_sizes
        elif differ:
            raise ValueError(
                f"return_image_sizes=False needs canvases of one size, but the geometry {geometry!r} made "
                f"{sorted(set(map(tuple, image_sizes.tolist())))} (height, width)."
            )
        if return_geometry:
            features["geometry"] = geometries
        return BatchFeature(features, tensor_type=return_tensors)
