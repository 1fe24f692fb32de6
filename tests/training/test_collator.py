"""Rows of conversations -> one batch: padding, pictures of several sizes, ids."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from ssm_vlm import LlavaStyleImageProcessor, LlavaStyleProcessor
from ssm_vlm.training.collator import ConversationCollator
from ssm_vlm.training.labels import tokenize_conversation
from ssm_vlm.training.train_language_model import train_tokenizer

TEXTS = ["USER: What is it? ASSISTANT: A bus.</s>", "a longer text about nothing at all, to learn a few tokens from"]


@pytest.fixture(scope="module")
def processor():
    images = LlavaStyleImageProcessor(geometry="letterbox_corner", size=64, size_divisor=8, downsampling=[[8, "ceil"]])
    return LlavaStyleProcessor(images, train_tokenizer(TEXTS * 5, 300))


def turns(question: str, answer: str, pictures: int = 0) -> list[dict]:
    content = [{"type": "image"}] * pictures + [{"type": "text", "text": question}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def picture(height: int, width: int, value: int) -> Image.Image:
    return Image.new("RGB", (width, height), (value, value, value))


@pytest.fixture(scope="module")
def rows():
    return [
        {"id": "text", "image": None, "messages": turns("What is it?", "Nothing.")},
        {"id": "one", "image": picture(24, 40, 200), "messages": turns("What is this, in a few words?", "A bus.", 1)},
        {"id": "two", "image": [picture(64, 16, 100), picture(8, 8, 50)], "messages": turns("And?", "Two.", 2)},
    ]


def test_each_row_is_its_own_sample_padded_on_the_right(processor, rows):
    batch = ConversationCollator(processor)(rows)
    assert batch["sample_ids"] == ["text", "one", "two"]
    length = batch["input_ids"].shape[1]
    for place, row in enumerate(rows):
        images = {"text": [], "one": [row["image"]]}.get(row["id"], row["image"])
        alone = tokenize_conversation(processor, row["messages"], images)
        own = len(alone["input_ids"])
        assert torch.equal(batch["input_ids"][place, :own], alone["input_ids"])
        assert torch.equal(batch["labels"][place, :own], alone["labels"])
        assert batch["attention_mask"][place].tolist() == [1] * own + [0] * (length - own)
        assert (batch["input_ids"][place, own:] == processor.tokenizer.pad_token_id).all()
        assert (batch["labels"][place, own:] == -100).all()
    assert (batch["attention_mask"].sum(1) == length).any(), "no longer than the longest row"


def test_pictures_of_all_rows_come_in_order_padded_to_the_largest(processor, rows):
    batch = ConversationCollator(processor)(rows)
    assert batch["pixel_values"].shape == (3, 3, 64, 40)
    assert batch["image_sizes"].tolist() == [[24, 40], [64, 16], [8, 8]]
    mean, std = processor.image_processor.image_mean[0], processor.image_processor.image_std[0]
    for place, (value, (height, width)) in enumerate(zip((200, 100, 50), batch["image_sizes"].tolist(), strict=True)):
        pixels = batch["pixel_values"][place]
        assert torch.allclose(pixels[0, :height, :width], torch.tensor((value / 255 - mean) / std), atol=1e-4)
        assert (pixels[:, height:] == 0).all() and (pixels[:, :, width:] == 0).all()
    tokens = (batch["input_ids"] == processor.image_token_id).sum(1).tolist()
    assert tokens == [0, 3 * 5, 8 * 2 + 1]


def test_a_batch_of_text_has_no_pictures(processor, rows):
    batch = ConversationCollator(processor)(rows[:1])
    assert set(batch) == {"input_ids", "labels", "attention_mask", "sample_ids"}


def test_text_is_cut_but_pictures_are_not(processor, rows):
    whole = ConversationCollator(processor)(rows)
    cut = ConversationCollator(processor, max_text_length=int(whole["attention_mask"][0].sum()) - 2)(rows[:1])
    assert cut["input_ids"].shape[1] == whole["attention_mask"][0].sum() - 2
    assert torch.equal(cut["input_ids"][0], whole["input_ids"][0, : cut["input_ids"].shape[1]])


def test_a_row_that_leaves_nothing_to_learn_is_named(processor, rows):
    with pytest.raises(ValueError, match="Sample 'one' leaves nothing to learn"):
        ConversationCollator(processor, max_text_length=3)(rows[1:])


def test_a_tokenizer_without_padding_is_refused_before_training():
    with pytest.raises(ValueError, match="The tokenizer has no pad token"):
        ConversationCollator(SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=None)))
