"""The LLaVA-style model over encoders and language models: features, text, freezing, bad input, saving."""

import copy

import pytest
import torch
import transformers
from llava_style_toys import IMAGE, SIZE, TEXT, VISION, batch, build, learn, padded, pictures, row, vision_config
from torch import nn

from ssm_vlm import LlavaStyleForConditionalGeneration, LlavaStyleModel
from ssm_vlm.modeling import modeling_llava_style

# ---------------------------------------------------------------------------------------------- features and text


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("tap_norm", ["none", "layernorm"])
def test_image_features_are_connector_of_normed_row_major_tap(vision, tap_norm):
    model = build(vision, tap_norm=tap_norm)
    pixels = torch.stack(pictures((SIZE, 2 * SIZE), (SIZE, 2 * SIZE)))
    with torch.no_grad():
        feature_map = model.vision_tower(pixels).feature_maps[-1]
        assert feature_map.shape == (2, 8, 2, 4)
        for image, feature in zip(feature_map, model.get_image_features(pixels).pooler_output, strict=True):
            tokens = torch.stack([image[:, y, x] for y in range(2) for x in range(4)])
            if tap_norm == "layernorm":
                mean, variance = tokens.mean(-1, keepdim=True), tokens.var(-1, correction=0, keepdim=True)
                tokens = (tokens - mean) / (variance + 1e-5).sqrt()
            torch.testing.assert_close(feature, model.connector(tokens), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("vision", ["ssm_vision", "swin"])
def test_the_last_output_feature_is_the_tap(vision):
    """A backbone that also gives earlier maps, for a dense head, feeds the language model from its last one."""
    one, two = (build(vision_config(vision, out_features=f)) for f in (["stage2"], ["stage1", "stage2"]))
    two.load_state_dict(one.state_dict(), strict=False)  # some backbones have a norm for each output
    pixels = torch.stack(pictures((SIZE, SIZE)))
    with torch.no_grad():
        assert torch.equal(
            one.get_image_features(pixels).pooler_output[0], two.get_image_features(pixels).pooler_output[0]
        )


@pytest.mark.parametrize("text", TEXT)
def test_logits_are_the_language_models_own(text):
    """Head, bias, soft cap and scaling of the family hold, with the features where the image tokens stand."""
    model = build(text=text)
    inputs = batch(row(1, 3, "image", 4, 5), row(1, "image", 6, 7, 8))
    pixels = torch.stack(pictures((SIZE, SIZE), (SIZE, SIZE)))
    with torch.no_grad():
        output = model(pixel_values=pixels, **inputs)
        embeds = model.get_input_embeddings()(inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, 7))
        features = model.get_image_features(pixels).pooler_output
        embeds[0, 2:6], embeds[1, 1:5] = features[0], features[1]
        expected = model.language_model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
        torch.testing.assert_close(output.logits, expected)
        shifted = inputs["labels"][:, 1:]
        loss = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), shifted.flatten(), ignore_index=-100)
        torch.testing.assert_close(output.loss, loss)
        assert output.image_hidden_states.shape == (8, 16)
        other = model(pixel_values=pixels + 1, **inputs)
    assert (other.logits - output.logits)[0, 6:].abs().max() > 1e-4  # the text after the image has seen it


def test_base_model_gives_the_hidden_states_under_the_head():
    model = build()
    base = LlavaStyleModel(model.config)
    base.load_state_dict(model.state_dict())
    inputs = batch(row(1, "image", 4, 5))
    del inputs["labels"]
    pixels = torch.stack(pictures((SIZE, SIZE)))
    with torch.no_grad():
        hidden = base.eval()(pixel_values=pixels, **inputs).last_hidden_state
        torch.testing.assert_close(model.language_model.lm_head(hidden), model(pixel_values=pixels, **inputs).logits)


@pytest.mark.parametrize("vision", VISION)
def test_mixed_sizes_equal_one_by_one(vision):
    model = build(vision)
    images = pictures((SIZE, SIZE), (2 * SIZE, SIZE), (SIZE, 3 * SIZE), (SIZE, SIZE))
    with torch.no_grad():
        together = model.get_image_features(**padded(images)).pooler_output
        alone = [model.get_image_features(image[None]).pooler_output[0] for image in images]
    assert [len(features) for features in together] == [4, 8, 12, 4]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_mixed_batch_with_text_only_row_equals_rows_alone():
    model = build()
    rows = [row(1, 3, 4), row(1, "image", 5, "wide", 6), row(1, "wide", 7)]
    images = pictures((SIZE, SIZE), (SIZE, 2 * SIZE), (2 * SIZE, SIZE))
    with torch.no_grad():
        together = model(**batch(*rows), **padded(images)).logits
        alone = [
            model(**batch(rows[0])).logits,
            model(**batch(rows[1]), **padded(images[:2])).logits,
            model(**batch(rows[2]), **padded(images[2:])).logits,
        ]
    for i, expected in enumerate(alone):
        torch.testing.assert_close(together[i, : len(rows[i])], expected[0], atol=1e-5, rtol=1e-4)


def test_text_only_equals_the_language_model_alone():
    model = build()
    inputs = batch(row(1, 3, 4, 5))
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).loss, model.language_model(**inputs).loss)
        assert model(**inputs).image_hidden_states is None


@pytest.mark.parametrize("images", [{"pixel_values": torch.zeros(0, 3, 16, 16)}, {"image_features": []}])
def test_an_empty_batch_of_images_is_text_only(images):
    model = build()
    inputs = batch(row(1, 3, 4, 5))
    with torch.no_grad():
        assert torch.equal(model(**inputs, **images).logits, model(**inputs).logits)


@pytest.mark.parametrize("as_tensor", [True, False])
@pytest.mark.parametrize("tap_norm", ["none", "layernorm"])
def test_cached_tap_features_stand_for_pixels(as_tensor, tap_norm):
    model = build(tap_norm=tap_norm)
    images = pictures((SIZE, SIZE), (SIZE, SIZE if as_tensor else 2 * SIZE))
    inputs = batch(row(1, "image", 4), row(1, "image" if as_tensor else "wide", 5))
    with torch.no_grad():
        cache = model.get_tap_features(**padded(images))
        cache = torch.stack(cache) if as_tensor else cache
        from_pixels = model(**inputs, **padded(images))
        model.vision_tower.forward = None  # must not run
        torch.testing.assert_close(model(image_features=cache, **inputs).logits, from_pixels.logits)
        generated = model.generate(inputs["input_ids"], image_features=cache, max_new_tokens=3)
    assert generated.shape == (2, inputs["input_ids"].shape[1] + 3)


def test_image_token_inside_the_vocabulary_gets_no_gradient():
    model = build(image_token_id=39).train()
    ids = batch(row(1, "image", 4, 5))["input_ids"].masked_fill_(batch(row(1, "image", 4, 5))["input_ids"] == IMAGE, 39)
    model(
        input_ids=ids, labels=ids.masked_fill(ids == 39, -100), pixel_values=torch.stack(pictures((SIZE, SIZE)))
    ).loss.backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient[4].abs().sum() > 0
    assert gradient[39].abs().sum() == 0 and gradient[0].abs().sum() == 0


def test_pixels_follow_the_encoders_dtype_and_features_the_language_models():
    model = build("ssm_vision", tap_norm="layernorm")
    model.to(torch.bfloat16).vision_tower.float()
    output = model(pixel_values=torch.stack(pictures((SIZE, SIZE))).double(), **batch(row(1, "image", 4, 5)))
    assert output.logits.dtype == torch.bfloat16 and output.loss.isfinite()
    output.loss.backward()
    assert model.connector.layers[0].weight.grad.dtype == torch.bfloat16


def test_bfloat16_stays_close_to_float32():
    model = build("ssm_vision")
    inputs = dict(pixel_values=torch.stack(pictures((SIZE, SIZE))), **batch(row(1, "image", 4, 5)))
    with torch.no_grad():
        exact = model(**inputs).logits
        coarse = copy.deepcopy(model).to(torch.bfloat16)(**inputs).logits
    assert coarse.dtype == torch.bfloat16
    assert (coarse.float() - exact).norm() < 0.05 * exact.norm()


# ---------------------------------------------------------------------------------------------- frozen means frozen


@pytest.mark.parametrize("vision", VISION)
def test_frozen_encoder_is_inert_in_training(vision):
    model = build(vision)
    before = copy.deepcopy(model.vision_tower.state_dict())
    pixels = torch.stack(pictures((SIZE, SIZE), (SIZE, SIZE)))
    with torch.no_grad():
        expected = model.get_tap_features(pixels)
    learn(model)
    assert not any(module.training for module in model.vision_tower.modules())
    assert model.language_model.training and model.connector.training
    assert not any(p.requires_grad or p.grad is not None for p in model.vision_tower.parameters())
    assert all(p.grad is not None for p in model.connector.parameters())
    features = model.get_tap_features(pixels)
    assert not features[0].requires_grad
    assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))  # DropPath inert
    assert all(torch.equal(v, before[k]) for k, v in model.vision_tower.state_dict().items())  # BatchNorm inert


@pytest.mark.parametrize(
    ("vision", "changes"), [("resnet", "buffers"), ("ssm_vision", "features"), ("convnext", "features")]
)
def test_vision_train_mode_reproduces_the_reference(vision, changes):
    """Frozen weights, but BatchNorm on batch statistics and DropPath active."""
    model = learn(build(vision, vision_train_mode=True))
    assert all(module.training for module in model.vision_tower.modules())
    assert not any(p.requires_grad or p.grad is not None for p in model.vision_tower.parameters())
    pixels = torch.stack(pictures(*[(SIZE, SIZE)] * 8))
    if changes == "buffers":
        before = {k: v.clone() for k, v in model.vision_tower.named_buffers()}
        model.get_tap_features(pixels)
        assert any(not torch.equal(v, before[k]) for k, v in model.vision_tower.named_buffers())
    else:
        trained = torch.stack(model.get_tap_features(pixels))
        assert not torch.allclose(trained, torch.stack(model.eval().get_tap_features(pixels)))
    assert not any(module.training for module in model.eval().vision_tower.modules())


@pytest.mark.parametrize("vision", VISION)
def test_unfrozen_encoder_learns(vision):
    model = learn(build(vision, freeze_vision=False))
    assert all(module.training for module in model.vision_tower.modules())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.vision_tower.parameters())


def test_freezing_survives_a_save_and_can_be_lifted_at_loading(tmp_path):
    build().save_pretrained(tmp_path)
    loaded = LlavaStyleForConditionalGeneration.from_pretrained(tmp_path)
    assert not any(p.requires_grad for p in loaded.vision_tower.parameters())
    assert all(p.requires_grad for p in loaded.connector.parameters())
    thawed = LlavaStyleForConditionalGeneration.from_pretrained(tmp_path, freeze_vision=False)
    assert all(p.requires_grad for p in thawed.vision_tower.parameters())
    learn(thawed)


def test_a_frozen_encoder_builds_no_graph():
    """Even where something made its parameters trainable behind the model's back."""
    model = build().train()
    model.vision_tower.requires_grad_(True)
    assert not model.get_tap_features(torch.stack(pictures((SIZE, SIZE))))[0].requires_grad


def test_a_frozen_tower_inside_a_larger_module_stays_in_eval():
    model = build()
    nn.Sequential(nn.Identity(), model).train()
    assert model.training and not model.vision_tower.training


def test_activation_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = build("ssm_vision")
        if checkpointing:
            model.activation_checkpointing_enable()
            assert any(getattr(m, "gradient_checkpointing", False) for m in model.language_model.modules())
        learn(model)
        gradients.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and any("connector" in k for k in gradients[0])
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value)


# ---------------------------------------------------------------------------------------------- bad input


def message_of(call) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    return str(caught.value)


def test_a_missing_image_token_is_told_with_both_counts():
    model = build()
    pixels = torch.stack(pictures((SIZE, SIZE)))
    text = message_of(lambda: model(pixel_values=pixels, **batch(row(1, IMAGE, IMAGE, IMAGE, 4))))
    assert "hold 3 image tokens ([3] per row) but the 1 image(s) give 4 features ([4] per image)" in text
    assert "num_image_tokens(height, width)" in text


def test_image_tokens_without_image_are_told():
    text = message_of(lambda: build()(**batch(row(1, "image", 4))))
    assert "hold 4 image tokens ([4] per row) but the 0 image(s) give 0 features" in text


def test_an_image_without_image_tokens_is_told():
    model = build()
    pixels = torch.stack(pictures((SIZE, SIZE)))
    assert "hold 0 image tokens" in message_of(lambda: model(pixel_values=pixels, **batch(row(1, 4))))


def test_an_image_spread_over_two_rows_is_told():
    model = build()
    inputs = batch(row(1, IMAGE, IMAGE, 4), row(1, "image", IMAGE, IMAGE))
    text = message_of(lambda: model(pixel_values=torch.stack(pictures((SIZE, SIZE), (SIZE, SIZE))), **inputs))
    assert text.startswith(
        "Row 0 of input_ids holds 2 image tokens ([2, 6] per row), which is no whole number of images"
    )


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({"pixel_values": torch.zeros(1, 1, 3, 16, 16)}, r"pixel_values has shape \[1, 1, 3, 16, 16\]: it must be"),
        ({"pixel_values": torch.zeros(3, 16, 16)}, r"pixel_values has shape \[3, 16, 16\]"),
        (
            {"pixel_values": torch.zeros(1, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]] * 2)},
            r"image_sizes has shape \[2, 2\] for 1 image\(s\) in pixel_values: it must be \[1, 2\]",
        ),
        (
            {"pixel_values": torch.zeros(1, 3, 16, 16), "image_sizes": torch.tensor([[16, 17]])},
            r"image_sizes\[0\] is 16x17 but pixel_values is 16x16",
        ),
        (
            {"pixel_values": torch.zeros(1, 3, 16, 16), "image_sizes": torch.tensor([[0, 16]])},
            r"image_sizes\[0\] is 0x16",
        ),
        (
            {"image_features": torch.zeros(1, 4, 7)},
            r"image_features\[0\] has shape \[4, 7\]: cached tap features are \[tokens, 8\]",
        ),
        ({"image_features": torch.zeros(4, 8)}, r"image_features\[0\] has shape \[8\]"),
        (
            {"pixel_values": torch.zeros(1, 3, 16, 16), "image_features": torch.zeros(1, 4, 8)},
            "either pixel_values or image_features",
        ),
    ],
)
def test_wrong_shapes_are_told(images, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        model(**images, **batch(row(1, "image", 4)))


def test_neither_or_both_kinds_of_text_are_told():
    model = build()
    for wrong in ({}, {"input_ids": torch.tensor([[1]]), "inputs_embeds": torch.zeros(1, 1, 16)}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**wrong)


def test_images_need_to_know_the_image_token():
    model = build(image_token_id=None)
    with pytest.raises(ValueError, match="config.image_token_id to know them by"):
        model(input_ids=torch.tensor([[1, 2]]), image_features=torch.zeros(1, 4, 8))
    assert model(**batch(row(1, 3))).loss.isfinite()


def test_a_batch_with_nothing_to_learn_is_told():
    inputs = batch(row(1, 3, 4))
    inputs["labels"] = torch.tensor([[1, -100, -100]])
    with pytest.raises(ValueError, match="nothing to learn from"):
        build()(**inputs)


def test_loss_may_be_counted_over_several_batches():
    """With num_items_in_batch, as the Trainer passes it, the loss is a sum over the batch divided by that number."""
    model = build()
    inputs = batch(row(1, 3, 4, 5))
    torch.testing.assert_close(model(**inputs, num_items_in_batch=30).loss * 10, model(**inputs).loss)


def test_too_long_a_sequence_warns_once_and_still_runs(monkeypatch):
    said = []
    monkeypatch.setattr(modeling_llava_style.logger, "warning", said.append)
    model = build()
    with torch.no_grad():
        model(**batch([1] + [3] * 63))
        assert not said
        for _ in range(2):
            assert model(**batch([1] + [3] * 64)).loss.isfinite()
    assert len(said) == 1
    assert "has 65 tokens, images included, but the language model was made for 64 (max_position_embeddings)" in said[0]


def test_a_recurrent_language_model_is_refused():
    text = transformers.MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1)
    with pytest.raises(ValueError, match="MambaForCausalLM takes no past_key_values and cannot be the language model"):
        build(text=text)
