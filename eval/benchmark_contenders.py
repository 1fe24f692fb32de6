"""What the benchmark runs: encoders, scan backends, the copy-based baseline; each a function without arguments."""

import contextlib
import functools
import importlib.util
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from transformers import AutoBackbone, PreTrainedConfig, PreTrainedModel

from ..configuration.named_encoders import get_named_encoder
from ..modeling import mixers
from ..modeling.inference import compile_for_inference
from .benchmark_timing import Call, scan_backend

COPY_BASED = ("copy_based", "copy_based_prebuilt", "copy_based_own_scan")
"""Names beside the library's own backends: four copies, scanned by torch's loop, by Mamba's kernel, by the library."""


@functools.cache
def copy_based_baseline() -> ModuleType | None:
    """`benchmarks/copy_based_scan.py` of the checkout; an installed package does not have it."""
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "copy_based_scan.py"
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location("copy_based_scan", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def copy_based_core(variant: str) -> Callable[..., Tensor] | str:
    """What a copy-based contender runs in the place of scan and projections, or in words why it cannot."""
    baseline = copy_based_baseline()
    if baseline is None:
        return "the copy-based composition is in the benchmarks folder of the checkout, not in an installed package"
    if variant == "copy_based_own_scan":
        return baseline.own_scan_core
    scan = baseline.sequential_scan if variant == "copy_based" else baseline.prebuilt_scan()
    if scan is None:
        return "neither mamba_ssm's compiled kernel nor the Hub's is there"
    return functools.partial(baseline.copy_based_core, scan=scan)


def scans(config: PreTrainedConfig) -> bool:
    """Whether an encoder of this configuration runs the two-dimensional selective scan."""
    return "ss2d" in getattr(config, "mixers", ())


def build_encoder(name: str, last_stage: bool = False) -> PreTrainedModel:
    """The named encoder with random weights, up to its tap, or to its last stage."""
    config = get_named_encoder(name).config()
    if last_stage:
        config.out_features = config.stage_names[-1:]
    return AutoBackbone.from_config(config).eval()


def encoder_call(
    encoder: nn.Module, pixel_values: Tensor, backend: str | None = None, backward: bool = False, compiled: bool = False
) -> Call:
    """One pass of an encoder.

    Args:
        encoder: a Backbone.
        pixel_values: [B, 3, H, W].
        backend: of the scan; one of `COPY_BASED` runs that composition instead. None is the library's choice.
        backward: forward and backward pass, gradients of all parameters.
        compiled: run through `compile_for_inference`.
    """
    run = compile_for_inference(encoder) if compiled else encoder
    baseline, core = copy_based_baseline(), copy_based_core(backend) if backend and backend in COPY_BASED else None

    def call() -> None:
        with contextlib.ExitStack() as stack:
            if baseline is not None and core is not None:
                stack.enter_context(baseline.copy_based(encoder, core))
            else:
                stack.enter_context(scan_backend(backend))
            # not inference_mode, under which views cost less than users of a frozen encoder have it
            stack.enter_context(torch.set_grad_enabled(backward))
            features = run(pixel_values).feature_maps[-1]
            if backward:
                encoder.zero_grad()
                features.float().square().mean().backward()

    return call


@contextlib.contextmanager
def timed_scans(device: torch.device) -> Iterator[Callable[[], float]]:
    """Within it the scans of the mixers are timed; what it gives returns their seconds so far."""
    real = mixers.selective_scan_2d
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    spans: list[float] = []

    def timed(*tensors: Tensor) -> Tensor:
        if device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            out = real(*tensors)
            last.record()
            events.append((first, last))
            return out
        start = time.perf_counter()
        out = real(*tensors)
        spans.append(time.perf_counter() - start)
        return out

    def seconds() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return sum(spans) + sum(first.elapsed_time(last) for first, last in events) / 1e3

    mixers.selective_scan_2d = timed  # type: ignore[assignment]
    try:
        yield seconds
    finally:
        mixers.selective_scan_2d = real
