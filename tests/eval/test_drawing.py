"""Boxes on pictures: where they lie, how they look, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from ssm_vlm.eval.drawing import (
    PREDICTED_COLOUR,
    TRUE_COLOUR,
    LabelledBox,
    draw_box,
    draw_boxes,
    drawn_size,
    readable_on,
    shorten,
    text_width,
    wrap,
)

GREY = (90, 90, 90)


def where(picture, colour):
    """x1, y1, x2, y2 of the pixels of a colour, both ends counted; None without any."""
    rows, columns = np.nonzero((np.asarray(picture) == colour).all(-1))
    return (columns.min(), rows.min(), columns.max(), rows.max()) if len(rows) else None


@pytest.mark.parametrize(
    ("size", "enlarge_to", "shrink_to", "drawn"),
    [
        ((64, 48), 448, None, (336, 448)),
        ((64, 64), 200, None, (192, 192)),
        ((1, 1), 448, None, (448, 448)),
        ((640, 480), 448, None, (480, 640)),
        ((640, 480), 192, 192, (144, 192)),
        ((4000, 3), 192, 192, (1, 192)),
    ],
)
def test_size(size, enlarge_to, shrink_to, drawn):
    picture = Image.new("RGB", size, GREY)
    assert drawn_size(picture, enlarge_to, shrink_to) == drawn
    result = draw_boxes(picture, [], enlarge_to=enlarge_to, shrink_to=shrink_to)
    assert result.size == drawn[::-1]
    assert (np.asarray(result) == GREY).all()


def test_enlarged_pixels_stay_sharp():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8))
    result = np.asarray(draw_boxes(picture, [], enlarge_to=32))
    assert (result == np.asarray(picture).repeat(4, 0).repeat(4, 1)).all()


@pytest.mark.parametrize("dashed", [False, True])
def test_outline_lies_on_the_box(dashed):
    """Raw pixel 10 begins at 70 when every pixel is enlarged seven times."""
    picture = draw_boxes(Image.new("RGB", (64, 48), GREY), [LabelledBox((10, 20, 30, 40), dashed=dashed)])
    assert picture.size == (448, 336)
    found = where(picture, TRUE_COLOUR)
    assert np.abs(np.subtract(found, (70, 140, 210, 280))).max() <= 2


def test_dashes_leave_gaps():
    solid, dashed = (
        draw_boxes(Image.new("RGB", (64, 64), GREY), [LabelledBox((8, 8, 56, 56), dashed=dashed)])
        for dashed in (False, True)
    )
    pixels = [(np.asarray(picture) == TRUE_COLOUR).all(-1).sum() for picture in (solid, dashed)]
    assert 0.4 * pixels[0] < pixels[1] < 0.75 * pixels[0]


@pytest.mark.parametrize(
    "box",
    [(-30, -30, 90, 90), (60, 60, 500, 500), (-50, 0, -20, 30), (100, 100, 120, 120), (5, 5, 5, 5), (0, 0, 64, 64)],
)
def test_boxes_that_stick_out_or_are_empty(box):
    picture = draw_boxes(Image.new("RGB", (64, 64), GREY), [LabelledBox(box, "a label")])
    assert picture.size == (448, 448) and where(picture, TRUE_COLOUR) is not None


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "I;16"])
def test_any_mode(mode):
    assert draw_box(Image.new(mode, (20, 10)), (1, 1, 9, 9), "x").mode == "RGB"


def test_the_picture_itself_is_left_alone():
    picture = Image.new("RGB", (600, 600), GREY)
    draw_box(picture, (100, 100, 300, 300), "x")
    assert (np.asarray(picture) == GREY).all()


@pytest.mark.parametrize(
    "box", [(1, 2, 3), (3, 0, 1, 5), (0, 5, 5, 3), (0, 0, float("nan"), 1), (0, 0, float("inf"), 1)]
)
def test_no_box(box):
    with pytest.raises(ValueError, match="cannot be drawn: expected x1, y1, x2, y2 in raw pixels"):
        draw_box(Image.new("RGB", (10, 10)), box)


@pytest.mark.parametrize("box", [(0, 0, 20, 20), (40, 40, 64, 64), (0, 0, 64, 64), (44, 0, 64, 10), (0, 60, 10, 64)])
def test_label_is_whole_and_inside(box):
    """Its background is a block of the box's colour, as wide as its text."""
    plain = draw_boxes(Image.new("RGB", (64, 64), GREY), [LabelledBox(box, colour=PREDICTED_COLOUR)])
    labelled = draw_box(Image.new("RGB", (64, 64), GREY), box, "digit 7")
    changed = (np.asarray(plain) != np.asarray(labelled)).any(-1)
    rows, columns = np.nonzero(changed)
    letters = 17  # of a picture of 448 pixels
    assert columns.max() - columns.min() >= text_width("digit 7", letters) - 4
    assert rows.max() - rows.min() >= letters - 4
    ink = readable_on(PREDICTED_COLOUR)
    assert (np.asarray(labelled)[changed] == ink).all(-1).any()


def test_labels_of_the_same_box_do_not_hide_each_other():
    blue, red = (20, 20, 250), (250, 20, 20)
    boxes = [LabelledBox((20, 20, 40, 40), "first", blue), LabelledBox((20, 20, 40, 40), "second", red)]
    picture = draw_boxes(Image.new("RGB", (64, 64), GREY), boxes)
    alone = draw_boxes(Image.new("RGB", (64, 64), GREY), boxes[:1])
    area = [(np.asarray(image)[..., 2] == 250).sum() for image in (picture, alone)]
    label = text_width("first", 17) * 17
    assert area[0] > 0.5 * label, "the first label is still to be seen"
    assert area[1] > area[0], "its outline is under the second"


def test_shorten_and_wrap():
    text = "the red digit on the left of a very long expression"
    assert shorten("short", 300, 18) == "short"
    cut = shorten(text, 200, 18)
    assert cut.endswith("...") and 150 < text_width(cut, 18) <= 200 and text.startswith(cut[:-3])
    assert shorten("a\nb\tc\x00d", 300, 18) == "a b c d"
    lines = wrap(text, 200, 18)
    assert " ".join(lines) == text and len(lines) > 1
    assert all(text_width(line, 18) <= 200 for line in lines)
    assert text_width(wrap("x" * 400, 200, 18)[0], 18) <= 200
    assert wrap("", 200, 18) == []


def test_text_that_no_font_knows_is_drawn_all_the_same():
    draw_box(Image.new("RGB", (64, 64)), (5, 5, 30, 30), "\ufffd\ufffd 漢字 \U0001f600")


@pytest.mark.parametrize(("colour", "ink"), [((255, 255, 0), 0), ((0, 0, 120), 255), (TRUE_COLOUR, 0)])
def test_readable_on(colour, ink):
    assert readable_on(colour) == (ink,) * 3
