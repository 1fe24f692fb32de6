"""What serving engines call: image features of their own, and how many tokens a picture of a given size becomes."""

import pytest
import torch
from compat_toys import encode, question
from transformers import AutoModelForImageTextToText, AutoProcessor

SIZES = [(40, 60), (50, 30), (7, 900)]  # height, width of raw pictures


def test_image_features_are_those_that_the_answer_uses(folder, pictures):
    """Features computed apart and put into the embeddings give the logits of the whole model."""
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    inputs = encode(processor, [question(picture) for picture in pictures.values()], add_generation_prompt=True)
    images = {key: inputs[key] for key in inputs if key not in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = model(**inputs).logits
        features = model.get_image_features(**images).pooler_output
        assert [tuple(one.shape) for one in features] == [(6, 32)] * len(pictures)
        is_image = inputs["input_ids"] == processor.image_token_id
        embeddings = model.get_input_embeddings()(inputs["input_ids"].masked_fill(is_image, 0))
        embeddings[is_image] = torch.cat(list(features))
        found = model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).logits
    assert torch.allclose(found, expected, atol=1e-5)


def test_tower_and_projector_have_the_names_that_engines_look_for(stock_folder):
    model = AutoModelForImageTextToText.from_pretrained(stock_folder)
    assert type(model.model.vision_tower).__name__ == "SSMVisionModel"
    assert model.model.multi_modal_projector.linear_1.in_features == model.config.vision_config.hidden_size == 16


@pytest.mark.parametrize("geometry", ["letterbox", "letterbox_corner", "resize"])
def test_number_of_tokens_is_that_of_the_real_call(folder, geometry):
    """vLLM's Transformers backend plans its memory with `_get_num_multimodal_tokens` before it sees a picture."""
    processor = AutoProcessor.from_pretrained(folder)
    size = {"height": 48, "width": 48} if geometry == "letterbox" else {"height": 32, "width": 80}
    processor.image_processor = type(processor.image_processor)(
        **processor.image_processor.to_dict() | {"geometry": geometry, "size": size}
    )
    planned = processor._get_num_multimodal_tokens(image_sizes=SIZES)
    assert planned["num_image_patches"] == [1] * len(SIZES)
    for (height, width), tokens in zip(SIZES, planned["num_image_tokens"], strict=True):
        inputs = processor(images=torch.zeros(3, height, width), text="<image>")
        assert sum(t == processor.image_token_id for t in inputs["input_ids"][0]) == tokens
