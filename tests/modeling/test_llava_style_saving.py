"""Saving, loading and assembling the LLaVA-style model, over encoders and language models."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers
from llava_style_toys import IMAGE, SIZE, TEXT, VISION, batch, build, learn, pictures, row, text_config, vision_config
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from ssm_vlm import LlavaStyleForConditionalGeneration, LlavaStyleModel


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
    assert language.generation_config.suppress_tokens is None
    model.save_pretrained(tmp_path)
    assert equal_states(AutoModelForImageTextToText.from_pretrained(tmp_path), model)


def test_from_parts_does_not_fill_what_was_put_into_the_parts_by_hand():
    vision, language = parts()
    language.lm_head = nn.Linear(16, 40, bias=False)
    expected = language.lm_head.weight.detach().clone()
    LlavaStyleForConditionalGeneration.from_parts(vision, language, image_token_id=IMAGE)
    assert torch.equal(language.lm_head.weight, expected)


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
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert sum("lm_head" in k or "embed_tokens" in k for k in keys) == 1
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight


def test_saved_config_is_complete(tmp_path):
    build("ssm_vision").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architectures"] == ["LlavaStyleForConditionalGeneration"]
    assert saved["vision_config"]["model_type"] == "ssm_vision" and saved["text_config"]["model_type"] == "llama"


@pytest.mark.slow
@pytest.mark.parametrize("auto", ["AutoModelForImageTextToText", "AutoModel"])
def test_a_fresh_process_loads_it_bit_equal(auto, tmp_path):
    model = build("ssm_vision", "llama-tied", tap_norm="layernorm")
    inputs = {"pixel_values": torch.stack(pictures((SIZE, SIZE))), **batch(row(1, "image", 4, 5))}
    with torch.no_grad():
        logits = model(**inputs).logits
    del inputs["labels"]
    model.save_pretrained(tmp_path / "model")
    torch.save((inputs, model.state_dict(), logits), tmp_path / "expected.pt")
    script = f"""
import sys, torch, ssm_vlm
from transformers import {auto}
model = {auto}.from_pretrained(sys.argv[1] + "/model")
inputs, state, logits = torch.load(sys.argv[1] + "/expected.pt")
own = model.state_dict()
assert own.keys() == state.keys() and all(torch.equal(own[k], state[k]) for k in state)
assert not model.training and not any(p.requires_grad for p in model.vision_tower.parameters())
with torch.no_grad():
    output = model(**inputs)
    found = output.logits if "logits" in output else model.language_model.lm_head(output.last_hidden_state)
assert torch.equal(found, logits)
print("equal")
"""
    ran = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert ran.stdout.strip().endswith("equal"), ran.stderr


def test_lora_on_the_language_model_with_a_trained_connector(tmp_path):
    """PEFT's usual recipe: adapters in the language model, the connector trained whole, the encoder left alone."""
    peft = pytest.importorskip("peft")
    model = build("ssm_vision")
    before = copy.deepcopy(model)
    lora = peft.LoraConfig(r=2, target_modules=r"language_model.*(q|v)_proj", modules_to_save=["connector"])
    adapted = peft.get_peft_model(model, lora)
    learn(adapted)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert {name.split(".")[2] for name in trained} == {"connector", "language_model"}
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad)
    adapted.eval().save_pretrained(tmp_path)
    inputs = {"pixel_values": torch.stack(pictures((SIZE, SIZE))), **batch(row(1, "image", 4, 5))}
    with torch.no_grad():
        expected = adapted(**inputs).logits
        assert not torch.allclose(expected, before(**inputs).logits)
        loaded = peft.PeftModel.from_pretrained(before, tmp_path).eval()
        assert torch.equal(loaded(**inputs).logits, expected)
        torch.testing.assert_close(loaded.merge_and_unload()(**inputs).logits, expected, atol=1e-5, rtol=1e-4)
