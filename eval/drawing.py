"""Boxes with labels on pictures, for reports and for the `chat` command.

Boxes are in raw pixels of the picture: a model's normalised answer becomes that by `Geometry.from_frame`. Small
pictures are enlarged by whole pixels first, so that lines and labels stay thin beside what they mark.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from ..modeling.geometry import make_geometry

Colour = tuple[int, int, int]

TRUE_COLOUR: Colour = (60, 220, 90)
PREDICTED_COLOUR: Colour = (255, 70, 215)
_HALO: Colour = (0, 0, 0)
_FONT_WITH_MORE_LETTERS = "DejaVuSans.ttf"  # where the system has it; Pillow's own font knows little beyond ASCII


@dataclass(frozen=True)
class LabelledBox:
    """A box to draw.

    Attributes:
        box: x1, y1, x2, y2 in raw pixels of the picture; what lies outside the picture is drawn at its edge.
        label: short text at a corner of the box; "" for none.
        colour: red, green and blue, 0 to 255.
        dashed: for predictions, so that they differ from true boxes by more than their colour.
    """

    box: Sequence[float]
    label: str = ""
    colour: Colour = TRUE_COLOUR
    dashed: bool = False


def draw_box(
    picture: Image.Image, box_xyxy_raw_pixels: Sequence[float], label: str = "", colour: Colour = PREDICTED_COLOUR
) -> Image.Image:
    """`draw_boxes` with one solid box."""
    return draw_boxes(picture, [LabelledBox(box_xyxy_raw_pixels, label, colour)])


def draw_boxes(
    picture: Image.Image,
    boxes: Sequence[LabelledBox],
    *,
    enlarge_to: int = 448,
    shrink_to: int | None = None,
) -> Image.Image:
    """Draws boxes and their labels on a copy of a picture.

    Args:
        picture: upright, of any mode.
        boxes: drawn in this order, labels last and apart from each other where there is room.
        enlarge_to: a smaller picture is enlarged by the largest whole factor that keeps its longer side within this
            many pixels.
        shrink_to: a larger picture is shrunk until its longer side has this many pixels; None never shrinks.

    Returns:
        An RGB picture, [raw height * scale, raw width * scale].

    Raises:
        ValueError: a box that is not four finite numbers with x1 <= x2 and y1 <= y2.
    """
    for labelled in boxes:
        _check(labelled.box)
    size = drawn_size(picture, enlarge_to, shrink_to)
    geometry = make_geometry("resize", picture.height, picture.width, size)
    resample = Image.Resampling.NEAREST if size[0] >= picture.height else Image.Resampling.LANCZOS
    canvas = geometry.paint(picture.convert("RGB"), (0, 0, 0), resample)

    pen = ImageDraw.Draw(canvas)
    width = max(2, round(max(size) / 240))
    corners = [_inside(geometry.to_canvas(labelled.box), canvas.size) for labelled in boxes]
    for labelled, place in zip(boxes, corners, strict=True):
        _outline(pen, place, labelled, width)
    taken: list[tuple[float, float, float, float]] = []
    for labelled, place in zip(boxes, corners, strict=True):
        if labelled.label:
            taken.append(_label(pen, place, labelled, canvas.size, width, taken))
    return canvas


def drawn_size(picture: Image.Image, enlarge_to: int = 448, shrink_to: int | None = None) -> tuple[int, int]:
    """(height, width) in pixels of what `draw_boxes` gives."""
    longest = max(picture.size)
    scale: float = max(1, enlarge_to // longest)
    if shrink_to is not None and longest > shrink_to:
        scale = shrink_to / longest
    return max(1, round(picture.height * scale)), max(1, round(picture.width * scale))


@lru_cache
def font(size: int, ascii_only: bool = True) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, the same on every machine; for letters beyond ASCII a larger one, where there is one."""
    if not ascii_only:
        try:
            return ImageFont.truetype(_FONT_WITH_MORE_LETTERS, size)
        except OSError:
            pass
    return ImageFont.load_default(size)


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font that has the letters of `text`, if there is one."""
    return font(size, text.isascii())


def text_width(text: str, size: int) -> float:
    """Pixels that one line of text takes."""
    return font_for(text, size).getlength(text)


def shorten(text: str, width: float, size: int) -> str:
    """`text` on one line of at most `width` pixels, its end cut off where it is longer."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if text_width(text, size) <= width:
        return text
    longest = 0
    for step in (256, 64, 16, 4, 1):
        while longest + step <= len(text) and text_width(text[: longest + step].rstrip() + "...", size) <= width:
            longest += step
    return text[:longest].rstrip() + "..."


def wrap(text: str, width: float, size: int) -> list[str]:
    """`text` in lines of at most `width` pixels, broken at spaces; a word that is wider than that is shortened."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(longer, size) <= width:
            lines[-1] = longer
        else:
            lines.append(shorten(word, width, size))
    return lines


def readable_on(colour: Colour) -> Colour:
    """Black or white, whichever stands out from `colour` (by its luma, ITU-R BT.601)."""
    red, green, blue = colour
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)


def _check(box: Sequence[float]) -> None:
    if len(box) != 4 or not all(map(math.isfinite, box)) or box[0] > box[2] or box[1] > box[3]:
        raise ValueError(
            f"The box {list(box)} cannot be drawn: expected x1, y1, x2, y2 in raw pixels with x1 <= x2 and y1 <= y2."
        )


def _inside(box: Sequence[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """A box held to a canvas of (width, height) pixels; the last pixel is the farthest that shows."""
    right, bottom = size[0] - 1, size[1] - 1
    x1, y1, x2, y2 = box
    return min(max(x1, 0), right), min(max(y1, 0), bottom), min(max(x2, 0), right), min(max(y2, 0), bottom)


def _outline(pen: ImageDraw.ImageDraw, place: Sequence[float], labelled: LabelledBox, width: int) -> None:
    """The box's edge lies along the inside of the outline; a thin black line keeps it apart from any background."""
    x1, y1, x2, y2 = map(round, place)
    pen.rectangle((x1 - width, y1 - width, x2 + width, y2 + width), outline=_HALO, width=1)
    pen.rectangle((x1 + 1, y1 + 1, max(x1 + 1, x2 - 1), max(y1 + 1, y2 - 1)), outline=_HALO, width=1)
    dash = 4 * width if labelled.dashed else math.inf
    sides = [((x1, y1), (x2, y1)), ((x2, y1), (x2, y2)), ((x2, y2), (x1, y2)), ((x1, y2), (x1, y1))]
    for (ax, ay), (bx, by) in sides:
        length = max(abs(bx - ax), abs(by - ay))
        steps = 1 if length <= dash else max(1, round(length / dash))
        steps += 1 - steps % 2  # a dash at either end
        for step in range(0, steps, 2):
            start, end = step / steps, (step + 1) / steps
            xs = sorted((ax + (bx - ax) * start, ax + (bx - ax) * end))
            ys = sorted((ay + (by - ay) * start, ay + (by - ay) * end))
            half = width // 2
            pen.rectangle((xs[0] - half, ys[0] - half, xs[1] + half, ys[1] + half), fill=labelled.colour)


def _label(
    pen: ImageDraw.ImageDraw,
    place: Sequence[float],
    labelled: LabelledBox,
    size: tuple[int, int],
    line: int,
    taken: Sequence[tuple[float, float, float, float]],
) -> tuple[float, float, float, float]:
    """Writes the label above, below or inside the box, where it hides least, and returns where it is."""
    letters = max(11, min(28, round(max(size) / 26)))
    text = shorten(labelled.label, size[0] - 6, letters)
    width, height = text_width(text, letters) + 6, letters + 5
    x1, y1, x2, y2 = place
    spots = [
        (x, y)
        for y in (y1 - height - line, y2 + line + 1, y1 + line, y2 - height - line)
        for x in (x1 - line / 2, x2 - width + line / 2)
    ]
    spots = [
        (min(max(x, 0), max(0, size[0] - 1 - width)), min(max(y, 0), max(0, size[1] - 1 - height))) for x, y in spots
    ]

    def hidden(spot: tuple[float, float]) -> float:
        area = (*spot, spot[0] + width, spot[1] + height)
        return 4 * sum(_overlap(area, other) for other in taken) + _overlap(area, (x1, y1, x2, y2))

    x, y = min(spots, key=hidden)
    pen.rectangle((x, y, x + width, y + height), fill=labelled.colour, outline=_HALO)
    pen.text((x + 3, y + 1), text, font=font_for(text, letters), fill=readable_on(labelled.colour))
    return x, y, x + width, y + height


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Area, in square pixels, that two xyxy boxes share."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


__all__ = [
    "LabelledBox",
    "PREDICTED_COLOUR",
    "TRUE_COLOUR",
    "draw_box",
    "draw_boxes",
    "drawn_size",
    "font_for",
    "readable_on",
    "shorten",
    "text_width",
    "wrap",
]
