"""Time and memory of the scan, of whole encoders and of whole VLMs, side by side on the machine at hand.

    python -m ssm_vlm.eval.benchmark                          # all parts, with a budget for each contender
    python -m ssm_vlm.eval.benchmark op --shape 56x56x192 14x14x768 --batch 64 --device cuda --dtype bfloat16
    python -m ssm_vlm.eval.benchmark encoder --encoder vmamba_small_s2l15.in1k_224 --size 224 800x1333 --batch 1
    python -m ssm_vlm.eval.benchmark --quick                  # tries everything, in seconds, on toys
    python -m ssm_vlm.eval.benchmark --report                 # README's table, docs/performance.md from the results

All contenders of one setting live in one process and take turns after a warm-up, so that whatever else the machine does
meets all of them alike. What takes longer than the budget, does not fit into memory, fails or is not installed is named
as not run. The JSON file holds settings, machine, every single time and what was not run.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..modeling.ops.selective_scan_2d import BACKENDS
from . import benchmark_report as report
from .benchmark_contenders import COPY_BASED
from .benchmark_encoder import encoder_rows
from .benchmark_op import OpShape, op_rows
from .benchmark_pages import write_pages
from .benchmark_plot import plot
from .benchmark_settings import Row, Settings
from .benchmark_timing import machine
from .benchmark_vlm import LANGUAGE_MODELS, vlm_rows

ROOT = Path(__file__).resolve().parents[1]
ENCODER_VARIANTS = ("default", "compiled", *BACKENDS, *COPY_BASED)

FULL: dict[str, Any] = {
    "shape": ["56x56x192", "28x28x384", "14x14x768", "56x56x192x16"],
    "encoder": [
        "vmamba_tiny_s1l8.in1k_224",
        "vmamba_small_s2l15.in1k_224",
        "vmamba_base_s2l15.in1k_224",
        "swin_small.in1k_224",
        "convnext_small.in1k_224",
        "vit_small_patch16.augreg_in1k_224",
        "vit_base_patch16.augreg_in1k_224",
    ],
    "size": ["224", "384", "512", "768", "1024", "800x1333", "1536", "2048"],
    "vlm_encoder": ["vmamba_small_s2l15.in1k_224", "vit_small_patch16.augreg_in1k_224"],
    "connector": ["mlp2", "pixel_shuffle_mlp2", "average_pool_mlp2"],
    "language_model": ["0.5b", "7b"],
    "rounds": 20,
}
QUICK: dict[str, Any] = {
    "shape": ["6x5x32"],
    "encoder": ["digit_vmamba.digitscenes_64", "digit_vit.digitscenes_64"],
    "size": ["32", "48x64"],
    "vlm_encoder": ["digit_vmamba.digitscenes_64"],
    "connector": ["mlp2"],
    "language_model": ["toy"],
    "rounds": 2,
}


def parse_size(text: str) -> tuple[int, int]:
    """Height and width from "224" or "800x1333".

    Raises:
        ValueError: it is neither.
    """
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", text):
        raise ValueError(f"{text!r} is no size of a picture: give pixels, such as 224, or HEIGHTxWIDTH.")
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ssm_vlm.eval.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", nargs="*", help="op, encoder, vlm; all by default")
    parser.add_argument("--shape", nargs="+", help="op: maps, as HEIGHTxWIDTHxCHANNELS or ...xSTATES")
    parser.add_argument("--backend", nargs="+", choices=[*BACKENDS, *COPY_BASED], help="op: by default all")
    parser.add_argument("--encoder", nargs="+", help="encoder: names as in `ssm-vlm encoders`")
    parser.add_argument("--size", nargs="+", help="encoder, vlm: pixels of a side, or HEIGHTxWIDTH")
    parser.add_argument(
        "--variant", nargs="+", default=["default", "copy_based"], choices=ENCODER_VARIANTS,
        help="encoder: scan backends, the library's choice (default), compiled inference",
    )  # fmt: skip
    parser.add_argument("--last-stage", action="store_true", help="encoder: the whole of it, not only up to its tap")
    parser.add_argument("--backward", action="store_true", help="encoder: forward and backward pass")
    parser.add_argument("--vlm-encoder", nargs="+", help="vlm: names as in `ssm-vlm encoders`")
    parser.add_argument("--connector", nargs="+", help="vlm: connectors")
    parser.add_argument("--language-model", nargs="+", choices=list(LANGUAGE_MODELS), help="vlm: sizes")
    parser.add_argument(
        "--batch", nargs="+", type=int,
        help="op: batches. encoder: 1, and at 224x224, fewer as pictures grow; by default 1 and 16, on CUDA 1 and 128",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice by default")
    parser.add_argument("--rounds", type=int, help="timed calls of each contender; by default 20")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds for each contender in each setting")
    parser.add_argument("--quick", action="store_true", help="toys and two rounds, to see that all of it runs")
    parser.add_argument("--output", type=Path, help="JSON file to write, or a folder for DEVICE_DATE.json")
    parser.add_argument("--label", help="end of the name of the file in that folder")
    parser.add_argument("--plot", type=Path, help="picture to write: encoders' times over pixels (needs matplotlib)")
    parser.add_argument("--commit", help="commit to save where git cannot tell, in a copy of a checkout")
    parser.add_argument(
        "--report", nargs="*", type=Path, metavar="JSON",
        help="measure nothing: from these results, by default benchmarks/results, write README's table, "
        "docs/performance.md with every bar, and its picture (needs matplotlib)",
    )  # fmt: skip
    return parser


def _check_parts(parts: list[str]) -> None:
    for part in parts:
        if part not in ("op", "encoder", "vlm"):
            raise ValueError(f"There is no part {part!r}: choose among op, encoder and vlm.")


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measures what the options ask for, printing as it goes, and saving so that a run that is ended loses little.

    Returns:
        What is saved: `settings`, `machine`, `rows`, `skipped`, `exponents` and `crossovers`.

    Raises:
        ValueError: an option names nothing that exists.
    """
    parts = options.part or ["op", "encoder", "vlm"]
    _check_parts(parts)
    sizes, shapes = [parse_size(size) for size in options.size], [OpShape.parse(shape) for shape in options.shape]
    settings = Settings(
        torch.device(options.device),
        getattr(torch, options.dtype),
        options.rounds,
        options.budget,
        say=lambda line: console.print(line, style="yellow", markup=False, highlight=False),
    )
    torch.manual_seed(0)
    made = {
        "op": lambda: op_rows(shapes, options.batch, options.backend, settings),
        "encoder": lambda: encoder_rows(
            options.encoder, sizes, options.batch, options.variant, settings, options.backward, options.last_stage
        ),
        "vlm": lambda: vlm_rows(options.vlm_encoder, sizes, options.connector, options.language_model, settings),
    }
    rows: list[Row] = []
    asked_for = {
        key: value for key, value in vars(options).items() if key not in ("output", "plot", "report", "commit")
    }
    taken_on = machine(settings.device, options.commit)
    record = {"settings": asked_for, "machine": taken_on, "rows": rows, "skipped": settings.skipped}
    for part in parts:
        for new in made[part]():
            report.print_rows(new, console)
            rows.extend(new)
            record |= report.summaries(rows)
            _save(record, options)
    _save(record, options)  # what was not run at the end
    report.print_summary(record, console)
    return record


def _save(record: dict[str, Any], options: argparse.Namespace) -> None:
    if options.output is not None:
        results_path(options.output, record, options.label).write_text(json.dumps(record, separators=(",", ":")) + "\n")
    if options.plot is not None and any(row["part"] == "encoder" for row in record["rows"]):
        plot({f"{record['machine']['device']}, {options.dtype}, batch 1": record["rows"]}, options.plot)


def _fill_in(options: argparse.Namespace) -> None:
    """Options that were not given: those of a quick or of a full run."""
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.batch is None:
        options.batch = [1, 2] if options.quick else [1, 128 if options.device.startswith("cuda") else 16]
    if options.backend is None:
        options.backend = [*BACKENDS, *COPY_BASED]


def results_path(output: Path, record: dict[str, Any], label: str | None) -> Path:
    """`output`, or in it, where it is a folder, DEVICE_DATE.json or DEVICE_DATE_LABEL.json."""
    if not output.is_dir():
        return output
    device = re.sub(r"[^a-z0-9]+", "-", record["machine"]["device"].lower()).strip("-")
    words = [device, record["machine"]["date"], *([label] if label else [])]
    return output / f"{'_'.join(words)}.json"


def main(argv: list[str] | None = None) -> int:
    """Run a benchmark from the command line."""
    options = _parser().parse_args(argv)
    try:
        if options.report is not None:
            write_pages(ROOT, options.report or sorted((ROOT / "benchmarks" / "results").glob("*.json")))
            return 0
        _fill_in(options)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        run(options, Console(width=None if sys.stdout.isatty() else 120))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
