"""Any picture becomes the right pixels, or one sentence."""

import base64
import io
import pathlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from ssm_vlm import LlavaStyleImageProcessor, make_geometry
from ssm_vlm.modeling.image_processing_llava_style import load_image

GRADIENT = np.stack(np.broadcast_arrays(np.arange(0, 240, 40)[:, None], np.arange(0, 250, 50)[None], 77), -1)
GRADIENT = GRADIENT.astype(np.uint8)  # [6, 5, 3]: red grows downwards, green to the right


def pixels(source, **kwargs):
    image = load_image(source, **kwargs)
    assert image.mode == "RGB"
    return np.asarray(image)


def encoded(array_or_image, image_format, **options):
    image = array_or_image if isinstance(array_or_image, Image.Image) else Image.fromarray(array_or_image)
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def test_paths_bytes_and_pictures_are_the_same(tmp_path):
    path = tmp_path / "gradient.png"
    path.write_bytes(encoded(GRADIENT, "PNG"))
    for source in (path, str(path), path.read_bytes(), Image.open(path), Image.fromarray(GRADIENT)):
        assert np.array_equal(pixels(source), GRADIENT)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Address of a web server that holds the files of `tmp_path`."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize(
    "array",
    [GRADIENT, np.full((3, 2), 40000, np.uint16), np.dstack([GRADIENT, np.zeros_like(GRADIENT[..., 0])])],
    ids=["colours", "16 bits", "transparent"],
)
def test_a_url_shows_what_its_file_does(array, server, tmp_path):
    data = encoded(array, "PNG")
    (tmp_path / "picture.png").write_bytes(data)
    for url in ("data:image/png;base64," + base64.b64encode(data).decode(), f"{server}/picture.png"):
        assert np.array_equal(pixels(url), pixels(data))


def test_urls_that_hold_no_picture_are_told_in_one_sentence(server):
    with pytest.raises(OSError, match=r"^Cannot read the picture at 'http://127.*/none.png': HTTP Error 404: .*\.$"):
        load_image(f"{server}/none.png")
    with pytest.raises(OSError, match=r"^Cannot read the picture at 'http://127.0.0.1:9/x.png': .*refused.*\.$"):
        load_image("http://127.0.0.1:9/x.png")
    with pytest.raises(OSError, match=r"^Cannot read the picture at 'data:image/png;base64,A{278}\.\.\.': .*\.$"):
        load_image("data:image/png;base64," + "A" * 1001)
    with pytest.raises(ValueError, match=r"^Cannot decode the given bytes: it is not of an image format"):
        load_image("data:image/png;base64,AAAA")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    """Each of the eight orientations, stored as a camera would, comes out upright."""
    undo = {  # how the upright picture is stored
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[274] = orientation
    stored = encoded(np.ascontiguousarray(undo[orientation](GRADIENT)), "PNG", exif=exif)
    assert np.array_equal(pixels(stored), GRADIENT)


def test_transparency_becomes_white():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = 255, 0, 0, 255
    rgba[0, 1] = 255, 0, 0, 0
    rgba[1, 0] = 0, 0, 0, 128
    shown = pixels(encoded(rgba, "PNG"))
    assert shown[0].tolist() == [[255, 0, 0], [255, 255, 255]]
    assert np.abs(shown[1, 0].astype(int) - 127).max() <= 1
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert pixels(encoded(palette, "PNG", transparency=1)).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    assert pixels(encoded(palette, "PNG")).tolist() == [[[10, 20, 30], [40, 50, 60]]]


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(image_format):
    for ramp, shown in (([0, 257, 25900, 65535], [0, 1, 101, 255]), ([0, 200], [0, 1])):
        assert pixels(encoded(np.array([ramp], np.uint16), image_format))[0, :, 0].tolist() == shown


def test_grey_and_cmyk_and_one_bit():
    assert pixels(encoded(GRADIENT[..., 0], "PNG")).tolist() == GRADIENT[..., [0, 0, 0]].tolist()
    assert pixels(Image.new("CMYK", (1, 1), (255, 0, 0, 0))).tolist() == [[[0, 255, 255]]]
    assert pixels(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))[4, 4] == pytest.approx(
        [255, 0, 0], abs=8
    )
    assert pixels(Image.new("1", (1, 1), 1)).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize("to", [np.asarray, torch.tensor])
@pytest.mark.parametrize(
    "convert",
    [
        lambda a: a,
        lambda a: a.transpose(2, 0, 1),
        lambda a: a.astype(np.float32) / 255,
        lambda a: a.astype(np.float64).transpose(2, 0, 1) / 255,
        lambda a: a.astype(np.int64),
        lambda a: a.astype(np.uint16) * 257,
    ],
    ids=["hwc", "chw", "float32", "float64 chw", "int64", "uint16"],
)
def test_arrays(to, convert):
    array = convert(GRADIENT)
    assert np.array_equal(pixels(to(np.ascontiguousarray(array))), GRADIENT)


def test_arrays_of_few_channels():
    grey = GRADIENT[..., 0]
    wanted = GRADIENT[..., [0, 0, 0]]
    for array in (grey, grey[..., None], grey[None], grey.astype(np.float32) / 255):
        assert np.array_equal(pixels(array), wanted)
    assert pixels(np.array([[True, False]]))[0, :, 0].tolist() == [255, 0]
    assert pixels(np.dstack([grey, np.full_like(grey, 255)])).tolist() == wanted.tolist()
    assert pixels(torch.tensor([[0.0, 1.0]], dtype=torch.bfloat16))[0, :, 0].tolist() == [0, 255]


def test_channels_of_ambiguous_arrays():
    one = np.array([[[1, 2, 3]]], np.uint8)  # one RGB pixel, not a picture of 1 x 3
    assert pixels(one).tolist() == [[[1, 2, 3]]]
    assert pixels(torch.tensor(one)).tolist() == [[[1, 2, 3]]]
    cube = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    assert np.array_equal(pixels(cube), cube)
    assert np.array_equal(pixels(torch.tensor(cube)), cube.transpose(1, 2, 0))
    assert np.array_equal(pixels(cube, input_data_format="channels_first"), cube.transpose(1, 2, 0))
    assert np.array_equal(pixels(torch.tensor(cube), input_data_format="channels_last"), cube)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("iVBORw0K" * 100, FileNotFoundError, r"no image file .(iVBORw0K){37}iVBO\.\.\."),  # base64 alone
        ("nowhere.png", FileNotFoundError, "There is no image file 'nowhere.png'"),
        (pathlib.Path("nowhere.png"), FileNotFoundError, "There is no image file 'nowhere.png'"),
        (b"not an image", ValueError, "Cannot decode the given bytes: it is not of an image format"),
        (encoded(GRADIENT, "PNG")[:40], ValueError, "Cannot decode the given bytes: "),
        (42, TypeError, "A picture must be a path.*got int"),
        (None, TypeError, "got NoneType"),
        (np.zeros((2, 5, 5, 3)), ValueError, r"shape \(2, 5, 5, 3\) is not a picture"),
        (np.zeros((5, 6, 7)), ValueError, "neither end has 1 to 4 channels"),
        (np.zeros((0, 6, 3)), ValueError, "it has no pixels"),
        (np.full((2, 2, 3), 200.0), ValueError, r"floats must lie in \[0, 1\], got values from 200 to 200"),
        (np.full((2, 2, 3), np.nan), ValueError, r"floats must lie in \[0, 1\], got values from nan to nan"),
        (np.full((2, 2, 3), -1), ValueError, "integers must lie in 0 to 65535, got values from -1 to -1"),
    ],
)
def test_what_is_not_a_picture_is_told(source, error, message):
    with pytest.raises(error, match=message):
        load_image(source)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_file_that_does_not_decode_is_named(image_format, tmp_path):
    """Cut and corrupted in a hundred places: a picture or a ValueError that names the file, nothing else."""
    noise = np.random.default_rng(0).integers(0, 256, (23, 31, 3), dtype=np.uint8)
    data, path, refused = encoded(noise, image_format), tmp_path / "broken.img", 0
    rng = np.random.default_rng(1)
    for trial in range(60):
        broken = bytearray(data[: rng.integers(len(data))] if trial % 2 else data)
        for position in rng.integers(min(80, len(broken)) or 1, size=4 * (trial % 2 == 0)):
            broken[position] = rng.integers(256)
        path.write_bytes(broken)
        try:
            load_image(path)
        except ValueError as error:
            assert str(error).startswith(f"Cannot decode the image file {str(path)!r}: ")
            refused += 1
    assert refused > 5


def test_a_decompression_bomb_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    path = tmp_path / "bomb.png"
    path.write_bytes(encoded(GRADIENT, "PNG"))
    with pytest.raises(ValueError, match="Cannot decode the image file .*bomb.png.*decompression bomb"):
        load_image(path)


# The pixels


def test_pixels_are_normalised_like_the_reference():
    """(x / 255 - mean) / std of the painted canvas; fill is int(255 * mean), (123, 116, 103) for ImageNet."""
    processor = LlavaStyleImageProcessor(geometry="square_8", resample=Image.Resampling.NEAREST)
    features = processor(GRADIENT, return_tensors="np")
    canvas = np.empty((8, 8, 3))
    canvas[:] = 123, 116, 103
    canvas[:6, :5] = GRADIENT
    wanted = (canvas / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert features["pixel_values"].dtype == np.float32
    np.testing.assert_allclose(features["pixel_values"][0], wanted.transpose(2, 0, 1), atol=1e-6)
    assert set(features) == {"pixel_values"}  # whose own size says all
    assert processor(GRADIENT, return_image_sizes=True, return_tensors="np")["image_sizes"].tolist() == [[8, 8]]


def test_normalisation_can_be_switched_off():
    settings = {"geometry": "square_8", "fill": [1, 2, 3]}
    raw = LlavaStyleImageProcessor(**settings, do_rescale=False, do_normalize=False)(GRADIENT)["pixel_values"][0]
    assert np.array_equal(raw[:, :6, :5], GRADIENT.transpose(2, 0, 1))
    assert raw[:, 7, 7].tolist() == [1, 2, 3]
    scaled = LlavaStyleImageProcessor(**settings, do_normalize=False)(GRADIENT)["pixel_values"][0]
    np.testing.assert_allclose(scaled, raw / 255, atol=1e-7)
    half = LlavaStyleImageProcessor(geometry="square_8", image_mean=[0.5] * 3, image_std=[0.5] * 3)(GRADIENT)
    np.testing.assert_allclose(half["pixel_values"][0, :, 7, 7], 127 / 255 * 2 - 1, atol=1e-6)


def test_canvases_of_different_size_are_padded_to_the_largest():
    processor = LlavaStyleImageProcessor(geometry="letterbox_corner", size={"height": 40, "width": 60}, size_divisor=8)
    pictures = [Image.new("RGB", size, (255, 255, 255)) for size in ((60, 20), (20, 60), (7, 7))]
    features = processor(pictures, return_tensors="pt", return_geometry=True)
    assert features["image_sizes"].tolist() == [[24, 64], [64, 24], [8, 8]]
    assert features["image_sizes"].dtype == torch.int64
    assert features["pixel_values"].shape == (3, 3, 64, 64)
    for picture, values, (height, width), geometry in zip(
        pictures, features["pixel_values"], features["image_sizes"], features["geometry"], strict=True
    ):
        assert (values[:, height:] == 0).all() and (values[:, :, width:] == 0).all()
        alone = processor(picture, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(values[:, :height, :width], alone)
        assert geometry == processor.get_geometry(picture.height, picture.width)
        assert (geometry.canvas_height, geometry.canvas_width) == (height, width)


@pytest.mark.parametrize("geometry", ["letterbox", "letterbox_corner", "square_32", "resize_crop", "resize"])
@pytest.mark.parametrize("raw", [(1, 1), (800, 1333), (3, 4000), (4000, 3)], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_odd_sizes(geometry, raw, mode):
    processor = LlavaStyleImageProcessor(geometry=geometry, size=32)
    features = processor(Image.new(mode, raw[::-1]), return_tensors="pt", return_geometry=True)
    assert features["pixel_values"].shape == (1, 3, 32, 32)
    assert features["pixel_values"].isfinite().all()
    assert features["geometry"] == [make_geometry(geometry, *raw, 32)]


def test_geometry_speaks_of_the_upright_picture():
    exif = Image.Exif()
    exif[274] = 6
    stored = encoded(np.zeros((10, 30, 3), np.uint8), "JPEG", exif=exif)
    (geometry,) = LlavaStyleImageProcessor(geometry="square_64")(stored, return_geometry=True)["geometry"]
    assert (geometry.raw_height, geometry.raw_width) == (30, 10)


def test_nested_lists_and_batches_are_flattened_in_order():
    processor = LlavaStyleImageProcessor(geometry="square_1", do_normalize=False, do_rescale=False)
    reds = [Image.new("RGB", (1, 1), (value, 0, 0)) for value in range(5)]
    for images in (reds, [reds[:2], [], reds[2:]], tuple(reds), np.stack([np.asarray(red) for red in reds])):
        assert processor(images)["pixel_values"][:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]


def test_arguments_of_a_call_come_before_the_configuration():
    processor = LlavaStyleImageProcessor(geometry="square_64")
    features = processor(GRADIENT, geometry="letterbox_corner", size=10, size_divisor=16, return_geometry=True)
    assert features["pixel_values"].shape[2:] == (16, 16)
    assert features["geometry"] == [make_geometry("letterbox_corner", 6, 5, 10, size_divisor=16)]
    assert processor.geometry == "square_64"


def test_the_configuration_survives_saving(tmp_path):
    processor = LlavaStyleImageProcessor(
        geometry="letterbox_corner",
        size={"height": 80, "width": 133},
        size_divisor=32,
        fill=[1, 2, 3],
        resample=Image.Resampling.BILINEAR,
        image_mean=[0.1, 0.2, 0.3],
        image_std=[0.4, 0.5, 0.6],
        downsampling=[[2, "ceil"], [2, "ceil"]],
    )
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is LlavaStyleImageProcessor
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.get_geometry(50, 70) == processor.get_geometry(50, 70)
    before, after = (p(GRADIENT, return_tensors="pt")["pixel_values"] for p in (processor, loaded))
    assert torch.equal(before, after)
    wider = AutoImageProcessor.from_pretrained(tmp_path, size={"height": 80, "width": 200})
    assert wider.size.width == 200


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"geometry": "squash"}, "Unknown geometry 'squash'"),
        ({"geometry": "square_64", "size": 32}, "is 64 x 64 by name, got size 32 x 32"),
        ({"geometry": "resize", "size": {"shortest_edge": 32}}, "size must be an int or have a height and a width"),
        ({"geometry": "resize", "crop_pct": 0.9}, "does not read crop_pct"),
        ({"geometry": "resize", "do_center_crop": True}, "do_center_crop cannot be set"),
        ({"geometry": "resize", "do_pad": True, "crop_size": 8}, "do_pad, crop_size cannot be set: the geometry"),
    ],
)
def test_bad_configurations_are_told_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        LlavaStyleImageProcessor(**settings)


def test_no_picture_is_told():
    with pytest.raises(ValueError, match="No picture was given"):
        LlavaStyleImageProcessor()([])
