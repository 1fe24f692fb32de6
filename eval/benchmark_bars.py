"""What the library promises of its speed, each promise held against results: met, missed, or not measured."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .benchmark_encoder import crossovers, exponents
from .benchmark_results import Measured, Record, fastest, fastest_pair, matching, merged_rows, ratio

VMAMBA, VIT = "vmamba_small_s2l15.in1k_224", "vit_small_patch16.augreg_in1k_224"
MIN_SIZES = 4
"""An exponent from fewer sizes says little."""


@dataclass(frozen=True)
class Bar:
    """One promise."""

    words: str
    limit: float
    find: Callable[[Sequence[Record]], Measured | None]
    """Records of one machine -> what they say, or None if they say nothing."""
    at_least: bool = False
    unit: str = ""

    @property
    def promise(self) -> str:
        """The limit in words, for example "at least 4"."""
        return f"at {'least' if self.at_least else 'most'} {self.limit:g}{self.unit}"

    def verdict(self, found: Measured | None) -> str:
        """Met or missed by the median."""
        if found is None:
            return "not measured"
        met = found.value >= self.limit if self.at_least else found.value <= self.limit
        return "met" if met else "missed"


def _encoder(name: str, side: int, dtype: str, batch: int = 1, variant: str | None = None) -> dict[str, Any]:
    wanted = {"part": "encoder", "name": name, "height": side, "width": side, "dtype": dtype, "batch": batch}
    return wanted | {"passes": "forward"} | ({"variant": variant} if variant else {})


def _ratio(over: Mapping[str, Any], under: Mapping[str, Any]) -> Callable[[Sequence[Record]], Measured | None]:
    def find(records: Sequence[Record]) -> Measured | None:
        pair = fastest_pair(records, over, under)
        return None if pair is None else ratio(*pair)

    return find


def _milliseconds(wanted: Mapping[str, Any]) -> Callable[[Sequence[Record]], Measured | None]:
    def find(records: Sequence[Record]) -> Measured | None:
        row = fastest(merged_rows(records), wanted)
        if row is None:
            return None
        return Measured(*(1e3 * row[key] for key in ("median", "lower_quartile", "upper_quartile")))

    return find


def _share_of_copy(wanted: Mapping[str, Any]) -> Callable[[Sequence[Record]], Measured | None]:
    """Compulsory bytes per second over those that the same run's copy moves."""

    def find(records: Sequence[Record]) -> Measured | None:
        for record in records:
            for row in matching(record["rows"], wanted):
                bytes_moved, copied = row["compulsory_bytes"], record["machine"]["copy_bytes_per_second"]
                times = (row[key] for key in ("median", "upper_quartile", "lower_quartile"))
                return Measured(*(bytes_moved / seconds / copied for seconds in times))
        return None

    return find


def _exponent(variant: str, dtype: str) -> Callable[[Sequence[Record]], Measured | None]:
    """Of all sizes; around it the least and the most where any one size is left out."""

    def find(records: Sequence[Record]) -> Measured | None:
        wanted = {
            "part": "encoder",
            "name": VMAMBA,
            "variant": variant,
            "dtype": dtype,
            "batch": 1,
            "passes": "forward",
        }
        rows = list(matching(merged_rows(records), wanted))
        if len(rows) < MIN_SIZES:
            return None
        (exponent,) = exponents(rows).values()
        without = [next(iter(exponents(rows[:left] + rows[left + 1 :]).values())) for left in range(len(rows))]
        return Measured(exponent, min(without), max(without))

    return find


def _crossover(variant: str, dtype: str) -> Callable[[Sequence[Record]], Measured | None]:
    def find(records: Sequence[Record]) -> Measured | None:
        wanted = {"part": "encoder", "variant": variant, "dtype": dtype, "batch": 1, "passes": "forward"}
        pairs = []
        for side in sorted({row["height"] for row in merged_rows(records) if row["height"] == row["width"]}):
            square = wanted | {"height": side, "width": side}
            pair = fastest_pair(records, square | {"name": VMAMBA}, square | {"name": VIT})
            if pair is not None:
                pairs.append(pair)
        rows = [row for pair in pairs for row in pair]
        sides = [found["side"] for found in crossovers(rows) if found["cheaper_above"] == VMAMBA]
        if sides:
            return Measured(max(sides))
        if len(pairs) < MIN_SIZES:
            return None
        ours, vit = pairs[-1]
        return Measured(pairs[0][0]["height"] if ours["median"] < vit["median"] else math.inf)

    return find


SCANS = {
    "copy_based": "torch's loop", "copy_based_prebuilt": "Mamba's kernel", "copy_based_own_scan": "our own 1-D scan"
}  # fmt: skip
"""Copy-based contender -> what scans its copies."""
RUN_AS = {"default": "", "compiled": ", both compiled for inference"}


def _cpu_bars() -> list[Bar]:
    dtype, bars = "float32", []
    for variant, words, limit in (
        ("chunked", "without a compiler", 1.5),
        ("default", "with a compiler", 4),
        ("compiled", "compiled for inference", 4),
    ):
        for batch in (1, 16):
            copies, ours = (_encoder(VMAMBA, 224, dtype, batch, way) for way in ("copy_based", variant))
            title = f"VMamba-S, 224 px, batch {batch}, {words}: copy-based / ours"
            bars.append(Bar(title, limit, _ratio(copies, ours), at_least=True))
    for variant, words in RUN_AS.items():
        for batch in (1, 16):
            both = (_encoder(name, 224, dtype, batch, variant) for name in (VMAMBA, VIT))
            bars.append(Bar(f"VMamba-S / ViT-S, 224 px, batch {batch}{words}", 3, _ratio(*both)))
        for side in (1024, 1536, 2048):
            both = (_encoder(name, side, dtype, 1, variant) for name in (VMAMBA, VIT))
            bars.append(Bar(f"VMamba-S / ViT-S, {side} px, batch 1{words}", 1, _ratio(*both)))
        title = f"VMamba-S passes ViT-S at{words}"
        bars.append(Bar(title, 1024, _crossover(variant, dtype), unit=" px"))
    for variant, words in (("default", ""), ("compiled", ", compiled for inference")):
        bars.append(Bar(f"VMamba-S, exponent of time over pixels{words}", 1.1, _exponent(variant, dtype)))
    return bars


def _cuda_bars() -> list[Bar]:
    dtype, bars = "bfloat16", []
    for height, channels in ((56, 192), (14, 768)):
        shape = f"{height}x{height}x{channels}"
        for passes, limit in (("forward", 3), ("forward+backward", 2)):
            wanted = {"part": "op", "name": f"{channels} channels, 1 states", "height": height, "width": height,
                      "batch": 64, "dtype": dtype, "passes": passes}  # fmt: skip
            for copies, scan in SCANS.items():
                ratio_of = _ratio(wanted | {"variant": copies}, wanted | {"variant": "triton"})
                title = f"op {shape}, batch 64, {passes}: copies and {scan} / ours"
                bars.append(Bar(title, limit, ratio_of, at_least=True))
        alone = wanted | {"variant": "triton alone", "passes": "forward"}
        title = f"op {shape}, batch 64, forward: compulsory bytes, share of copy bandwidth"
        bars.append(Bar(title, 0.5, _share_of_copy(alone), at_least=True))
    for side, limit in ((224, 4), (512, 4), (1024, 6)):
        title = f"VMamba-S, {side} px, batch 1, bfloat16"
        bars.append(Bar(title, limit, _milliseconds(_encoder(VMAMBA, side, dtype)), unit=" ms"))
    for side, most in ((224, 2), (1536, 1), (2048, 0.5)):
        both = (_encoder(name, side, dtype) for name in (VMAMBA, VIT))
        bars.append(Bar(f"VMamba-S / ViT-S, {side} px, batch 1, best of each, bfloat16", most, _ratio(*both)))
    for copies, scan in SCANS.items():
        both = (_encoder(VMAMBA, 224, dtype, 128, variant) for variant in (copies, "default"))
        title = f"VMamba-S, 224 px, batch 128, bfloat16: copies and {scan} / ours"
        bars.append(Bar(title, 2, _ratio(*both), at_least=True))
    return bars


CPU_BARS, CUDA_BARS = _cpu_bars(), _cuda_bars()


def bars_table(bars: Sequence[Bar], records: Sequence[Record]) -> list[str]:
    """Lines of Markdown: every bar with what was measured."""
    lines = ["| bar | promised | measured | spread | |", "|---|---:|---:|---:|---|"]
    for bar in bars:
        found = bar.find(records)
        value = spread = ""
        if found is not None:
            value = f"{_figures(found.value)}{bar.unit}"
        if found is not None and found.lower is not None and found.upper is not None:
            spread = f"{_figures(found.lower)} to {_figures(found.upper)}"
        lines.append(f"| {bar.words} | {bar.promise} | {value} | {spread} | {bar.verdict(found)} |")
    return lines


def _figures(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def count_verdicts(bars: Sequence[Bar], records: Sequence[Record]) -> str:
    """For example "20 bars: 17 met, 2 missed, 1 not measured"."""
    verdicts = [bar.verdict(bar.find(records)) for bar in bars]
    return f"{len(bars)} bars: " + ", ".join(
        f"{verdicts.count(word)} {word}" for word in ("met", "missed", "not measured")
    )
