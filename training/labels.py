"""A conversation -> input ids and labels: only what the assistant says is learned.

Labels are found by what the chat template says, never by searching strings: by its generation marks where it has them,
else by the difference between the prompt up to an answer and the prompt with it.
"""

import re
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any

import jinja2
import torch

from ..modeling.chat_templates import render_conversations

IGNORE_INDEX = -100  # what Transformers' losses skip
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]  # characters, end exclusive


def tokenize_conversation(
    processor: Any,
    messages: list[dict[str, Any]],
    images: Sequence[Any] | None = None,
    max_length: int | None = None,
    *,
    image_token_counts: Sequence[int] | None = None,
    sample_id: Any = None,
) -> dict[str, torch.Tensor]:
    """One training sample.

    Args:
        processor: a `LlavaStyleProcessor`.
        messages: `{"role", "content"}` in order; pictures are content parts `{"type": "image"}`.
        images: the pictures in order of their content parts (see `load_image` for what counts as one); where None,
            those that the content parts name (`image`, `url`, `path` or `base64`).
        max_length: keep at most this many tokens of text, from the start; image tokens come on top and are never cut
            (paper release: 2048 tokens of text).
        image_token_counts: instead of pictures, the tokens of each: for training from cached features.
        sample_id: named in errors.

    Returns:
        `input_ids` [L] and `labels` [L], int64, labels -100 but on what the assistant says and the token that ends it;
        and, with pictures, `pixel_values` [n, 3, H, W] and `image_sizes` [n, 2].

    Raises:
        ValueError: pictures and placeholders differ in number, there is no answer to learn from, truncation leaves
            none, or the template renders a turn differently once later turns follow (it then needs generation marks).
    """
    where = "A conversation" if sample_id is None else f"Sample {sample_id!r}"
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where} has no assistant message, so there is nothing to learn from it.")
    try:
        text, spans = _render_with_spans(processor, messages, where)
    except jinja2.TemplateError as error:
        raise ValueError(f"{where} does not fit the chat template: {error}") from error

    sample = {}
    if image_token_counts is None:
        images = _named_images(messages) if images is None else list(images)
        if images:
            sample.update(processor.image_processor(images, return_tensors="pt", return_image_sizes=True))
            image_token_counts = [processor.count_image_tokens(h, w) for h, w in sample["image_sizes"].tolist()]

    bos = processor.tokenizer.bos_token
    encoded = processor.tokenizer(
        text,
        add_special_tokens=not (bos and text.startswith(bos)),
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,  # no warning about the tokenizer's model_max_length: max_length is the caller's to choose
    )
    input_ids = encoded["input_ids"]
    targets = _labels(input_ids, encoded["offset_mapping"], text, spans, where)
    ids, labels = _cut_and_expand(
        input_ids, targets, processor.image_token_id, list(image_token_counts or []), max_length, where
    )
    if not (labels != IGNORE_INDEX).any():
        reason = (
            "its answers are empty" if max_length is None else f"its first {max_length} tokens of text hold no answer"
        )
        raise ValueError(f"{where} leaves nothing to learn: {reason}.")
    return {"input_ids": ids, "labels": labels, **sample}


def _named_images(messages: list[dict[str, Any]]) -> list[Any]:
    parts = chain.from_iterable(m["content"] for m in messages if not isinstance(m["content"], str))
    keys = ("image", "url", "path", "base64")
    return [part[key] for part in parts if part["type"] == "image" for key in keys if part.get(key) is not None]


def _render_with_spans(processor: Any, messages: list[dict[str, Any]], where: str) -> tuple[str, list[Span]]:
    """The rendered conversation, and the characters of it that the assistant says."""
    template = processor.default_template
    render = partial(render_conversations, chat_template=template, **processor.template_variables)
    if _GENERATION_MARK.search(template):
        (text,), (spans,) = render([messages], return_assistant_tokens_mask=True)
        return text, spans

    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    (text, *answered), _ = render([messages, *(messages[: index + 1] for index in answers)])
    prompts, _ = render([messages[:index] for index in answers], add_generation_prompt=True)
    closing = tuple(processor.tokenizer.added_tokens_encoder)
    spans = []
    for index, prompt, turn in zip(answers, prompts, answered, strict=True):
        if not (turn.startswith(prompt) and text.startswith(turn)):
            raise ValueError(
                f"{where}: the chat template does not render message {index} as a continuation of its prompt, so what "
                "the model says cannot be told apart; put {% generation %} ... {% endgeneration %} around the "
                "assistant's words in the template."
            )
        # The model stops at the token that closes its turn; white space behind it is the template's, not the model's.
        stripped = turn.rstrip()
        spans.append((len(prompt), len(stripped) if stripped.endswith(closing) else len(turn)))
    return text, spans


def _labels(input_ids: list[int], offsets: list[Span], text: str, spans: list[Span], where: str) -> list[int]:
    """`input_ids` where a token overlaps a span, else -100. Tokens and spans are in order of their characters.

    A token that begins in the prompt and ends in a word of the answer is refused: generation would be given another
    prompt than training. Without such a token the prompt is cut into the same tokens whether or not an answer follows.
    White space that an answer begins with may join with the prompt's last white space; that is kept.
    """
    labels = [IGNORE_INDEX] * len(input_ids)
    remaining = iter(spans)
    start, end = next(remaining, (0, 0))
    for position, (token_start, token_end) in enumerate(offsets):
        while token_start >= end and (following := next(remaining, None)):
            start, end = following
        if start < token_end and token_start < end and token_start < token_end:
            labels[position] = input_ids[position]
            if token_start < start and not text[start:token_end].isspace():
                raise ValueError(
                    f"{where}: the tokenizer joins the end of the prompt and the beginning of the answer in one token, "
                    f"{text[token_start:token_end]!r}, so training would not match generation; let the template's "
                    "generation prompt end where a token ends (often: without white space)."
                )
    return labels


def _cut_and_expand(
    input_ids: list[int], labels: list[int], image_token_id: int, counts: list[int], max_length: int | None, where: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut the text to `max_length`, then repeat each placeholder as often as its picture has tokens. [L], [L]."""
    ids, targets = torch.tensor(input_ids), torch.tensor(labels)
    is_image = ids == image_token_id
    if is_image.sum() != len(counts):
        raise ValueError(
            f"{where} has {is_image.sum()} image placeholders but {len(counts)} pictures: each picture needs exactly "
            "one."
        )
    if max_length is not None:
        keep = is_image | ((~is_image).cumsum(0) <= max_length)
        ids, targets, is_image = ids[keep], targets[keep], is_image[keep]
    targets[is_image] = IGNORE_INDEX
    if counts:
        repeats = torch.ones_like(ids)
        repeats[is_image] = torch.tensor(counts)
        ids, targets = ids.repeat_interleave(repeats), targets.repeat_interleave(repeats)
    return ids, targets
