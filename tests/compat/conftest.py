"""Small complete checkpoints, as a user has them on disk, for the tests of other people's tools."""

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import LlavaConfig, LlavaForConditionalGeneration

from ssm_vlm import LlavaStyleConfig, LlavaStyleForConditionalGeneration

sys.path.append(str(Path(__file__).parent))
from compat_toys import make_processor, make_telling, text_config, vision_config


@pytest.fixture(scope="session")
def own_folder(tmp_path_factory):
    """A saved `LlavaStyleForConditionalGeneration` with its processor."""
    folder, processor = tmp_path_factory.mktemp("own"), make_processor()
    torch.manual_seed(0)
    config = LlavaStyleConfig(
        vision_config=vision_config(),
        text_config=text_config(processor),
        image_token_id=processor.image_token_id,
        tap_norm="layernorm",
    )
    make_telling(LlavaStyleForConditionalGeneration(config)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def stock_folder(tmp_path_factory):
    """A saved stock `LlavaForConditionalGeneration` whose tower is ours, with our processor."""
    folder, processor = tmp_path_factory.mktemp("stock"), make_processor(return_image_sizes=False)
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision_config(),
        text_config=text_config(processor),
        image_token_index=processor.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    make_telling(LlavaForConditionalGeneration(config)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(params=["own", "stock"])
def folder(request):
    return request.getfixturevalue(f"{request.param}_folder")


@pytest.fixture(scope="session")
def pictures() -> dict[str, Image.Image]:
    return {
        "red": Image.new("RGB", (60, 40), "red"),
        "grey": Image.linear_gradient("L").resize((30, 50)).convert("RGB"),
    }
