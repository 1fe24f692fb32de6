"""Loading options that users of Transformers expect, for our model and for the stock one with our tower."""

import pytest
import torch
from accelerate import infer_auto_device_map
from compat_toys import encode, question
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline


def logits(model, processor, picture):
    with torch.no_grad():
        return model(**encode(processor, [question(picture)], add_generation_prompt=True).to(model.dtype)).logits


@pytest.fixture
def expected(folder, pictures):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    return logits(model, AutoProcessor.from_pretrained(folder), pictures["red"])


@pytest.mark.parametrize("options", [{"device_map": "auto"}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}])
def test_device_map(folder, pictures, expected, options):
    model = AutoModelForImageTextToText.from_pretrained(folder, **options)
    assert torch.equal(logits(model, AutoProcessor.from_pretrained(folder), pictures["red"]), expected)


def test_part_of_the_model_on_disk(folder, pictures, expected, tmp_path):
    """What `device_map="auto"` does where memory is short: whole layers are left on disk and come for their turn."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    blocks = list(model._no_split_modules)
    device_map = infer_auto_device_map(model, max_memory={"cpu": int(0.6 * size)}, no_split_module_classes=blocks)
    assert set(device_map.values()) == {"cpu", "disk"}
    split = AutoModelForImageTextToText.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)
    assert torch.allclose(logits(split, AutoProcessor.from_pretrained(folder), pictures["red"]), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", torch.float16])
def test_dtype(folder, pictures, expected, tmp_path, dtype):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
    wanted = torch.float32 if dtype == "auto" else getattr(torch, str(dtype).removeprefix("torch."))
    assert model.dtype == wanted and {p.dtype for p in model.parameters()} == {wanted}
    found = logits(model, AutoProcessor.from_pretrained(folder), pictures["red"])
    assert (found.float() - expected).norm() <= 3e-2 * expected.norm()
    model.save_pretrained(tmp_path)
    assert AutoModelForImageTextToText.from_pretrained(tmp_path, dtype="auto").dtype == wanted


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_attention_of_the_language_model(folder, pictures, expected, implementation):
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation=implementation)
    assert model.config.text_config._attn_implementation == implementation
    if implementation != "flex_attention":  # which has no CPU kernel for such small heads
        found = logits(model, AutoProcessor.from_pretrained(folder), pictures["red"])
        assert torch.allclose(found, expected, atol=1e-4)


def test_pipeline_answers_a_batch_of_pictures(folder, pictures):
    ask = pipeline("image-text-to-text", model=str(folder))
    options = {"max_new_tokens": 4, "do_sample": False}
    answers = ask(text=[question(picture) for picture in pictures.values()], return_full_text=False, **options)
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    for picture, answer in zip(pictures.values(), answers, strict=True):
        inputs = encode(processor, [question(picture)], add_generation_prompt=True)
        ids = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        answer = answer[0] if isinstance(answer, list) else answer
        assert answer["generated_text"].strip() == processor.decode(ids, skip_special_tokens=True).strip()
