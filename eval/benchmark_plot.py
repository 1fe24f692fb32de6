"""A picture of encoders' times over pixels, the crossovers marked."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .benchmark_bars import VMAMBA
from .benchmark_encoder import crossovers
from .benchmark_settings import Row

COLOURS = ("#c1121f", "#e76f51", "#780000", "#2a9d8f", "#6a4c93", "#1d4ed8", "#60a5fa", "#6b7280")
FIRST_COLOURS = {
    "vmamba_small_s2l15.in1k_224": 0, "vmamba_tiny_s1l8.in1k_224": 1, "vmamba_base_s2l15.in1k_224": 2,
    "swin_small.in1k_224": 3, "convnext_small.in1k_224": 4, "vit_small_patch16.augreg_in1k_224": 5,
    "vit_base_patch16.augreg_in1k_224": 6,
}  # fmt: skip
STYLES = {
    "default": ("-", "o", 4, ""),
    "compiled": ("--", "o", 3, ", compiled"),
    "chunked": (":", "v", 6, ", no compiler"),
    "copy_based": (":", "X", 7, ", copy-based"),
}
"""Variant -> line, marker, its size, words."""
LABELS = {"default": (-62, 16), "compiled": (16, -24)}
"""Variant -> where the words at a ring stand, in points from it."""
TICKS = (224, 384, 512, 768, 1024, 1536, 2048)


def plot(groups: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Time of one picture over its side (left) and time of a megapixel, which is level where time grows as pixels do
    (right); axes logarithmic. A ring is where VMamba-S passes another encoder that runs alike; a square is 800x1333.

    Args:
        groups: title -> rows of one machine and dtype; two panels each.
        path: picture to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.9 + 4.1 * len(groups)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(groups), 2, squeeze=False)
    for (title, rows), (left, right) in zip(groups.items(), panels, strict=True):
        _draw(left, rows, lambda milliseconds, side: milliseconds)
        _draw(right, rows, lambda milliseconds, side: milliseconds * 1e6 / side**2)
        left.set_title(title, loc="left", fontsize=10)
        left.set_ylabel("ms per picture")
        right.set_ylabel("ms per megapixel")
    handles = {
        label: line for axes in panels.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _draw(axes: Any, rows: Sequence[Row], height: Callable[[float, float], float]) -> None:
    """One panel; `height` makes of milliseconds and side what is drawn."""
    from matplotlib.ticker import LogLocator, NullFormatter

    alone = [row for row in rows if row["part"] == "encoder" and row["batch"] == 1 and row["variant"] in STYLES]
    curves: dict[tuple[str, str], list[Row]] = {}
    for row in alone:
        curves.setdefault((row["name"], row["variant"]), []).append(row)
    other = len(FIRST_COLOURS)
    for (name, variant), of_curve in sorted(curves.items(), key=lambda item: FIRST_COLOURS.get(item[0][0], other)):
        line, marker, size, words = STYLES[variant]
        colour = COLOURS[FIRST_COLOURS.get(name, other)]
        points = sorted((_side(row), height(1e3 * row["median"], _side(row))) for row in of_curve if _square(row))
        axes.plot(
            [x for x, _ in points], [y for _, y in points], line, color=colour, label=name.partition(".")[0] + words,
            marker=marker, markersize=size, linewidth=1.6,
        )  # fmt: skip
        if variant == "default":
            others = [(_side(row), height(1e3 * row["median"], _side(row))) for row in of_curve if not _square(row)]
            axes.plot([p[0] for p in others], [p[1] for p in others], "s", color=colour, markersize=5, fillstyle="none")
    passed = [found for found in crossovers(alone) if found["cheaper_above"] == VMAMBA]
    for variant, (right, up) in LABELS.items():
        of_variant = sorted((found for found in passed if found["variant"] == variant), key=lambda found: found["side"])
        for rank, crossing in enumerate(of_variant):
            place = (crossing["side"], height(1e3 * crossing["median"], crossing["side"]))
            axes.plot(*place, "o", color="black", markersize=11, fillstyle="none", markeredgewidth=1.3)
            axes.annotate(
                f"{crossing['side']:.0f} px", place, textcoords="offset points", fontsize=9,
                xytext=(right, up * (1 + rank)), arrowprops={"arrowstyle": "-", "linewidth": 0.8},
                bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"},
            )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="side in pixels")
    sides = sorted({row["height"] for row in alone if _square(row)})
    axes.set_xticks([tick for tick in TICKS if tick in sides] or sides, minor=False)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="both", alpha=0.25)


def _square(row: Row) -> bool:
    return row["height"] == row["width"]


def _side(row: Row) -> float:
    return math.sqrt(row["height"] * row["width"])
