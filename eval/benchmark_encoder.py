"""Encoders to their taps: time, memory, FLOPs and the scan's share, how time grows, and where curves cross."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..modeling.inference import compile_for_inference
from .benchmark_contenders import COPY_BASED, build_encoder, copy_based_core, encoder_call, scans, timed_scans
from .benchmark_settings import BOTH, FORWARD, Row, Settings
from .benchmark_timing import clock_of, peak_memory
from .encoder_cost import encoder_cost


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
        encoders[name] = build_encoder(name, last_stage).to(settings.device, settings.dtype)  # type: ignore[arg-type]
    pace: dict[str, float] = {}  # seconds per FLOP of the size before
    for batch in batches:
        for height, width in sorted(sizes, key=math.prod):
            pictures = throughput_batch(batch, height, width) if batch > 1 else 1
            if batch > 1 and pictures == 1:
                continue
            pixels = torch.randn(pictures, 3, height, width).to(settings.device, settings.dtype)
            yield _encoder_rows_at(encoders, pixels, variants, settings, backward, pace)


def _encoder_rows_at(
    encoders: Mapping[str, PreTrainedModel],
    pixels: Tensor,
    variants: Sequence[str],
    settings: Settings,
    backward: bool,
    pace: dict[str, float],
) -> list[Row]:
    batch, _, height, width = pixels.shape
    setting = {
        "part": "encoder", "name": "encoders", "height": height, "width": width, "batch": batch,
        "dtype": settings.dtype_name, "passes": BOTH if backward else FORWARD,
    }  # fmt: skip
    contenders, expected, flops = {}, {}, {}
    for name, encoder in encoders.items():
        cost = encoder_cost(encoder.config, height, width).flops * batch
        for variant in variants:
            if variant not in ("default", "compiled") and not scans(encoder.config):
                continue
            reason = copy_based_core(variant) if variant in COPY_BASED else None
            if isinstance(reason, str):
                settings.skip(f"encoder {name}, {variant}", reason)
                continue
            backend = None if variant in ("default", "compiled") else variant
            key = f"{name}, {variant}"
            contenders[key] = encoder_call(encoder, pixels, backend, backward, variant == "compiled")
            flops[key] = cost
            if key in pace:
                expected[key] = pace[key] * cost
    rows = settings.run(setting, contenders, expected)
    for row in rows:
        key = row["variant"]
        row["name"], row["variant"] = key.split(", ")
        row["flops"], pace[key] = flops[key], row["median"] / flops[key]
        row["images_per_second"] = batch / row["median"]
        encoder, captured = encoders[row["name"]], row["variant"] == "compiled" and settings.device.type == "cuda"
        if captured:  # a replay allocates only what it gives; what it runs in was taken when it was captured
            row["peak_bytes"] = peak_memory(partial(_capture, encoder, pixels), settings.device)
        elif scans(encoder.config) and row["variant"] not in COPY_BASED and not backward:
            with timed_scans(settings.device) as seconds:
                whole = clock_of(settings.device)(contenders[key])
                row["scan_share"] = seconds() / whole
    return rows


def _capture(encoder: nn.Module, pixels: Tensor) -> None:
    compile_for_inference(encoder)(pixels)


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
    """Where one encoder's time passes another's: batch 1, squares, run alike, pixels interpolated between sizes."""
    curves: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        square = row["height"] == row["width"]
        if row["part"] == "encoder" and row["batch"] == 1 and square and row["variant"] in ("default", "compiled"):
            curves.setdefault(row["variant"], {}).setdefault(row["name"], {})[row["height"]] = row["median"]
    found = []
    for variant, of_variant in curves.items():
        for first, second in itertools.combinations(of_variant, 2):
            for side, seconds, first_dearer_below in _crossings(of_variant[first], of_variant[second]):
                above, below = (first, second) if first_dearer_below else (second, first)
                names = {"variant": variant, "cheaper_above": above, "cheaper_below": below}
                found.append(names | {"side": side, "median": seconds})
    return found


def _crossings(first: dict[int, float], second: dict[int, float]) -> Iterator[tuple[float, float, bool]]:
    """Side, time, and whether the first curve is the higher one below it; straight lines in logarithms."""
    sides = sorted(set(first) & set(second))
    for low, high in itertools.pairwise(sides):
        before, after = (math.log(first[side] / second[side]) for side in (low, high))
        if before * after < 0:
            share = before / (before - after)
            yield low * (high / low) ** share, first[low] * (first[high] / first[low]) ** share, before > 0
