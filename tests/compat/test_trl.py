"""Supervised fine-tuning by `trl` with its own data collator, nothing of ours but model and processor."""

import pytest
import torch
from compat_toys import LINEAR_LAYERS, conversation
from transformers import AutoModelForImageTextToText, AutoProcessor

pytest.importorskip("trl")
pytest.importorskip("datasets")

from datasets import Dataset
from trl import SFTConfig, SFTTrainer


def rows(pictures):
    """trl's form: the pictures in a column of their own, in the order of the places for them in the messages."""
    for name, picture in pictures.items():
        messages = conversation(None, name)
        for part in messages[0]["content"]:
            part.pop("image", None)
        yield {"messages": messages, "images": [picture]}


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
def test_sft(folder, pictures, tmp_path, with_lora):
    from peft import LoraConfig

    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    tower = {name: value.clone() for name, value in model.state_dict().items() if "vision_tower" in name}
    trainer = SFTTrainer(
        model=model,
        processing_class=processor,
        train_dataset=Dataset.from_list(list(rows(pictures))),
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=8,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            max_length=None,
            seed=0,
        ),
        peft_config=LoraConfig(r=4, target_modules=LINEAR_LAYERS) if with_lora else None,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 8 and losses[-1] < 0.9 * losses[0]
    trainer.save_model(str(tmp_path / "tuned"))
    if not with_lora:
        again = AutoModelForImageTextToText.from_pretrained(tmp_path / "tuned")
        assert all(torch.equal(value, trainer.model.state_dict()[name]) for name, value in again.state_dict().items())
    if "own" in str(folder):  # our model keeps a frozen tower frozen under anybody's trainer
        after = {name.removeprefix("base_model.model."): value for name, value in trainer.model.state_dict().items()}
        assert all(torch.equal(value, after[name]) for name, value in tower.items())
