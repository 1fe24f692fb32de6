"""The three parts of the benchmark, each giving rows: the scan, whole encoders, whole VLMs.

A row says what ran (`part`, `name`, `variant`, `passes`, `height`, `width`, `batch`, `dtype`), every time in seconds,
their median and quartiles, the peak memory, and what the part adds. Rows of one setting were taken in turns.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig

from ..configuration.configuration_llava_style import LlavaStyleConfig
from ..configuration.named_encoders import get_named_encoder
from ..modeling.connectors import model_downsampling
from ..modeling.modeling_llava_style import LlavaStyleForConditionalGeneration
from ..modeling.ops.selective_scan_2d import selective_scan_2d
from ..modeling.token_grid import num_image_tokens
from .benchmark_contenders import (
    COPY_BASED,
    build_encoder,
    copy_based_baseline,
    copy_based_scan,
    encoder_call,
    scans,
    timed_scans,
)
from .benchmark_timing import MIN_ROUNDS, Call, clock_of, measure, peak_memory, summarise
from .encoder_cost import encoder_cost

Row = dict[str, Any]
FORWARD, BOTH = "forward", "forward+backward"

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
LANGUAGE_MODELS = {"0.5b": SMALL_LANGUAGE_MODEL, "7b": LARGE_LANGUAGE_MODEL, "toy": TOY_LANGUAGE_MODEL}
"""Sizes of Qwen2-0.5B and Vicuna-7B, with random weights; and one to try the benchmark with."""

PROMPT_TOKENS = 32
DECODED_TOKENS = 8


@dataclass
class Settings:
    """What all parts share."""

    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    rounds: int = 10
    budget: float = 60.0
    skipped: list[dict[str, str]] = field(default_factory=list)
    say: Callable[[str], None] = print

    def skip(self, what: str, reason: str) -> None:
        """Names what is left out, in the terminal and in the saved file."""
        entry = {"what": what, "reason": reason}
        if entry not in self.skipped:
            self.skipped.append(entry)
            self.say(f"skipped: {what}: {reason}")

    @contextlib.contextmanager
    def or_skip(self, what: str) -> Iterator[None]:
        """What does not fit into memory or cannot run here is skipped and named."""
        try:
            yield
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            self.skip(what, "out of memory")
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            self.skip(what, str(error).splitlines()[0])

    def run(
        self, setting: Row, contenders: Mapping[str, Call], expected: Mapping[str, float] | None = None
    ) -> list[Row]:
        """Time contenders in turns; one that cannot run here, or not in time, is skipped and named.

        Args:
            setting: what the rows share.
            contenders: variant -> what to time.
            expected: variant -> seconds that a call is expected to take.
        """
        runnable, peaks, title = {}, {}, describe(setting)
        for variant, call in contenders.items():
            guess = (expected or {}).get(variant, 0.0)
            if guess * (MIN_ROUNDS + 2) > self.budget:
                self.skip(f"{title}, {variant}", f"about {guess:.0f} s a call, more than the budget allows")
                continue
            with self.or_skip(f"{title}, {variant}"):
                taken = clock_of(self.device)(call)
                if taken < self.budget < taken * (MIN_ROUNDS + 1):  # the first call of all may be slow
                    taken = clock_of(self.device)(call)
                if taken * (MIN_ROUNDS + 1) > self.budget:
                    self.skip(f"{title}, {variant}", f"{taken:.1f} s a call, more than the budget allows")
                    continue
                peaks[variant] = peak_memory(call, self.device)
                runnable[variant] = call
        if not runnable:
            return []
        seconds = measure(runnable, self.rounds, 1, clock_of(self.device), self.budget)
        return [
            setting | {"variant": variant} | summarise(times) | {"peak_bytes": peaks[variant], "seconds": times}
            for variant, times in seconds.items()
        ]


def describe(setting: Row) -> str:
    """A setting in words, for example "encoder vit_small at 224x224, batch 1, forward"."""
    return (
        f"{setting['part']} {setting['name']} at {setting['height']}x{setting['width']}, batch {setting['batch']}, "
        f"{setting['passes']}"
    )


# The scan


@dataclass(frozen=True)
class OpShape:
    """One map that SS2D scans: [B, height, width, channels], with `states` states and step sizes of rank `rank`."""

    height: int
    width: int
    channels: int
    rank: int
    states: int = 1

    @classmethod
    def parse(cls, text: str) -> "OpShape":
        """From "56x56x192" or, with states, "56x56x192x16"; the rank is VMamba's, a thirty-second of the channels."""
        try:
            height, width, channels, *states = map(int, text.split("x"))
            if min(height, width, channels, *states) < 1 or len(states) > 1:
                raise ValueError
        except ValueError:
            raise ValueError(f"{text!r} is no shape of a map: give HEIGHTxWIDTHxCHANNELS or ...xSTATES.") from None
        return cls(height, width, channels, max(1, channels // 32), *states)


def op_inputs(shape: OpShape, batch: int, settings: Settings) -> dict[str, Tensor]:
    """A map [B, H, W, E] and the parameters of SS2D, with step sizes and decay rates as a new model has them."""
    generator = torch.Generator().manual_seed(0)
    inner, rank, states = shape.channels, shape.rank, shape.states

    def uniform(bound: float, *sizes: int) -> Tensor:
        return (2 * torch.rand(sizes, generator=generator) - 1) * bound

    tensors = {
        "x": torch.randn(batch, shape.height, shape.width, inner, generator=generator),
        "x_proj_weight": uniform(inner**-0.5, 4, rank + 2 * states, inner),
        "dt_weight": uniform(rank**-0.5, 4, inner, rank),
        "dt_bias": uniform(1.5, 4, inner) - 4,
        "a_log": torch.arange(1, states + 1).float().log().expand(4, inner, -1).contiguous(),
        "d": torch.ones(4, inner),
    }
    return {
        name: tensor.to(settings.device, settings.dtype if name in ("x", "x_proj_weight") else torch.float32)
        for name, tensor in tensors.items()
    }


def compulsory_bytes(shape: OpShape, batch: int, dtype: torch.dtype, passes: str) -> int:
    """What the scan alone must move: every map once in, every map once out; backward likewise."""
    per_direction = shape.rank + 2 * shape.states
    inputs, output = shape.channels + 4 * per_direction, shape.channels
    values = inputs + output
    if passes == BOTH:
        values += (inputs + output) + inputs  # inputs and the gradient of the output in, gradients of the inputs out
    return batch * shape.height * shape.width * values * dtype.itemsize


def op_rows(
    shapes: Sequence[OpShape], batches: Sequence[int], backends: Sequence[str], settings: Settings
) -> Iterator[list[Row]]:
    """The scan with its projections, forward and with backward, and the scan alone, on each backend.

    The copy-based composition projects from its copies, so that it is compared with scan and projections.
    """
    for shape, batch, passes in itertools.product(shapes, batches, (FORWARD, BOTH)):
        contenders = _op_contenders(shape, batch, backends, settings, passes)
        rows = settings.run(_op_setting(shape, batch, settings, passes), contenders)
        moved = compulsory_bytes(shape, batch, settings.dtype, passes)
        yield [row | {"compulsory_bytes": moved, "bytes_per_second": moved / row["median"]} for row in rows]


def _op_setting(shape: OpShape, batch: int, settings: Settings, passes: str) -> Row:
    return {
        "part": "op", "name": f"{shape.channels} channels, {shape.states} states", "height": shape.height,
        "width": shape.width, "batch": batch, "dtype": str(settings.dtype).removeprefix("torch."), "passes": passes,
    }  # fmt: skip


def _op_contenders(
    shape: OpShape, batch: int, backends: Sequence[str], settings: Settings, passes: str
) -> dict[str, Call]:
    tensors = op_inputs(shape, batch, settings)
    x, weight, *parameters = tensors.values()
    states = shape.states

    def project(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        projected = F.linear(x, weight.flatten(0, 1)).unflatten(-1, (4, -1))
        return projected.split([shape.rank, states, states], dim=-1)

    def of(function: Callable[..., Tensor], inputs: list[Tensor]) -> Call:
        inputs = [tensor.detach().clone().requires_grad_(passes == BOTH) for tensor in inputs]

        def call() -> None:
            with torch.set_grad_enabled(passes == BOTH):
                out = function(*inputs)
                if passes == BOTH:
                    torch.autograd.grad(out, inputs, torch.ones_like(out))

        return call

    contenders = {}
    for backend in backends:
        if backend in COPY_BASED:
            scan = copy_based_scan(backend)
            if isinstance(scan, str):
                settings.skip(f"op, {backend}", scan)
                continue
            core = copy_based_baseline().copy_based_core
            contenders[backend] = of(
                lambda *inputs, core=core, scan=scan: core(*inputs, scan=scan),
                [x.permute(0, 3, 1, 2).contiguous(), weight, *parameters],
            )
            continue

        def whole(x, weight, *parameters, backend=backend):
            return selective_scan_2d(x, *project(x, weight), *parameters, backend=backend)

        def alone(*inputs, backend=backend):
            return selective_scan_2d(*inputs, backend=backend)

        calls = {backend: of(whole, [x, weight, *parameters])}
        calls[f"{backend} alone"] = of(alone, [x, *project(x, weight), *parameters])
        try:
            with torch.no_grad():
                selective_scan_2d(
                    x[:, :1, :1], *(t[:, :1, :1] for t in project(x, weight)), *parameters, backend=backend
                )
        except RuntimeError as error:
            settings.skip(f"op, {backend}", str(error).splitlines()[0])
            continue
        contenders |= calls
    return contenders


# Encoders


def throughput_batch(batch: int, height: int, width: int) -> int:
    """As many pictures as have the pixels of `batch` pictures of 224x224, at least one."""
    return max(1, round(batch * 224 * 224 / (height * width)))


def encoder_rows(
    names: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    batches: Sequence[int],
    variants: Sequence[str],
    settings: Settings,
    backward: bool = False,
    last_stage: bool = False,
) -> Iterator[list[Row]]:
    """Encoders to their taps. A batch over 1 is for 224x224 and shrinks as pictures grow.

    Args:
        names: of encoders, as in `ssm-vlm encoders`.
        variants: scan backends, "default" (the library's choice) or "compiled" (see `compile_for_inference`); only
            "default" and "compiled" apply to encoders that do not scan.
    """
    encoders = {}
    for name in names:
        encoders[name] = build_encoder(name, last_stage).to(settings.device, settings.dtype)
    pace: dict[str, float] = {}  # seconds per FLOP of the size before
    for batch in batches:
        for height, width in sorted(sizes, key=math.prod):
            pictures = throughput_batch(batch, height, width) if batch > 1 else 1
            if batch > 1 and pictures == 1:
                continue
            pixels = torch.randn(pictures, 3, height, width).to(settings.device, settings.dtype)
            yield _encoder_rows_at(encoders, pixels, variants, settings, backward, pace)


def _encoder_rows_at(
    encoders: Mapping[str, nn.Module],
    pixels: Tensor,
    variants: Sequence[str],
    settings: Settings,
    backward: bool,
    pace: dict[str, float],
) -> list[Row]:
    batch, _, height, width = pixels.shape
    setting = {
        "part": "encoder", "name": "encoders", "height": height, "width": width, "batch": batch,
        "dtype": str(settings.dtype).removeprefix("torch."), "passes": BOTH if backward else FORWARD,
    }  # fmt: skip
    contenders, expected, flops = {}, {}, {}
    for name, encoder in encoders.items():
        cost = encoder_cost(encoder.config, height, width).flops * batch
        for variant in variants:
            if variant not in ("default", "compiled") and not scans(encoder.config):
                continue
            reason = copy_based_scan(variant) if variant in COPY_BASED else None
            if isinstance(reason, str):
                settings.skip(f"encoder {name}, {variant}", reason)
                continue
            backend = None if variant in ("default", "compiled") else variant
            key = f"{name} | {variant}"
            contenders[key] = encoder_call(encoder, pixels, backend, backward, variant == "compiled")
            flops[key] = cost
            if key in pace:
                expected[key] = pace[key] * cost
    rows = settings.run(setting, contenders, expected)
    for row in rows:
        key = row["variant"]
        row["name"], row["variant"] = key.split(" | ")
        row["flops"], pace[key] = flops[key], row["median"] / flops[key]
        row["images_per_second"] = batch / row["median"]
        if scans(encoders[row["name"]].config) and row["variant"] not in (*COPY_BASED, "compiled") and not backward:
            with timed_scans(settings.device) as seconds:
                whole = clock_of(settings.device)(contenders[key])
                row["scan_share"] = seconds() / whole
    return rows


def exponents(rows: Sequence[Row]) -> dict[str, float]:
    """Encoder and variant -> p of the best fit time = c pixels ** p, batch 1, for those taken at two sizes or more."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["part"] == "encoder" and row["batch"] == 1:
            point = (math.log(row["height"] * row["width"]), math.log(row["median"]))
            points.setdefault(f"{row['name']}, {row['variant']}", []).append(point)
    found = {}
    for key, pairs in points.items():
        if len({x for x, _ in pairs}) > 1:
            mean_x, mean_y = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
            spread = sum((x - mean_x) ** 2 for x, _ in pairs)
            found[key] = sum((x - mean_x) * (y - mean_y) for x, y in pairs) / spread
    return found


def crossovers(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Where one encoder's time passes another's (variant "default", batch 1), pixels interpolated between sizes."""
    curves: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["part"] == "encoder" and row["batch"] == 1 and row["variant"] == "default":
            curves.setdefault(row["name"], {})[row["height"] * row["width"]] = row["median"]
    found = []
    names = list(curves)
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            shared = sorted(set(curves[first]) & set(curves[second]))
            ratios = [math.log(curves[first][pixels] / curves[second][pixels]) for pixels in shared]
            for before in range(len(shared) - 1):
                low, high = ratios[before : before + 2]
                if low * high < 0:
                    at, step = math.log(shared[before]), math.log(shared[before + 1] / shared[before])
                    share = low / (low - high)
                    seconds = (
                        curves[first][shared[before]]
                        * (curves[first][shared[before + 1]] / curves[first][shared[before]]) ** share
                    )
                    dearer, cheaper = (first, second) if low > 0 else (second, first)
                    found.append(
                        {
                            "cheaper_above": dearer,
                            "cheaper_below": cheaper,
                            "side": math.exp((at + share * step) / 2),
                            "median": seconds,
                        }
                    )
    return found


# Whole VLMs


def vlm_rows(
    encoders: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    connectors: Sequence[str],
    language_models: Sequence[str],
    settings: Settings,
) -> Iterator[list[Row]]:
    """Time to the first token and seconds per token after it, batch 1; random weights."""
    for language_model, name, connector in itertools.product(language_models, encoders, connectors):
        title = f"vlm {name}, {connector}, {language_model}"
        config = _vlm_config(name, connector, language_model)
        reason = _does_not_fit(config, settings)
        if reason is not None:
            settings.skip(title, reason)
            continue
        with settings.or_skip(title):
            yield from _vlm_rows(name, connector, language_model, config, sizes, settings)


def _vlm_config(name: str, connector: str, language_model: str) -> LlavaStyleConfig:
    text = AutoConfig.for_model(**LANGUAGE_MODELS[language_model], max_position_embeddings=1 << 16)
    return LlavaStyleConfig(
        vision_config=get_named_encoder(name).config(),
        text_config=text,
        connector=connector,
        image_token_id=text.vocab_size,
    )


def _does_not_fit(config: LlavaStyleConfig, settings: Settings) -> str | None:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in LlavaStyleForConditionalGeneration(config).parameters())
    free = torch.cuda.mem_get_info()[0] if settings.device.type == "cuda" else psutil.virtual_memory().available
    needed = parameters * settings.dtype.itemsize
    if needed > 0.7 * free:
        return f"its weights need {needed / 1e9:.0f} GB of {free / 1e9:.0f} GB that are free"
    return None


def _vlm_rows(
    name: str,
    connector: str,
    language_model: str,
    config: LlavaStyleConfig,
    sizes: Sequence[tuple[int, int]],
    settings: Settings,
) -> Iterator[list[Row]]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(settings.dtype)
    try:
        with settings.device:
            model = LlavaStyleForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(default)
    pace = 0.0
    for height, width in sorted(sizes, key=math.prod):
        tokens = num_image_tokens(height, width, model_downsampling(config))
        calls = _vlm_calls(model, height, width, tokens, settings)
        setting = {
            "part": "vlm", "name": f"{name}, {connector}, {language_model}", "height": height, "width": width,
            "batch": 1, "dtype": str(settings.dtype).removeprefix("torch."), "passes": FORWARD,
        }  # fmt: skip
        if pace * tokens * (MIN_ROUNDS + 2) > settings.budget:
            settings.skip(
                describe(setting), f"about {pace * tokens:.0f} s to the first token, more than the budget allows"
            )
            continue
        with torch.no_grad():
            here = settings.run(setting, calls)
        for row in here:
            row["image_tokens"] = tokens
            if row["variant"] == f"{DECODED_TOKENS} more tokens":
                row["tokens_per_second"] = DECODED_TOKENS / row["median"]
            if row["variant"] == "first token":
                pace = row["median"] / tokens
        yield here


def _vlm_calls(model: nn.Module, height: int, width: int, tokens: int, settings: Settings) -> dict[str, Call]:
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

    return {
        "encoder, connector": encoder_alone,
        "first token": first_token,
        f"{DECODED_TOKENS} more tokens": more_tokens,
    }


__all__ = ["LANGUAGE_MODELS", "OpShape", "Settings", "crossovers", "encoder_rows", "exponents", "op_rows", "vlm_rows"]
