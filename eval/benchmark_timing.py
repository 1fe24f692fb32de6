"""How the benchmark measures: turns, clocks, peak memory, copy bandwidth, and what the machine is."""

import contextlib
import ctypes
import datetime
import gc
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..modeling.ops.scan_backends import BACKEND_VARIABLE

MIN_ROUNDS = 3
"""Fewer timed calls than this say nothing of the spread."""

PEAK_MEMORY_IS = {
    "resident": "most resident memory of the process during a call over that before it, after freed memory went back "
    "to the system: what torch allocates and what compiled code and libraries take for themselves",
    "profiled": "bytes that torch allocates during a call over those before it (torch.profiler); what compiled code "
    "and libraries take for themselves is not seen",
    "cuda": "torch.cuda.max_memory_allocated during a call over what was allocated before it",
}

PROCESS = Path("/proc/self")

Call = Callable[[], Any]


def wall_seconds(call: Call) -> float:
    """Seconds of a call that returns when its work is done."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cuda_seconds(call: Call) -> float:
    """Seconds on the CUDA device from the launch of a call's first kernel to the end of its last, by events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def clock_of(device: torch.device) -> Callable[[Call], float]:
    """What times a call on this device."""
    return cuda_seconds if device.type == "cuda" else wall_seconds


def measure(
    contenders: Mapping[str, Call],
    rounds: int,
    warmup: int = 1,
    clock: Callable[[Call], float] = wall_seconds,
    budget: float = float("inf"),
    warm: Mapping[str, float] | None = None,
    first_rounds: Collection[str] = (),
) -> dict[str, list[float]]:
    """Seconds of each call, taken in turns, so that whatever else the machine does meets all contenders alike.

    Args:
        contenders: name -> what to time.
        rounds: timed calls of each; the order is reversed every second round.
        warmup: calls of each before the first round, whose times are not kept.
        clock: times one call.
        budget: seconds that a contender may take; it gets fewer rounds, but at least `MIN_ROUNDS`, to stay within.
        warm: name -> seconds of the last call of one that is warm already and gets no more warm-up.
        first_rounds: names in `warm` whose last call counts as their first round.

    Raises:
        ValueError: for fewer than one round, or no contender.
    """
    if rounds < 1 or not contenders:
        raise ValueError(f"A benchmark needs a contender and at least one round, got {len(contenders)} and {rounds}.")
    rounds_of, warm = {}, warm or {}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for name, call in contenders.items():
        last = [warm[name]] if name in warm else [clock(call) for _ in range(warmup)][-1:]
        affordable = budget / last[0] if last and last[0] > 0 else float("inf")
        rounds_of[name] = int(min(rounds, max(MIN_ROUNDS, affordable)))
        if name in first_rounds:
            seconds[name] += last
    for round_number in range(rounds):
        for name in list(contenders)[:: 1 if round_number % 2 == 0 else -1]:
            if len(seconds[name]) < rounds_of[name]:
                seconds[name].append(clock(contenders[name]))
    return seconds


def summarise(times: list[float]) -> dict[str, float]:
    """Fastest, median and quartiles."""
    quartiles = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
    return {
        "fastest": min(times),
        "lower_quartile": quartiles[0],
        "median": quartiles[1],
        "upper_quartile": quartiles[2],
    }


def peak_memory_kind(device: torch.device) -> str:
    """Which of `PEAK_MEMORY_IS` can be had here."""
    if device.type == "cuda":
        return "cuda"
    try:
        _forget_most_resident()
    except OSError:  # not Linux, or a container that does not let a process do that
        return "profiled"
    return "resident"


def peak_memory(call: Call, device: torch.device) -> int:
    """Peak of the bytes that a call takes, over what was taken before; see `PEAK_MEMORY_IS`."""
    gc.collect()
    kind = peak_memory_kind(device)
    if kind == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    if kind == "resident":
        with contextlib.suppress(OSError, AttributeError):  # a C library without it keeps a little more
            ctypes.CDLL(None).malloc_trim(0)
        _forget_most_resident()
        before = _process_bytes("VmRSS")
        call()
        return max(0, _process_bytes("VmHWM") - before)
    return profiled_peak(call)


def _forget_most_resident() -> None:
    (PROCESS / "clear_refs").write_text("5")


def _process_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", (PROCESS / "status").read_text(), flags=re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def profiled_peak(call: Call) -> int:
    """Peak of the bytes that torch allocates on a CPU."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would write two lines to the terminal for each call
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def copy_bandwidth(device: torch.device, megabytes: int = 256, rounds: int = 10) -> float:
    """Bytes per second read and written by `copy_` of a tensor that fits no cache."""
    source = torch.ones(megabytes << 18, device=device)  # float32
    target = torch.empty_like(source)
    times = measure({"copy": lambda: target.copy_(source)}, rounds, warmup=2, clock=clock_of(device))["copy"]
    return 2 * source.numel() * source.element_size() / statistics.median(times)


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


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("transformers", "triton", "mamba_ssm"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _commit() -> str | None:
    """The checkout's commit, with `+changes` where files differ from it; None in an installed package. Results do not
    count: a run writes several."""
    root = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/results")
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def machine(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """What the figures were taken on; `commit` where git cannot tell."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if cuda else None,
        "versions": _versions(),
        "commit": _commit() or commit,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "copy_bytes_per_second": copy_bandwidth(device, 1024 if cuda else 256),
        "peak_memory_is": PEAK_MEMORY_IS[peak_memory_kind(device)],
    }
