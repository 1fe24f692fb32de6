"""Image processors load as `AutoImageProcessor` with either backend of Transformers, and give the same pixels."""

import numpy as np
import pytest
import torch
from PIL import Image
from remote_code_toys import conversation, processor, vlm_config
from transformers import AutoImageProcessor, AutoProcessor, ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils import is_torchvision_available

from ssm_vlm import LlavaStyleImageProcessor
from ssm_vlm.modeling.encoder_loading import load_encoder
from ssm_vlm.modeling.encoder_preprocessing import encoder_image_processor

BACKENDS = pytest.mark.parametrize("backend", [{}, {"backend": "pil"}, {"backend": "torchvision"}], ids=str)


@pytest.fixture(params=["as installed", pytest.param("torchvision", marks=pytest.mark.timm)], autouse=True)
def environment(request):
    """The same tests run where torchvision is not installed and where it is."""
    if request.param == "torchvision":
        assert is_torchvision_available()


@pytest.fixture(scope="module")
def picture():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (40, 64, 3), dtype=np.uint8)).resize((96, 60), Image.BICUBIC)


def by_definition(picture, size=48):
    """A letterbox: a centred square of the mean colour, bicubic, and ImageNet's normalisation."""
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    side = max(picture.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * m) for m in mean))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    pixels = np.asarray(square.resize((size, size), Image.BICUBIC)) / 255.0
    return torch.from_numpy(((pixels - mean) / std).transpose(2, 0, 1)).float()


def test_the_definition_is_not_any(picture):
    """The mutant: a picture that is shifted by a pixel is another one."""
    shifted = Image.fromarray(np.roll(np.asarray(picture), 1, axis=1))
    assert (by_definition(picture) - by_definition(shifted)).abs().max() > 0.1


@BACKENDS
def test_saved_alone(backend, picture, tmp_path):
    LlavaStyleImageProcessor(geometry="letterbox", size=48).save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path, **backend)
    assert type(loaded) is LlavaStyleImageProcessor
    pixels = loaded(picture, return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(pixels, by_definition(picture), atol=1e-5)


@BACKENDS
def test_in_the_folder_of_a_vlm(backend, tmp_path):
    saved = processor(vlm_config("ssm_vision"))
    saved.save_pretrained(tmp_path)
    pictures = AutoImageProcessor.from_pretrained(tmp_path, **backend)
    whole = AutoProcessor.from_pretrained(tmp_path, **backend)
    assert type(pictures) is type(whole.image_processor) is LlavaStyleImageProcessor
    picture = conversation()[0]["content"][0]["image"]
    expected = saved.image_processor(picture, return_tensors="pt")["pixel_values"]
    for loaded in (pictures, whole.image_processor):
        assert torch.equal(loaded(picture, return_tensors="pt")["pixel_values"], expected)


@BACKENDS
def test_in_the_folder_of_a_stock_model(backend, tmp_path):
    """A stock processor loads with either backend; its numbers make the letterbox of our own."""
    stock = ViTConfig(hidden_size=8, num_hidden_layers=3, num_attention_heads=1, intermediate_size=8, image_size=48)
    ViTForImageClassification(stock).save_pretrained(tmp_path)
    statistics = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    ViTImageProcessorPil(size={"height": 48, "width": 48}, resample=3, **statistics).save_pretrained(tmp_path)
    picture = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
    stock_pixels = AutoImageProcessor.from_pretrained(tmp_path, **backend)(picture, return_tensors="pt")["pixel_values"]
    expected = ViTImageProcessorPil.from_pretrained(tmp_path)(picture, return_tensors="pt")["pixel_values"]
    assert (stock_pixels - expected).abs().max() < 0.05  # the two round an interpolated byte differently
    ours = encoder_image_processor(tmp_path, load_encoder(tmp_path).config)
    assert torch.allclose(ours(picture, return_tensors="pt")["pixel_values"][0], by_definition(picture), atol=1e-5)
