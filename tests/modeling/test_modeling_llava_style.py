"""The LLaVA-style model over encoders and language models: features, text, freezing, bad input, saving."""

import copy
import json

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from ssm_vlm import LlavaStyleConfig, LlavaStyleForConditionalGeneration, LlavaStyleModel
from ssm_vlm.modeling import modeling_llava_style

IMAGE = 40  # image token; the language models below know ids 0 to 39
SIZE = 16  # pixels per side of the square pictures: every encoder below has stride 8 at its tap, so 4 tokens

VISION = {
    "ssm_vision": dict(hidden_sizes=[4, 8], depths=[1, 1], drop_path_rate=0.9),
    "convnext": dict(
        hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, out_features=["stage2"], image_size=SIZE, drop_path_rate=0.9
    ),
    "swin": dict(
        embed_dim=4, depths=[1, 1], num_heads=[1, 2], window_size=2, out_features=["stage2"], image_size=SIZE
    ),
    "resnet": dict(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", out_features=["stage2"]),
    "dinov2": dict(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, patch_size=8, image_size=SIZE, out_features=["stage1"]
    ),
    "hidden_state_backbone": dict(
        vision_config=dict(
            model_type="vit", hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1,
            patch_size=8, image_size=SIZE,
        )
    ),
}  # fmt: skip
TEXT = {
    "llama": dict(num_key_value_heads=1),
    "llama-tied": dict(tie_word_embeddings=True),
    "qwen2": dict(num_key_value_heads=1),
    "qwen3": dict(num_key_value_heads=1, head_dim=8),
    "mistral": dict(num_key_value_heads=1),
    "phi": dict(),
    "gemma2": dict(num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.05),
    "granite": dict(logits_scaling=7.0),
    "gpt_neox": dict(),
    "gpt2": dict(n_embd=16, n_layer=2, n_head=2, n_positions=64),
    "opt": dict(ffn_dim=16, word_embed_proj_dim=16),
    "bloom": dict(n_layer=2, n_head=2),
    "mixtral": dict(num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1),
}
TEXT_COMMON = dict(
    vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip


def vision_config(name: str, **changes):
    return AutoConfig.for_model(name, **{**VISION[name], **changes})


def text_config(name: str, **changes):
    own = {"gpt2": {"hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"}}
    common = {k: v for k, v in TEXT_COMMON.items() if k not in own.get(name, ())}
    return AutoConfig.for_model(name.split("-")[0], **{**common, **TEXT[name], **changes})


def build(vision="convnext", text="llama", seed=0, **fields) -> LlavaStyleForConditionalGeneration:
    """A tiny model with weights large enough that outputs really depend on the images."""
    torch.manual_seed(seed)
    vision = vision_config(vision) if isinstance(vision, str) else vision
    text = text_config(text) if isinstance(text, str) else text
    config = LlavaStyleConfig(vision_config=vision, text_config=text, **{"image_token_id": IMAGE, **fields})
    model = LlavaStyleForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model.eval()


def row(*parts: int | str) -> list[int]:
    """Token ids; "image" stands for the four tokens of a 16x16 picture, "wide" for the eight of a 16x32 one."""
    lengths = {"image": 4, "wide": 8}
    return [t for part in parts for t in ([IMAGE] * lengths[part] if isinstance(part, str) else [part])]


def batch(*rows: list[int], side="right") -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels of rows padded to one length with 0."""
    longest = max(map(len, rows))
    pads = [[0] * (longest - len(r)) for r in rows]
    ids = torch.tensor([r + p if side == "right" else p + r for r, p in zip(rows, pads, strict=True)])
    mask = torch.tensor(
        [[1] * len(r) + p if side == "right" else p + [1] * len(r) for r, p in zip(rows, pads, strict=True)]
    )
    return dict(input_ids=ids, attention_mask=mask, labels=ids.masked_fill((ids == IMAGE) | (mask == 0), -100))


def pictures(*sizes: tuple[int, int], seed=0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, h, w, generator=generator) for h, w in sizes]


def padded(images: list[torch.Tensor], fill=9.0) -> dict[str, torch.Tensor]:
    """Images in one tensor, padded at the bottom and right with a value that would show if it were ever used."""
    height, width = max(i.shape[1] for i in images), max(i.shape[2] for i in images)
    pixels = torch.full((len(images), 3, height, width), fill)
    for canvas, image in zip(pixels, images, strict=True):
        canvas[:, : image.shape[1], : image.shape[2]] = image
    return dict(pixel_values=pixels, image_sizes=torch.tensor([i.shape[1:] for i in images]))


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


def learn(model, steps=1):
    model.train()
    for _ in range(steps):
        model(
            pixel_values=torch.stack(pictures((SIZE, SIZE), (SIZE, SIZE))),
            **batch(row(1, "image", 4), row(1, "image", 5)),
        ).loss.backward()
    return model


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


def test_a_frozen_tower_inside_a_larger_module_stays_in_eval():
    model = build()
    nn.Sequential(nn.Identity(), model).train()
    assert model.training and not model.vision_tower.training


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
        (dict(pixel_values=torch.zeros(1, 1, 3, 16, 16)), r"pixel_values has shape \[1, 1, 3, 16, 16\]: it must be"),
        (dict(pixel_values=torch.zeros(3, 16, 16)), r"pixel_values has shape \[3, 16, 16\]"),
        (
            dict(pixel_values=torch.zeros(1, 3, 16, 16), image_sizes=torch.tensor([[16, 16]] * 2)),
            r"image_sizes has shape \[2, 2\] for 1 image\(s\) in pixel_values: it must be \[1, 2\]",
        ),
        (
            dict(pixel_values=torch.zeros(1, 3, 16, 16), image_sizes=torch.tensor([[16, 17]])),
            r"image_sizes\[0\] is 16x17 but pixel_values is 16x16",
        ),
        (
            dict(pixel_values=torch.zeros(1, 3, 16, 16), image_sizes=torch.tensor([[0, 16]])),
            r"image_sizes\[0\] is 0x16",
        ),
        (
            dict(image_features=torch.zeros(1, 4, 7)),
            r"image_features\[0\] has shape \[4, 7\]: cached tap features are \[tokens, 8\]",
        ),
        (dict(image_features=torch.zeros(4, 8)), r"image_features\[0\] has shape \[8\]"),
        (
            dict(pixel_values=torch.zeros(1, 3, 16, 16), image_features=torch.zeros(1, 4, 8)),
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
    for wrong in ({}, dict(input_ids=torch.tensor([[1]]), inputs_embeds=torch.zeros(1, 1, 16))):
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


# ---------------------------------------------------------------------------------------------- saving and assembling


def equal_states(a: nn.Module, b: nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("text", TEXT)
def test_every_language_model_survives_a_save(text, tmp_path):
    model = build("ssm_vision", text)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is LlavaStyleForConditionalGeneration
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert equal_states(loaded, model)
    assert loaded.generation_config.suppress_tokens == [IMAGE]
    inputs = dict(pixel_values=torch.stack(pictures((SIZE, SIZE))), **batch(row(1, "image", 4, 5)))
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    base, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(base) is LlavaStyleModel
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert equal_states(base, model)


@pytest.mark.parametrize("vision", VISION)
def test_every_encoder_survives_a_save(vision, tmp_path):
    model = build(vision)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert equal_states(loaded, model)
    pixels = torch.stack(pictures((SIZE, SIZE)))
    with torch.no_grad():
        assert torch.equal(loaded.get_tap_features(pixels)[0], model.get_tap_features(pixels)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_another_dtype(tmp_path, dtype):
    model = build("ssm_vision")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.connector.layers[0].weight.dtype == dtype
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[key].to(value.dtype)), key


def test_attention_implementation_may_be_chosen(tmp_path):
    build("ssm_vision").save_pretrained(tmp_path)
    for name in ("eager", "sdpa"):
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation=name)
        assert loaded.language_model.config._attn_implementation == name


def parts(text="llama"):
    torch.manual_seed(1)
    vision = transformers.AutoBackbone.from_config(vision_config("ssm_vision")).eval()
    language = AutoModelForCausalLM.from_config(text_config(text)).eval()
    return vision, language


@pytest.mark.parametrize("text", ["llama", "llama-tied", "gpt2"])
def test_from_parts_keeps_the_parts(text, tmp_path):
    vision, language = parts(text)
    language.generation_config.max_new_tokens = 3
    expected = copy.deepcopy(vision), copy.deepcopy(language)
    rng = torch.get_rng_state()
    model = LlavaStyleForConditionalGeneration.from_parts(
        vision, language, image_token_id=IMAGE, connector="mlp3", tap_norm="layernorm", connector_seed=4
    )
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.vision_tower is vision and model.language_model is language
    assert equal_states(model.vision_tower, expected[0]) and equal_states(model.language_model, expected[1])
    assert model.config.connector == "mlp3" and not model.training
    assert not any(p.requires_grad for p in model.vision_tower.parameters())
    assert model.generation_config.max_new_tokens == 3
    assert model.generation_config.suppress_tokens == [IMAGE]
    assert expected[1].generation_config.suppress_tokens is None
    model.save_pretrained(tmp_path)
    assert equal_states(AutoModelForImageTextToText.from_pretrained(tmp_path), model)


def test_from_parts_gives_the_connector_the_language_models_dtype():
    vision, language = parts()
    model = LlavaStyleForConditionalGeneration.from_parts(vision, language.to(torch.bfloat16), image_token_id=IMAGE)
    assert {p.dtype for p in model.connector.parameters()} == {torch.bfloat16}
    assert model.vision_tower.dtype == torch.float32


@pytest.mark.parametrize("text", ["llama", "llama-tied", "gpt2"])
def test_resizing_the_vocabulary(text, tmp_path):
    model = build(text=text)
    tied = model.config.tie_word_embeddings
    old = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(64)
    assert model.config.get_text_config().vocab_size == 64
    assert model.get_input_embeddings().weight.shape == model.get_output_embeddings().weight.shape == (64, 16)
    assert torch.equal(model.get_input_embeddings().weight[:40], old)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert model(**batch(row(1, 50, 63))).logits.shape[-1] == 64
    model.save_pretrained(tmp_path)
    assert equal_states(AutoModelForImageTextToText.from_pretrained(tmp_path), model)


def test_tied_weights_are_stored_once(tmp_path):
    build(text="llama-tied").save_pretrained(tmp_path)
    from safetensors.torch import load_file

    keys = load_file(tmp_path / "model.safetensors").keys()
    assert sum("lm_head" in k or "embed_tokens" in k for k in keys) == 1
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight


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


def test_saved_config_is_complete(tmp_path):
    build("ssm_vision").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architectures"] == ["LlavaStyleForConditionalGeneration"]
    assert saved["vision_config"]["model_type"] == "ssm_vision" and saved["text_config"]["model_type"] == "llama"
