"""How a picture became pixels, and so the frame its boxes live in.

A `Geometry` is the affine map from raw pixels to the canvas the encoder sees. The image processor paints through it and
every box (training target, prompt, score, drawing) goes through it, so the two cannot disagree. Sources: paper release,
resize strategies (letterbox, letterbox-square-N, detection, classification, resize-naive) and LLaVA's box labels.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

Box = tuple[float, float, float, float]  # x1, y1, x2, y2
_Fit = tuple[int, int, float, float, float, float]  # canvas height and width, then scale and offset, y before x
_STRIP_PIXELS = 2**24
_OUTSIDE_TOLERANCE = 1.0  # raw pixels; published boxes are rounded and stick out by up to one pixel


@dataclass(frozen=True)
class Geometry:
    """The map from raw pixels to canvas pixels: `canvas = raw * scale + offset`, per axis, in float64.

    Attributes:
        raw_height, raw_width: size of the upright raw picture, in pixels.
        canvas_height, canvas_width: size of what the encoder sees, in pixels.
        scale_y, scale_x: canvas pixels per raw pixel.
        offset_y, offset_x: where the raw picture's top left corner lies on the canvas, in canvas pixels; negative where
            the picture is cropped.
        name: the geometry it was made by, one of `geometry_names()`.
    """

    raw_height: int
    raw_width: int
    canvas_height: int
    canvas_width: int
    scale_y: float
    scale_x: float
    offset_y: float
    offset_x: float
    name: str

    def to_canvas(self, box: Sequence[float]) -> Box:
        """Raw pixel xyxy -> canvas pixel xyxy."""
        x1, y1, x2, y2 = box
        return (
            x1 * self.scale_x + self.offset_x,
            y1 * self.scale_y + self.offset_y,
            x2 * self.scale_x + self.offset_x,
            y2 * self.scale_y + self.offset_y,
        )

    def from_canvas(self, box: Sequence[float]) -> Box:
        """Canvas pixel xyxy -> raw pixel xyxy."""
        x1, y1, x2, y2 = box
        return (
            (x1 - self.offset_x) / self.scale_x,
            (y1 - self.offset_y) / self.scale_y,
            (x2 - self.offset_x) / self.scale_x,
            (y2 - self.offset_y) / self.scale_y,
        )

    def to_frame(self, box: Sequence[float], frame: str) -> Box:
        """Raw pixel xyxy -> normalised xyxy in a box frame.

        Args:
            box: x1, y1, x2, y2 in raw pixels of this picture.
            frame: `"centered_square"` (the paper's labels: the raw picture centred in a square of its longer side),
                `"canvas"` (the pixels as the encoder sees them) or `"raw"`.

        Returns:
            x1, y1, x2, y2, never clamped, so that `from_frame` gives the box back. All lie in [0, 1] for a box inside
            the picture, but for `"canvas"` where the geometry crops.

        Raises:
            ValueError: a box that lies outside its picture (by more than one pixel) or whose corners are swapped.
        """
        x1, y1, x2, y2 = box
        low, slack = -_OUTSIDE_TOLERANCE, _OUTSIDE_TOLERANCE
        inside = low <= x1 <= x2 <= self.raw_width + slack and low <= y1 <= y2 <= self.raw_height + slack
        if not inside:
            raise ValueError(
                f"The box {list(box)} does not lie in its picture of width {self.raw_width} and height "
                f"{self.raw_height}: expected x1, y1, x2, y2 in raw pixels with x1 <= x2 and y1 <= y2."
            )
        span, start = _frame(self, frame)
        x1, y1, x2, y2 = self.to_canvas(box) if frame == "canvas" else box
        return (
            (x1 + start[0]) / span[0],
            (y1 + start[1]) / span[1],
            (x2 + start[0]) / span[0],
            (y2 + start[1]) / span[1],
        )

    def from_frame(self, box: Sequence[float], frame: str) -> Box:
        """Normalised xyxy in a box frame (see `to_frame`) -> raw pixel xyxy; any box will do, say a model's answer."""
        span, start = _frame(self, frame)
        x1, y1, x2, y2 = box
        pixels = (
            x1 * span[0] - start[0],
            y1 * span[1] - start[1],
            x2 * span[0] - start[0],
            y2 * span[1] - start[1],
        )
        return self.from_canvas(pixels) if frame == "canvas" else pixels

    def paint(self, image: Image.Image, fill: tuple[int, int, int], resample: int) -> Image.Image:
        """Paint a raw RGB picture onto its canvas: [raw_height, raw_width] -> [canvas_height, canvas_width].

        Args:
            image: upright RGB picture of the raw size.
            fill: RGB colour, 0 to 255, of canvas that the picture does not cover.
            resample: a `PIL.Image.Resampling`.
        """
        if (image.height, image.width) != (self.raw_height, self.raw_width):
            raise ValueError(
                f"This geometry is for a picture of height {self.raw_height} and width {self.raw_width}, got height "
                f"{image.height} and width {image.width}."
            )
        return _kind(self.name).paint(self, image, fill, resample)


# Box frames: for each, the span (x, y) that 1.0 stands for and what is added before dividing, both in pixels.
def _centered_square(geometry: Geometry) -> tuple[tuple[float, float], tuple[float, float]]:
    side = max(geometry.raw_height, geometry.raw_width)
    return (side, side), ((side - geometry.raw_width) / 2, (side - geometry.raw_height) / 2)


BOX_FRAMES: dict[str, Callable[[Geometry], tuple[tuple[float, float], tuple[float, float]]]] = {
    "centered_square": _centered_square,
    "canvas": lambda geometry: ((geometry.canvas_width, geometry.canvas_height), (0.0, 0.0)),
    "raw": lambda geometry: ((geometry.raw_width, geometry.raw_height), (0.0, 0.0)),
}


def _frame(geometry: Geometry, frame: str) -> tuple[tuple[float, float], tuple[float, float]]:
    if frame not in BOX_FRAMES:
        raise ValueError(f"Unknown box frame {frame!r}: expected one of {', '.join(BOX_FRAMES)}.")
    return BOX_FRAMES[frame](geometry)


def _paint_by_padding(geometry: Geometry, image: Image.Image, fill: tuple, resample: int) -> Image.Image:
    """Pad the raw picture to a square, then resize: the border is blurred into the picture, as in the reference.

    Pillow resizes along x, then along y. Doing the two passes here, the first in strips, gives the same pixels without
    a square of 40000 x 40000 for a picture of 40000 x 3.
    """
    side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    narrow = Image.new("RGB", (geometry.canvas_width, side), fill)
    strip_height = max(1, _STRIP_PIXELS // side)
    for y in range(0, image.height, strip_height):
        strip = Image.new("RGB", (side, min(strip_height, image.height - y)), fill)
        strip.paste(image.crop((0, y, image.width, y + strip.height)), (left, 0))
        narrow.paste(strip.resize((geometry.canvas_width, strip.height), resample), (0, top + y))
    return narrow.resize((geometry.canvas_width, geometry.canvas_height), resample)


def _paint_by_pasting(geometry: Geometry, image: Image.Image, fill: tuple, resample: int) -> Image.Image:
    """Resize the raw picture, then paste it into the top left corner."""
    content_size = (round(image.width * geometry.scale_x), round(image.height * geometry.scale_y))
    canvas_size = (geometry.canvas_width, geometry.canvas_height)
    if image.size != content_size:
        image = image.resize(content_size, resample)
    if content_size == canvas_size:
        return image
    canvas = Image.new("RGB", canvas_size, fill)
    canvas.paste(image)
    return canvas


def _paint_by_cropping(geometry: Geometry, image: Image.Image, fill: tuple, resample: int) -> Image.Image:
    """Resize only what the canvas shows; the filters still see the pixels around it, as in resize-then-crop."""
    left, top, right, bottom = geometry.from_canvas((0, 0, geometry.canvas_width, geometry.canvas_height))
    window = (max(0.0, left), max(0.0, top), min(float(image.width), right), min(float(image.height), bottom))
    return image.resize((geometry.canvas_width, geometry.canvas_height), resample, box=window)


def _letterbox(height: int, width: int, canvas_height: int, canvas_width: int, **_) -> _Fit:
    # Like LLaVA's own padding, the odd pixel goes to the right and bottom, so the offset is half a raw pixel off the
    # centre there; the numbers here are where the pixels really are.
    if canvas_height != canvas_width:
        raise ValueError(f"The geometry 'letterbox' needs a square canvas, got size {canvas_height} x {canvas_width}.")
    side = max(height, width)
    scale_y = scale_x = canvas_height / side
    offset_y, offset_x = (side - height) // 2 * scale_y, (side - width) // 2 * scale_x
    return canvas_height, canvas_width, scale_y, scale_x, offset_y, offset_x


def _letterbox_corner(
    height: int, width: int, canvas_height: int, canvas_width: int, size_divisor: int | None = None, **_
) -> _Fit:
    if size_divisor is None:
        scale = min(1.0, canvas_height / height, canvas_width / width)
    else:  # detectors bound the longer and the shorter side, whichever way round the picture is
        short, long = sorted((canvas_height, canvas_width))
        scale = min(1.0, long / max(height, width), short / min(height, width))
    content_height, content_width = max(1, round(height * scale)), max(1, round(width * scale))
    if size_divisor is not None:
        canvas_height = -(-content_height // size_divisor) * size_divisor
        canvas_width = -(-content_width // size_divisor) * size_divisor
    return canvas_height, canvas_width, content_height / height, content_width / width, 0.0, 0.0


def _resize_crop(
    height: int, width: int, canvas_height: int, canvas_width: int, crop_pct: float | None = None, **_
) -> _Fit:
    crop_pct = crop_pct or 1.0
    cover_height, cover_width = round(canvas_height / crop_pct), round(canvas_width / crop_pct)
    # the side that needs the larger scale fits exactly, the other is rounded down (as torchvision's Resize does)
    content_height, content_width = cover_height, cover_width
    if cover_height * width >= cover_width * height:
        content_width = int(cover_height * width / height)
    else:
        content_height = int(cover_width * height / width)
    top, left = round((content_height - canvas_height) / 2), round((content_width - canvas_width) / 2)
    return canvas_height, canvas_width, content_height / height, content_width / width, -float(top), -float(left)


def _resize(height: int, width: int, canvas_height: int, canvas_width: int, **_) -> _Fit:
    return canvas_height, canvas_width, canvas_height / height, canvas_width / width, 0.0, 0.0


@dataclass(frozen=True)
class _Kind:
    fit: Callable[..., _Fit]  # raw and canvas size -> what a Geometry has beside them
    paint: Callable[[Geometry, Image.Image, tuple, int], Image.Image]
    options: frozenset[str] = frozenset()  # what it reads beside the size


_KINDS: dict[str, _Kind] = {
    "letterbox": _Kind(_letterbox, _paint_by_padding),
    "letterbox_corner": _Kind(_letterbox_corner, _paint_by_pasting, frozenset({"size_divisor"})),
    "square_N": _Kind(_letterbox_corner, _paint_by_pasting),
    "resize_crop": _Kind(_resize_crop, _paint_by_cropping, frozenset({"crop_pct"})),
    "resize": _Kind(_resize, _paint_by_pasting),
}
_SQUARE = re.compile(r"square_([1-9][0-9]*)")


def geometry_names() -> tuple[str, ...]:
    """The names `make_geometry` knows; `square_N` stands for `square_224`, `square_512`, ..."""
    return tuple(_KINDS)


def square_side(name: str) -> int | None:
    """The N of `square_N`, else None."""
    match = _SQUARE.fullmatch(name)
    return int(match[1]) if match else None


def _kind(name: str) -> _Kind:
    kind = _KINDS.get("square_N" if square_side(name) else name) if name != "square_N" else None
    if kind is None:
        raise ValueError(
            f"Unknown geometry {name!r}: expected one of {', '.join(geometry_names())}, where N is the side in pixels."
        )
    return kind


def make_geometry(
    name: str,
    raw_height: int,
    raw_width: int,
    size: int | tuple[int, int] | None = None,
    *,
    size_divisor: int | None = None,
    crop_pct: float | None = None,
) -> Geometry:
    """The geometry of one picture.

    | name | what happens |
    |---|---|
    | `letterbox` | padded to a square, picture centred, then resized to `size` (LLaVA's label frame) |
    | `letterbox_corner` | shrunk (never enlarged) to fit `size`, padded right and bottom to `size`, or, with |
    | | `size_divisor`, to the next multiple of it (`size` then bounds the longer and the shorter side) |
    | `square_N` | `letterbox_corner` to N x N |
    | `resize_crop` | resized to cover `size / crop_pct`, then the centre of `size` cut out |
    | `resize` | squashed to `size` |

    Args:
        name: one of the above.
        raw_height, raw_width: size of the upright raw picture, in pixels, at least 1.
        size: canvas (height, width) in pixels, or the side of a square; not needed for `square_N`.
        size_divisor: see `letterbox_corner`.
        crop_pct: see `resize_crop`; 1.0 where not given.

    Raises:
        ValueError: unknown name, a size that is missing or not positive, or an option this geometry does not read.
    """
    kind = _kind(name)
    side = square_side(name)
    size = side if size is None else size
    if size is None:
        raise ValueError(f"The geometry {name!r} needs a size: the canvas (height, width) in pixels.")
    height, width = (size, size) if isinstance(size, int) else size
    if side and (height, width) != (side, side):
        raise ValueError(f"The geometry {name!r} is {side} x {side} by name, got size {height} x {width}.")
    if min(height, width, raw_height, raw_width) < 1:
        raise ValueError(
            f"A picture of {raw_height} x {raw_width} on a canvas of {height} x {width} pixels is not possible: every "
            "side must be at least 1."
        )
    options: dict[str, Any] = {"size_divisor": size_divisor, "crop_pct": crop_pct}
    for option, value in options.items():
        if value is None:
            continue
        if option not in kind.options:
            raise ValueError(f"The geometry {name!r} does not read {option}: remove it or choose another geometry.")
        if value <= 0 or (option == "crop_pct" and value > 1):
            raise ValueError(f"{option} must be positive (and crop_pct at most 1), got {value}.")
    return Geometry(raw_height, raw_width, *kind.fit(raw_height, raw_width, height, width, **options), name)
