"""The geometry tells the truth about the pixels, and maps boxes there and back."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ssm_vlm.modeling.geometry import BOX_FRAMES, geometry_names, make_geometry

SIDES = st.one_of(st.integers(1, 12), st.integers(1, 2000), st.sampled_from([1, 2, 3, 333, 480, 640, 800, 1333, 4000]))
# name -> how its size and options are drawn
SPECS = {
    "letterbox": st.fixed_dictionaries({"size": st.integers(1, 600)}),
    "letterbox_corner": st.one_of(
        st.fixed_dictionaries({"size": st.tuples(st.integers(1, 900), st.integers(1, 1400))}),
        st.fixed_dictionaries(
            {"size": st.tuples(st.integers(1, 900), st.integers(1, 1400)), "size_divisor": st.sampled_from([1, 14, 32])}
        ),
    ),
    "square_512": st.just({}),
    "square_7": st.just({}),
    "resize_crop": st.fixed_dictionaries(
        {
            "size": st.tuples(st.integers(1, 600), st.integers(1, 600)),
            "crop_pct": st.sampled_from([None, 1.0, 0.875, 0.5]),
        }
    ),
    "resize": st.fixed_dictionaries({"size": st.tuples(st.integers(1, 900), st.integers(1, 900))}),
}
SMALL_SPECS = {
    "letterbox": st.just({"size": 40}),
    "letterbox_corner": st.sampled_from([{"size": (30, 50)}, {"size": (30, 50), "size_divisor": 8}]),
    "square_512": st.just({}),
    "resize_crop": st.just({"size": (30, 40), "crop_pct": 0.8}),
    "resize": st.just({"size": (30, 50)}),
}
ORANGE, BLUE = (250, 120, 10), (0, 20, 240)


@st.composite
def geometries(draw, names=tuple(SPECS)):
    name = draw(st.sampled_from(names))
    return make_geometry(name, draw(SIDES), draw(SIDES), **draw(SPECS[name]))


@st.composite
def boxes_in(draw, geometry):
    unit = st.floats(0, 1)
    x1, x2 = sorted((draw(unit) * geometry.raw_width, draw(unit) * geometry.raw_width))
    y1, y2 = sorted((draw(unit) * geometry.raw_height, draw(unit) * geometry.raw_height))
    return x1, y1, x2, y2


@pytest.mark.parametrize("frame", BOX_FRAMES)
@settings(max_examples=150)
@given(data=st.data())
def test_boxes_come_back_from_every_frame(frame, data):
    geometry = data.draw(geometries())
    box = data.draw(boxes_in(geometry))
    side = max(geometry.raw_height, geometry.raw_width)
    back = geometry.from_frame(geometry.to_frame(box, frame), frame)
    assert back == pytest.approx(box, abs=1e-11 * side, rel=1e-11)
    assert geometry.from_canvas(geometry.to_canvas(box)) == pytest.approx(box, abs=1e-11 * side, rel=1e-11)


@pytest.mark.parametrize("frame", BOX_FRAMES)
@settings(max_examples=100)
@given(data=st.data())
def test_a_box_inside_the_picture_is_inside_every_frame_unless_cropped(frame, data):
    geometry = data.draw(geometries([name for name in SPECS if name != "resize_crop" or frame != "canvas"]))
    x1, y1, x2, y2 = geometry.to_frame(data.draw(boxes_in(geometry)), frame)
    assert -1e-9 <= x1 <= x2 <= 1 + 1e-9
    assert -1e-9 <= y1 <= y2 <= 1 + 1e-9


@settings(max_examples=150)
@given(geometry=geometries(), data=st.data())
def test_frames_agree_with_their_definition(geometry, data):
    x1, y1, x2, y2 = box = data.draw(boxes_in(geometry))
    width, height = geometry.raw_width, geometry.raw_height
    side = max(width, height)
    dx, dy = (side - width) / 2, (side - height) / 2
    centred = ((x1 + dx) / side, (y1 + dy) / side, (x2 + dx) / side, (y2 + dy) / side)
    assert geometry.to_frame(box, "centered_square") == pytest.approx(centred, abs=1e-12)
    raw = (x1 / width, y1 / height, x2 / width, y2 / height)
    assert geometry.to_frame(box, "raw") == pytest.approx(raw, abs=1e-12)
    canvas = np.array(geometry.to_canvas(box)) / np.tile((geometry.canvas_width, geometry.canvas_height), 2)
    assert geometry.to_frame(box, "canvas") == pytest.approx(tuple(canvas), rel=1e-12, abs=1e-12)


def test_letterbox_canvas_is_the_label_frame_up_to_the_odd_pixel():
    geometry = make_geometry("letterbox", 480, 640, 224)
    box = (10.0, 20.0, 300.0, 400.0)
    assert geometry.to_frame(box, "canvas") == pytest.approx(geometry.to_frame(box, "centered_square"), abs=1e-12)
    odd = make_geometry("letterbox", 479, 640, 224)
    difference = np.subtract(odd.to_frame(box, "canvas"), odd.to_frame(box, "centered_square"))
    assert difference == pytest.approx([0, -0.5 / 640, 0, -0.5 / 640], abs=1e-12)


# Paper release: what a COCO picture of 640 x 480 becomes (resized height and width, canvas height and width).
@pytest.mark.parametrize(
    ("name", "raw", "size", "options", "content", "canvas"),
    [
        ("letterbox_corner", (480, 640), (800, 1333), {}, (480, 640), (800, 1333)),
        ("letterbox_corner", (480, 640), 1024, {}, (480, 640), (1024, 1024)),
        ("square_1024", (480, 640), None, {}, (480, 640), (1024, 1024)),
        ("square_512", (480, 640), None, {}, (384, 512), (512, 512)),
        ("square_256", (480, 640), None, {}, (192, 256), (256, 256)),
        ("square_224", (480, 640), None, {}, (168, 224), (224, 224)),
        ("letterbox_corner", (1600, 1600), (800, 1333), {}, (800, 800), (800, 1333)),
        # detectors bound the longer and the shorter side, and pad to a multiple
        ("letterbox_corner", (480, 640), (800, 1333), {"size_divisor": 32}, (480, 640), (480, 640)),
        ("letterbox_corner", (1000, 3000), (800, 1333), {"size_divisor": 32}, (444, 1333), (448, 1344)),
        ("letterbox_corner", (3000, 1000), (800, 1333), {"size_divisor": 32}, (1333, 444), (1344, 448)),
        # the shorter side to 224 / 0.875 = 256, then the centre; the longer side is rounded down
        ("resize_crop", (480, 640), 224, {"crop_pct": 0.875}, (256, 341), (224, 224)),
        ("resize_crop", (427, 640), 224, {}, (224, 335), (224, 224)),
        ("resize", (480, 640), 224, {}, (224, 224), (224, 224)),
        # extremes keep at least one pixel
        ("square_512", (3, 4000), None, {}, (1, 512), (512, 512)),
        ("square_512", (1, 1), None, {}, (1, 1), (512, 512)),
    ],
)
def test_sizes(name, raw, size, options, content, canvas):
    geometry = make_geometry(name, *raw, size, **options)
    assert (geometry.canvas_height, geometry.canvas_width) == canvas
    left, top, right, bottom = geometry.to_canvas((0, 0, raw[1], raw[0]))
    assert (bottom - top, right - left) == pytest.approx(content)


def test_crops_the_middle():
    geometry = make_geometry("resize_crop", 480, 640, 224, crop_pct=0.875)  # 256 x 341, then 224 x 224 from (16, 58)
    assert (geometry.offset_y, geometry.offset_x) == (-16.0, -58.0)


def show(geometry, box):
    """A blue picture with an orange rectangle on a black canvas, as painted: [canvas_height, canvas_width, 3]."""
    picture = Image.new("RGB", (geometry.raw_width, geometry.raw_height), BLUE)
    picture.paste(ORANGE, box)
    return np.asarray(geometry.paint(picture, (0, 0, 0), Image.Resampling.BOX)).astype(int)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("letterbox", {"size": 40}),
        ("letterbox_corner", {"size": (30, 50)}),
        ("letterbox_corner", {"size": (30, 50), "size_divisor": 8}),
        ("square_48", {}),
        ("resize_crop", {"size": (30, 40), "crop_pct": 0.875}),
        ("resize", {"size": (30, 50)}),
    ],
)
@pytest.mark.parametrize("raw", [(400, 601), (603, 400)])
def test_a_rectangle_appears_exactly_where_its_box_is_mapped(name, options, raw):
    """Only orange has red in it, and a box filter keeps sums, so centre and extent can be read to a part of a pixel."""
    geometry = make_geometry(name, *raw, **options)
    box = (raw[1] // 2 - 90, raw[0] // 2 - 60, raw[1] // 2 + 110, raw[0] // 2 + 130)
    red = show(geometry, box)[..., 0] / ORANGE[0]
    left, top, right, bottom = geometry.to_canvas(box)
    tolerance = 0.02 + 0.5 * max(geometry.scale_x, geometry.scale_y)  # half a raw pixel
    for axis, low, high in ((0, left, right), (1, top, bottom)):
        profile = red.sum(axis=axis) / red.sum(axis=axis).max()
        assert profile.sum() == pytest.approx(high - low, abs=tolerance)
        centre = (profile * (np.arange(len(profile)) + 0.5)).sum() / profile.sum()
        assert centre == pytest.approx((low + high) / 2, abs=tolerance)


@settings(max_examples=200)
@given(data=st.data())
def test_colours_are_pure_inside_their_mapped_areas(data):
    """Rectangle, rest of the picture and canvas fill, each as far from its edges as the filter reaches."""
    name = data.draw(st.sampled_from(list(SPECS)))
    side = st.integers(1, 70)
    geometry = make_geometry(name, data.draw(side), data.draw(side), **data.draw(SMALL_SPECS.get(name, SPECS[name])))
    x1 = data.draw(st.integers(0, geometry.raw_width - 1))
    y1 = data.draw(st.integers(0, geometry.raw_height - 1))
    box = (
        x1,
        y1,
        data.draw(st.integers(x1 + 1, geometry.raw_width)),
        data.draw(st.integers(y1 + 1, geometry.raw_height)),
    )
    shown = show(geometry, box)
    assert shown.shape == (geometry.canvas_height, geometry.canvas_width, 3)

    def inside(area, margin):
        left, top, right, bottom = geometry.to_canvas(area)
        columns, rows = np.arange(geometry.canvas_width), np.arange(geometry.canvas_height)
        return np.outer(
            (rows >= top + margin - 1e-9) & (rows + 1 <= bottom - margin + 1e-9),
            (columns >= left + margin - 1e-9) & (columns + 1 <= right - margin + 1e-9),
        )

    margin = 1 + max(geometry.scale_x, geometry.scale_y) / 2
    whole = (0, 0, geometry.raw_width, geometry.raw_height)
    near_box, near_picture = (~inside_out(geometry, area, margin) for area in (box, whole))
    areas = ((inside(box, margin), ORANGE), (inside(whole, margin) & ~near_box, BLUE), (~near_picture, (0, 0, 0)))
    for area, colour in areas:
        assert np.abs(shown[area] - colour).max(initial=0) <= 1


def inside_out(geometry, area, margin):
    """Canvas pixels that lie further than `margin` outside a raw area."""
    left, top, right, bottom = geometry.to_canvas(area)
    columns, rows = np.arange(geometry.canvas_width), np.arange(geometry.canvas_height)
    beside = (columns + 1 <= left - margin) | (columns >= right + margin)
    above = (rows + 1 <= top - margin) | (rows >= bottom + margin)
    return above[:, None] | beside[None, :]


@pytest.mark.parametrize("raw", [(48, 64), (64, 48), (33, 64), (64, 33), (1, 50), (50, 1), (50, 50)])
@pytest.mark.parametrize("strip_pixels", [2**24, 640])
def test_letterbox_paints_what_padding_to_a_square_first_would(raw, strip_pixels, monkeypatch):
    monkeypatch.setattr("ssm_vlm.modeling.geometry._STRIP_PIXELS", strip_pixels)
    (height, width), side, fill = raw, max(raw), (123, 116, 103)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    square = Image.new("RGB", (side, side), fill)
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    wanted = square.resize((40, 40), Image.Resampling.BICUBIC)
    painted = make_geometry("letterbox", height, width, 40).paint(picture, fill, Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(painted), np.asarray(wanted))


def test_resize_crop_paints_what_resizing_then_cropping_would():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    geometry = make_geometry("resize_crop", 48, 64, 28, crop_pct=0.875)
    whole = picture.resize((42, 32), Image.Resampling.BICUBIC)
    wanted = np.asarray(whole.crop((7, 2, 35, 30))).astype(int)
    painted = np.asarray(geometry.paint(picture, (0, 0, 0), Image.Resampling.BICUBIC))
    assert np.abs(painted - wanted).max() <= 1


@pytest.mark.parametrize("name", ["letterbox", "square_64", "resize_crop", "resize"])
@pytest.mark.parametrize("raw", [(1, 60000), (6000, 1), (3, 4000), (1, 1)])
def test_thin_pictures_are_painted(name, raw):
    """A picture of 60000 x 1 padded to a square, or resized to cover a canvas, would take gigabytes."""
    geometry = make_geometry(name, *raw, 64)
    canvas = geometry.paint(Image.new("RGB", raw[::-1], ORANGE), (0, 0, 0), Image.Resampling.BICUBIC)
    assert canvas.size == (64, 64)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("square_0", 5, 5), {}, "Unknown geometry 'square_0': expected one of letterbox, letterbox_corner, square_N"),
        (("square_N", 5, 5), {}, "Unknown geometry 'square_N'"),
        (("Letterbox", 5, 5, 8), {}, "Unknown geometry 'Letterbox'"),
        (("letterbox", 5, 5), {}, "needs a size"),
        (("letterbox", 5, 5, (8, 9)), {}, "needs a square canvas, got size 8 x 9"),
        (("square_8", 5, 5, 9), {}, "is 8 x 8 by name, got size 9 x 9"),
        (("resize", 0, 5, 8), {}, "picture of 0 x 5 on a canvas of 8 x 8 pixels is not possible"),
        (("resize", 5, 5, 8), {"crop_pct": 0.9}, "does not read crop_pct"),
        (("square_8", 5, 5), {"size_divisor": 32}, "does not read size_divisor"),
        (("resize_crop", 5, 5, 8), {"crop_pct": 1.5}, "crop_pct at most 1.*got 1.5"),
        (("letterbox_corner", 5, 5, 8), {"size_divisor": -1}, "size_divisor must be positive"),
    ],
)
def test_bad_requests_are_told(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        make_geometry(*arguments, **options)


@pytest.mark.parametrize(
    "box", [(-3, 0, 5, 5), (0, 0, 12.5, 5), (0, 0, 5, 22.5), (5, 0, 4, 5), (0, 5, 4, 4), (0, 0, math.nan, 1)]
)
def test_a_box_outside_its_picture_is_told(box):
    geometry = make_geometry("resize", 20, 10, 8)
    with pytest.raises(ValueError, match="does not lie in its picture of width 10 and height 20"):
        geometry.to_frame(box, "raw")


def test_a_box_that_sticks_out_by_a_rounding_is_kept():
    assert make_geometry("resize", 20, 10, 8).to_frame((-0.4, 0, 10.4, 20), "raw") == pytest.approx((-0.04, 0, 1.04, 1))


def test_an_unknown_frame_is_told():
    geometry = make_geometry("resize", 20, 10, 8)
    for convert in (geometry.to_frame, geometry.from_frame):
        with pytest.raises(
            ValueError, match="Unknown box frame 'square': expected one of centered_square, canvas, raw"
        ):
            convert((0, 0, 1, 1), "square")


def test_a_picture_of_another_size_is_told():
    with pytest.raises(ValueError, match="for a picture of height 20 and width 10, got height 10 and width 20"):
        make_geometry("resize", 20, 10, 8).paint(Image.new("RGB", (20, 10)), (0, 0, 0), 2)


def test_every_name_is_tested():
    assert {"square_N" if name.startswith("square_") else name for name in SPECS} == set(geometry_names())
