"""A connector is one key of a recipe: model, processor and the lengths that batches are made by all follow it."""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor

from ssm_vlm import model_downsampling
from ssm_vlm.modeling.encoder_conversion import convert_published
from ssm_vlm.training.datasets import LlavaConversations
from ssm_vlm.training.train_vlm import main as train_vlm

FIXTURES = Path(__file__).parents[1] / "fixtures"
ENCODER = [[2, "ceil"]] * 3  # of digit_identity at 64 x 64: 8 x 8 tokens


@pytest.mark.parametrize(
    ("keys", "step", "tokens"),
    [
        ({"connector": "pixel_shuffle_mlp2"}, [2, "ceil"], 16),
        ({"connector": "pixel_shuffle_linear", "connector_factor": 3}, [3, "ceil"], 9),
        ({"connector": "average_pool_mlp3", "connector_grid": [3, 5]}, [[3, 5], "at_most"], 15),
        ({"connector": "average_pool_mlp2"}, [[14, 14], "at_most"], 64),
    ],
)
def test_a_recipe_names_it(keys, step, tokens, vlm_options, scenes, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(keys))
    run = train_vlm([str(recipe), *vlm_options(tmp_path / "runs", max_steps=2)])
    processor = AutoProcessor.from_pretrained(run.path)
    model = AutoModelForImageTextToText.from_pretrained(run.path)
    assert processor.image_processor.downsampling == model_downsampling(model.config) == [*ENCODER, step]
    row = LlavaConversations(scenes / "train.json", scenes / "images")[0]
    content = [{"type": "image", "image": row["image"]}, {"type": "text", "text": "Which digit is it?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    assert (inputs["input_ids"] == processor.image_token_id).sum() == tokens
    with torch.no_grad():
        model(**inputs)
        assert model.generate(**inputs, max_new_tokens=2).shape[1] <= inputs["input_ids"].shape[1] + 2


@pytest.mark.parametrize(("connector", "tokens"), [("mlp2", 4), ("pixel_shuffle_mlp2", 1)])
def test_vmamba_at_stage_4(connector, tokens, vlm_options, tmp_path):
    """A whole published VMamba, tapped one stage later by one key: a quarter of the tokens."""
    weights = FIXTURES / "vmamba_v2_ratio2.weights.safetensors"
    folder = convert_published(weights, tmp_path / "vmamba").folder
    keys = {"vision_encoder": folder, "vision_pretrained": True, "vision_tap": "stage4", "image_size": 64}
    run = train_vlm(vlm_options(tmp_path / "runs", max_steps=1, connector=connector, **keys))
    processor = AutoProcessor.from_pretrained(run.path)
    model = AutoModelForImageTextToText.from_pretrained(run.path)
    assert model.config.vision_config.out_features == ["stage4"]
    assert processor.image_processor.downsampling == model_downsampling(model.config)
    assert processor.image_processor.downsampling[:5] == [[2, "ceil"]] * 5
    assert processor.count_image_tokens(64, 64) == tokens
    assert processor.count_image_tokens(800, 1333) == (25 * 42 if connector == "mlp2" else 13 * 21)


def test_an_option_of_another_connector_is_refused_before_anything_is_loaded(vlm_options, tmp_path, monkeypatch):
    monkeypatch.setattr("ssm_vlm.training.train_vlm.load_encoder", None)
    with pytest.raises(ValueError, match="connector_factor=2 is not read by connector='mlp2', only by pixel_shuffle"):
        train_vlm(vlm_options(tmp_path, connector_factor=2))
