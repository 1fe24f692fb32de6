"""Token positions: the codes themselves, and that the model adds them where each image's tokens lie."""

import math

import pytest
import torch
from llava_style_toys import SIZE, VISION, build, padded, pictures

from ssm_vlm import LlavaStyleConfig
from ssm_vlm.modeling.token_grid import DOWNSAMPLING
from ssm_vlm.modeling.token_positions import HIGHEST_FREQUENCY, TOKEN_POSITIONS, sincos_2d


@pytest.mark.parametrize("height, width, channels", [(1, 1, 4), (2, 3, 8), (5, 1, 6), (8, 8, 96), (3, 7, 33)])
def test_codes_by_their_definition(height, width, channels):
    codes = sincos_2d(height, width, channels)
    assert codes.shape == (height * width, channels)
    quarter = math.ceil(channels / 4)
    for row in range(height):
        for column in range(width):
            for channel in range(channels):
                part, index = divmod(channel, quarter)
                frequency = math.pi * HIGHEST_FREQUENCY ** (index / (quarter - 1) if quarter > 1 else 0)
                place = (row + 0.5) / height if part < 2 else (column + 0.5) / width
                expected = (math.sin, math.cos)[part % 2](frequency * place)
                assert codes[row * width + column, channel].item() == pytest.approx(expected, abs=1e-5)


def test_codes_tell_every_place_of_a_grid_apart():
    codes = sincos_2d(50, 84, 96)
    distances = torch.cdist(codes, codes) + 1e9 * torch.eye(len(codes))
    assert distances.min() > 0.1


def test_codes_are_of_the_place_on_the_canvas_not_of_the_cell():
    coarse, fine = sincos_2d(1, 1, 32), sincos_2d(3, 3, 32)
    torch.testing.assert_close(coarse[0], fine[4])


@pytest.mark.parametrize("vision", [name for name in VISION if name in DOWNSAMPLING])
def test_mixed_sizes_equal_one_by_one(vision):
    model = build(vision, token_positions="sincos2d")
    images = pictures((SIZE, SIZE), (2 * SIZE, SIZE), (SIZE, 3 * SIZE), (SIZE, SIZE))
    with torch.no_grad():
        together = model.get_image_features(**padded(images)).pooler_output
        alone = [model.get_image_features(image[None]).pooler_output[0] for image in images]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_model_adds_the_codes_after_the_tap_norm():
    model = build(token_positions="sincos2d", tap_norm="layernorm", connector="linear")
    image = pictures((SIZE, 2 * SIZE))[0][None]
    with torch.no_grad():
        tap = model.get_tap_features(image)[0]
        normed = torch.nn.functional.layer_norm(tap, tap.shape[-1:])
        expected = model.connector(normed + sincos_2d(2, 4, tap.shape[-1]))
        torch.testing.assert_close(model.get_image_features(image).pooler_output[0], expected)


def test_cached_features_give_the_same_and_need_the_canvas_sizes():
    model = build(token_positions="sincos2d")
    inputs = padded(pictures((SIZE, SIZE), (SIZE, 2 * SIZE)))
    with torch.no_grad():
        cached = model.get_tap_features(**inputs)
        again = model.get_image_features(image_features=cached, image_sizes=inputs["image_sizes"]).pooler_output
        for a, b in zip(model.get_image_features(**inputs).pooler_output, again, strict=True):
            torch.testing.assert_close(a, b)
        with pytest.raises(ValueError, match="need image_sizes too, since token_positions depends on the grid"):
            model.get_image_features(image_features=cached)


def test_an_unknown_name_is_refused_and_every_name_is_a_choice():
    with pytest.raises(Exception, match="token_positions"):
        LlavaStyleConfig(token_positions="learned")
    for name in TOKEN_POSITIONS:
        assert build(token_positions=name).config.token_positions == name
