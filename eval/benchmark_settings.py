"""What all parts of the benchmark share: rows, the settings of a run, and who is timed and who is skipped.

A row says what ran (`part`, `name`, `variant`, `passes`, `height`, `width`, `batch`, `dtype`), every time in seconds,
their median and quartiles, the peak memory, and what the part adds. Rows of one setting were taken in turns.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .benchmark_timing import MIN_ROUNDS, Call, clock_of, measure, peak_memory, summarise

Row = dict[str, Any]
FORWARD, BOTH = "forward", "forward+backward"

LONG_CALL = 5.0
"""Seconds; a call foreseen to take longer gets no warm-up, which would be lost in it."""
COMPILING = 30.0
"""Seconds that a first call may take over the budget: kernels are compiled in it."""


@dataclass
class Settings:
    """What all parts share."""

    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    rounds: int = 10
    budget: float = 60.0
    skipped: list[dict[str, str]] = field(default_factory=list)
    say: Callable[[str], None] = print

    @property
    def dtype_name(self) -> str:
        """For example "float32"."""
        return str(self.dtype).removeprefix("torch.")

    def skip(self, what: str, reason: str) -> None:
        """Names what is left out, in the terminal and in the saved file."""
        entry = {"what": what, "reason": reason}
        if entry not in self.skipped:
            self.skipped.append(entry)
            self.say(f"not run: {what}: {reason}")

    @contextlib.contextmanager
    def or_skip(self, what: str) -> Iterator[None]:
        """What does not fit into memory or fails is skipped and named; the others still run."""
        try:
            yield
        except (MemoryError, torch.OutOfMemoryError):
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.skip(what, "out of memory")
        except Exception as error:  # compilers of kernels raise errors of their own
            self.skip(what, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")

    def run(
        self, setting: Row, contenders: Mapping[str, Call], expected: Mapping[str, float] | None = None
    ) -> list[Row]:
        """Time contenders in turns; one that cannot run here, or not in time, is skipped and named.

        Args:
            setting: what the rows share.
            contenders: variant -> what to time.
            expected: variant -> seconds that a call is expected to take.
        """
        expected, runnable, warm, peaks = expected or {}, {}, {}, {}
        for variant, call in contenders.items():
            title, guess = f"{describe(setting)}, {variant}", expected.get(variant, 0.0)
            if guess * MIN_ROUNDS > self.budget:
                self.skip(title, f"about {guess:.0f} s a call, more than the budget of {self.budget:g} s allows")
                continue
            with self.or_skip(title):
                taken, peak = self._warm_up(call, guess)
                if taken * MIN_ROUNDS > self.budget:
                    self.skip(title, f"{taken:.1f} s a call, more than the budget of {self.budget:g} s allows")
                    continue
                runnable[variant], warm[variant], peaks[variant] = call, taken, peak
        if not runnable:
            return []
        long = [variant for variant in runnable if expected.get(variant, 0.0) > LONG_CALL]
        seconds = self._measure(setting, runnable, warm, long)
        return [
            setting | {"variant": variant} | summarise(times) | {"peak_bytes": peaks[variant], "seconds": times}
            for variant, times in seconds.items()
        ]

    def _warm_up(self, call: Call, guess: float) -> tuple[float, int]:
        """Seconds of a warm call, and its peak memory. What is foreseen to be long is called once."""
        clock, seconds = clock_of(self.device), []
        if guess <= LONG_CALL:
            first = clock(call)
            if first > self.budget + COMPILING:
                return first, 0
        peak = peak_memory(lambda: seconds.append(clock(call)), self.device)
        return seconds[0], peak

    def _measure(
        self, setting: Row, runnable: dict[str, Call], warm: Mapping[str, float], long: Collection[str]
    ) -> dict[str, list[float]]:
        with self.or_skip(describe(setting)):
            return measure(runnable, self.rounds, 0, clock_of(self.device), self.budget, warm, long)
        return {}


def describe(setting: Row) -> str:
    """A setting in words, for example "encoders at 224x224, batch 1, forward"."""
    what = "encoders" if setting["part"] == "encoder" else f"{setting['part']} {setting['name']}"
    return f"{what} at {setting['height']}x{setting['width']}, batch {setting['batch']}, {setting['passes']}"
