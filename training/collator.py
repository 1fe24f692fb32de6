"""Conversations with and without pictures -> one padded batch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from .labels import IGNORE_INDEX, tokenize_conversation


class ConversationCollator:
    """Tokenises rows of `LlavaConversations` and pads them on the right.

    Args:
        processor: a `LlavaStyleProcessor`.
        max_text_length: text tokens to keep of each row, see `tokenize_conversation`.

    Returns of a call: `input_ids`, `labels`, `attention_mask` [B, L]; with pictures in any row `pixel_values`
    [n, 3, H, W] and `image_sizes` [n, 2], the pictures of all rows in order, padded to the largest; `sample_ids`, the
    rows' ids.
    """

    def __init__(self, processor: Any, max_text_length: int | None = None):
        self.processor = processor
        self.max_text_length = max_text_length
        self.padding_id = processor.tokenizer.pad_token_id
        if self.padding_id is None:
            raise ValueError("The tokenizer has no pad token: set one, for example tokenizer.pad_token = '<pad>'.")

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        samples = [
            tokenize_conversation(
                self.processor, row["messages"], as_list(row["image"]), self.max_text_length, sample_id=row["id"]
            )
            for row in rows
        ]
        ids = [sample["input_ids"] for sample in samples]
        batch: dict[str, Any] = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.padding_id),
            "labels": pad_sequence([s["labels"] for s in samples], batch_first=True, padding_value=IGNORE_INDEX),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "sample_ids": [row["id"] for row in rows],
        }
        with_pictures = [sample for sample in samples if "pixel_values" in sample]
        if with_pictures:
            sizes = torch.cat([sample["image_sizes"] for sample in with_pictures])  # [n, 2]
            height, width = sizes.max(0).values.tolist()
            pixels = [_pad(sample["pixel_values"], height, width) for sample in with_pictures]
            batch |= {"pixel_values": torch.cat(pixels), "image_sizes": sizes}
        return batch


def as_list(image: Any) -> list[Any]:
    """The pictures of a row: none, one, or several."""
    if image is None:
        return []
    return list(image) if isinstance(image, list | tuple) else [image]


def _pad(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[n, 3, h, w] -> [n, 3, height, width], zeros at the bottom and right."""
    return torch.nn.functional.pad(pixels, (0, width - pixels.shape[-1], 0, height - pixels.shape[-2]))
