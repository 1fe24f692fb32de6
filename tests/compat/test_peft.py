"""LoRA by `peft` on the whole vision-language model: train, merge, save, load."""

import pytest
import torch
from compat_toys import LINEAR_LAYERS, conversation, encode
from transformers import AutoModelForImageTextToText, AutoProcessor

peft = pytest.importorskip("peft")


def batch(processor, pictures):
    inputs = encode(processor, [conversation(picture, name) for name, picture in pictures.items()])
    pads = inputs["input_ids"] == processor.tokenizer.pad_token_id
    inputs["labels"] = inputs["input_ids"].masked_fill(pads | (inputs["input_ids"] == processor.image_token_id), -100)
    return inputs


@pytest.fixture
def tuned(folder, pictures):
    """A model after a few steps of LoRA on the language model's attention, with the connector trained whole."""
    torch.manual_seed(0)
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    whole = "connector" if hasattr(model, "connector") else "multi_modal_projector"
    config = peft.LoraConfig(r=4, target_modules=LINEAR_LAYERS, modules_to_save=[whole], lora_dropout=0.0)
    model = peft.get_peft_model(model, config)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or whole in name for name in trained)
    assert not any("vision_tower" in name for name in trained)
    assert any("lora_" in name for name in trained) and any(whole in name for name in trained)
    inputs = batch(processor, pictures)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**inputs).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    return model.eval(), inputs


def test_merged_model_is_an_ordinary_checkpoint(tuned, tmp_path):
    model, inputs = tuned
    with torch.no_grad():
        expected = model(**inputs).logits
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(again) is type(merged) and not any("lora" in name for name, _ in again.named_parameters())
    with torch.no_grad():
        found = again(**inputs).logits
    assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max().item())


def test_adapter_alone_loads_onto_the_base(tuned, folder, tmp_path):
    model, inputs = tuned
    with torch.no_grad():
        expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    saved = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert saved < 0.5 * sum(p.numel() * 4 for p in model.parameters())
    base = AutoModelForImageTextToText.from_pretrained(folder)
    again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, expected)
