"""Time encoders side by side: named encoders, and for scanning ones each backend of the scan.

All contenders live in one process and take turns, so that whatever else the machine does meets all of them alike; the
table gives medians, quartiles and the ratio of medians to the first contender.

    python -m ssm_vlm.eval.benchmark --encoder vmamba_small_s2l15.in1k_224 vit_small_patch16.augreg_in1k_224 \
        --backend naive chunked --last-stage --threads 2 --rounds 10 --output benchmark.json
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoBackbone, PreTrainedConfig

from ..configuration.named_encoders import get_named_encoder
from ..modeling.ops.scan_backends import BACKEND_VARIABLE
from ..modeling.ops.selective_scan_2d import BACKENDS


def measure(
    contenders: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    synchronize: Callable[[], None] | None = None,
) -> dict[str, list[float]]:
    """Wall-clock seconds of each call, taken in turns.

    Args:
        contenders: name -> what to time.
        rounds: timed calls of each; the order is reversed every second round.
        warmup: untimed calls of each before the first round.
        synchronize: waits for the device; called before and after each timed call.

    Raises:
        ValueError: for fewer than one round, or no contender.
    """
    if rounds < 1 or not contenders:
        raise ValueError(f"A benchmark needs a contender and at least one round, got {len(contenders)} and {rounds}.")
    synchronize = synchronize or (lambda: None)
    for call in contenders.values():
        for _ in range(warmup):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(rounds):
        for name in list(contenders)[:: 1 if round_number % 2 == 0 else -1]:
            synchronize()
            start = time.perf_counter()
            contenders[name]()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def summarise(seconds: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """Per contender: fastest, median, quartiles, and median over the median of the first contender."""
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    first = next(iter(medians.values()))
    summary = {}
    for name, times in seconds.items():
        quartiles = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
        summary[name] = {
            "fastest": min(times),
            "lower_quartile": quartiles[0],
            "median": medians[name],
            "upper_quartile": quartiles[2],
            "ratio_to_first": medians[name] / first,
        }
    return summary


@contextlib.contextmanager
def scan_backend(name: str | None) -> Iterator[None]:
    """Within it, every scan runs on this backend (None leaves the choice as it is)."""
    before = os.environ.get(BACKEND_VARIABLE)
    if name is not None:
        os.environ[BACKEND_VARIABLE] = name
    try:
        yield
    finally:
        if name is not None:
            del os.environ[BACKEND_VARIABLE]
            if before is not None:
                os.environ[BACKEND_VARIABLE] = before


def scans(config: PreTrainedConfig) -> bool:
    """Whether an encoder of this configuration runs the selective scan."""
    return "ss2d" in getattr(config, "mixers", ())


def make_contenders(
    encoders: Mapping[str, torch.nn.Module], backends: list[str | None], pixel_values: Tensor, backward: bool
) -> dict[str, Callable[[], None]]:
    """One contender per encoder, and per backend where the encoder scans: `NAME` or `NAME [backend]`."""

    def contender(encoder: torch.nn.Module, backend: str | None) -> Callable[[], None]:
        def call() -> None:
            with scan_backend(backend), torch.set_grad_enabled(backward):
                features = encoder(pixel_values).feature_maps[-1]
                if backward:
                    encoder.zero_grad()
                    features.float().square().mean().backward()

        return call

    contenders = {}
    for name, encoder in encoders.items():
        for backend in backends if scans(encoder.config) else [None]:
            contenders[name if backend is None else f"{name} [{backend}]"] = contender(encoder, backend)
    return contenders


def build_encoder(name: str, last_stage: bool) -> torch.nn.Module:
    """The named encoder with random weights, up to its tap, or to its last stage."""
    config = get_named_encoder(name).config()
    if last_stage:
        config.out_features = config.stage_names[-1:]
    return AutoBackbone.from_config(config).eval()


def machine(device: torch.device) -> dict[str, str | int]:
    """What the figures were taken on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "cpus": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ssm_vlm.eval.benchmark", description=__doc__.split("\n")[0])
    parser.add_argument("--encoder", nargs="+", required=True, help="names as in `ssm-vlm encoders`")
    parser.add_argument("--backend", nargs="+", default=[None], choices=list(BACKENDS), help="scan backends to compare")
    parser.add_argument("--last-stage", action="store_true", help="run the whole encoder, not only up to its tap")
    parser.add_argument("--size", nargs=2, type=int, default=[224, 224], metavar=("HEIGHT", "WIDTH"), help="pixels")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--backward", action="store_true", help="time forward and backward pass")
    parser.add_argument("--rounds", type=int, default=10, help="timed calls of each contender")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--output", type=Path, help="JSON file to write: settings, machine and every single time")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a benchmark from the command line."""
    options = _parser().parse_args(argv)
    device = torch.device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        encoders = {
            name: build_encoder(name, options.last_stage).to(device, getattr(torch, options.dtype))
            for name in options.encoder
        }
        pixel_values = torch.randn(
            options.batch_size, 3, *options.size, device=device, dtype=getattr(torch, options.dtype)
        )
        seconds = measure(
            make_contenders(encoders, options.backend, pixel_values, options.backward),
            options.rounds,
            synchronize=torch.cuda.synchronize if device.type == "cuda" else None,
        )
        summary = summarise(seconds)
        if options.output is not None:
            settings = vars(options) | {"output": str(options.output)}
            record = {"settings": settings, "machine": machine(device), "summary": summary, "seconds": seconds}
            options.output.write_text(json.dumps(record, indent=1) + "\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _print(summary, options, machine(device))
    return 0


def _print(summary: dict[str, dict[str, float]], options: argparse.Namespace, taken_on: dict[str, str | int]) -> None:
    passes = "forward and backward" if options.backward else "forward"
    height, width = options.size
    extent = "to the last stage" if options.last_stage else "to the tap"
    table = Table(title=f"{passes}, {extent}, batch {options.batch_size}, {height}x{width}, {options.dtype}")
    for column in ("encoder", "median ms", "quartiles ms", "fastest ms", "over first"):
        table.add_column(column, justify="left" if column == "encoder" else "right")
    for name, figures in summary.items():
        quartiles = f"{1e3 * figures['lower_quartile']:.1f}-{1e3 * figures['upper_quartile']:.1f}"
        table.add_row(
            name.replace("[", r"\["),
            f"{1e3 * figures['median']:.1f}",
            quartiles,
            f"{1e3 * figures['fastest']:.1f}",
            f"{figures['ratio_to_first']:.2f}",
        )
    console = Console()
    console.print(table)
    console.print(", ".join(f"{key}: {value}" for key, value in taken_on.items()), markup=False)


if __name__ == "__main__":
    sys.exit(main())
