"""Whole VLMs: time to the first token and decode speed over sizes, connectors and language models; random weights."""

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..modeling.connectors import model_downsampling
from ..modeling.modeling_llava_style import LlavaStyleForConditionalGeneration
from ..modeling.token_grid import num_image_tokens
from .benchmark_contenders import build_encoder
from .benchmark_settings import FORWARD, Row, Settings, describe
from .benchmark_timing import MIN_ROUNDS, Call

SMALL_LANGUAGE_MODEL = {
    "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
LARGE_LANGUAGE_MODEL = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32064,
}  # fmt: skip
TOY_LANGUAGE_MODEL = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "vocab_size": 64,
}  # fmt: skip
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "0.5b": SMALL_LANGUAGE_MODEL,
    "7b": LARGE_LANGUAGE_MODEL,
    "toy": TOY_LANGUAGE_MODEL,
}
"""Sizes of Qwen2-0.5B and Vicuna-7B; and one to try the benchmark with."""

PROMPT_TOKENS = 32
DECODED_TOKENS = 8
ENCODING, FIRST, MORE = "encoder, connector", "first token", f"{DECODED_TOKENS} more tokens"
USABLE = 0.8
"""Part of the free memory that weights may take: activations and a second size of input need some, too."""


def vlm_rows(
    encoders: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    connectors: Sequence[str],
    language_models: Sequence[str],
    settings: Settings,
) -> Iterator[list[Row]]:
    """Time to the first token and seconds for those after it, batch 1, a prompt of `PROMPT_TOKENS` tokens of text."""
    for size in language_models:
        text = AutoConfig.for_model(**LANGUAGE_MODELS[size], max_position_embeddings=1 << 16)
        language_model = unfilled(text, settings.dtype)
        reason = does_not_fit(language_model, settings)
        if reason is not None:
            settings.skip(f"vlm with the {size} language model", reason)
            continue
        with settings.or_skip(f"vlm with the {size} language model"):
            materialise(language_model, settings.device, settings.dtype)
            for name, connector in itertools.product(encoders, connectors):
                with settings.or_skip(f"vlm {name}, {connector}, {size}"):
                    encoder = build_encoder(name).to(settings.device, settings.dtype)  # type: ignore[arg-type]
                    model = LlavaStyleForConditionalGeneration.from_parts(
                        encoder, language_model, connector=connector, image_token_id=text.vocab_size
                    )
                    named = {"encoder": name, "connector": connector, "language_model": size}
                    yield from _rows_of(model, named, sizes, settings)


def unfilled(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A language model whose parameters, unlike its buffers, have no memory yet."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # the context makes two of a tied parameter
    return model


def does_not_fit(model: nn.Module, settings: Settings) -> str | None:
    """In words why the model's weights do not fit into the memory that is free, or None."""
    needed = sum(parameter.numel() for parameter in model.parameters()) * settings.dtype.itemsize
    free = torch.cuda.mem_get_info()[0] if settings.device.type == "cuda" else _free_memory()
    if needed > USABLE * free:
        return (
            f"its weights are {needed / 1e9:.1f} GB in {settings.dtype_name}, "
            f"more than {100 * USABLE:.0f} % of the {free / 1e9:.1f} GB that are free"
        )
    return None


def _free_memory() -> int:
    """Bytes that this process may still take, of the machine's and of its control group's."""
    free, group = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no control groups, or "max"
        return free
    return min(free, limit)


@torch.no_grad()
def materialise(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
    """Gives parameters on the meta device memory, filled with copies of one random block: drawing each weight of a
    7B model takes minutes on a CPU, and memory that nobody wrote to would be read faster than memory is."""
    block = 0.02 * torch.randn((1 << 20) - 3, generator=torch.Generator().manual_seed(0))  # no row equals the next
    block = block.to(device, dtype)
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied ones stay tied
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in made:
                made[parameter] = nn.Parameter(_filled(parameter, name, block), requires_grad=False)
            setattr(module, name, made[parameter])
    model.to(device)  # type: ignore[arg-type]


def _filled(parameter: nn.Parameter, name: str, block: Tensor) -> Tensor:
    filled = torch.empty(parameter.shape, dtype=block.dtype, device=block.device)
    if parameter.dim() == 1:  # norms and biases
        return filled.fill_(float(name == "weight"))
    flat, length = filled.view(-1), len(block)
    whole = len(flat) - len(flat) % length
    flat[:whole].view(-1, length).copy_(block)
    flat[whole:].copy_(block[: len(flat) - whole])
    return filled


def _rows_of(
    model: LlavaStyleForConditionalGeneration,
    named: dict[str, str],
    sizes: Sequence[tuple[int, int]],
    settings: Settings,
) -> Iterator[list[Row]]:
    pace = 0.0  # seconds per token of the size before
    for height, width in sorted(sizes, key=math.prod):
        tokens = num_image_tokens(height, width, model_downsampling(model.config))
        setting = {
            "part": "vlm", "name": ", ".join(named.values()), "height": height, "width": width, "batch": 1,
            "dtype": settings.dtype_name, "passes": FORWARD, "image_tokens": tokens,
        } | named  # fmt: skip
        guess = pace * (tokens + PROMPT_TOKENS)
        if guess * (MIN_ROUNDS + 2) > settings.budget:
            reason = f"about {guess:.0f} s to the first token of {tokens + PROMPT_TOKENS}, more than the budget allows"
            settings.skip(describe(setting), reason)
            continue
        with torch.no_grad():
            rows = settings.run(setting, _calls(model, height, width, tokens, settings))
        seconds = {row["variant"]: row["median"] for row in rows}
        for row in rows:
            if row["variant"] == MORE:
                row["tokens_per_second"] = DECODED_TOKENS / row["median"]
            if row["variant"] == FIRST:
                pace = row["median"] / (tokens + PROMPT_TOKENS)
                if ENCODING in seconds:
                    row["encoder_share"] = seconds[ENCODING] / row["median"]
        yield rows


def _calls(
    model: LlavaStyleForConditionalGeneration, height: int, width: int, tokens: int, settings: Settings
) -> dict[str, Call]:
    image_token = model.config.image_token_id
    pixels = torch.randn(1, 3, height, width).to(settings.device, settings.dtype)
    ids = torch.tensor([[image_token] * tokens + [1] * PROMPT_TOKENS], device=settings.device)
    following = torch.ones(1, 1, dtype=torch.long, device=settings.device)
    cache: list[Any] = []

    def first_token() -> None:
        cache[:] = [model(input_ids=ids, pixel_values=pixels, use_cache=True, logits_to_keep=1).past_key_values]

    def encoder_alone() -> None:
        model.get_image_features(pixels)

    def more_tokens() -> None:
        if not cache:
            first_token()
        for _ in range(DECODED_TOKENS):
            model(input_ids=following, past_key_values=cache[0], use_cache=True)
        cache[0].crop(-DECODED_TOKENS)

    return {ENCODING: encoder_alone, FIRST: first_token, MORE: more_tokens}
