"""The benchmark's rows as tables in the terminal, as a picture, and as the README's table."""

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .benchmark_contenders import COPY_BASED
from .benchmark_parts import crossovers, exponents

Row = dict[str, Any]
README_ENCODERS = ("vmamba_small_s2l15.in1k_224", "vit_small_patch16.augreg_in1k_224")
README_SIZES = ((224, 224), (512, 512), (1024, 1024))
MARKERS = "<!-- performance -->", "<!-- /performance -->"


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that were taken in turns, together."""
    keys = ("part", "height", "width", "batch", "dtype", "passes")
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        name = "" if row["part"] == "encoder" else row["name"]
        groups.setdefault((name, *(row[key] for key in keys)), []).append(row)
    return list(groups.values())


def milliseconds(seconds: float) -> str:
    """Three figures."""
    value = 1e3 * seconds
    return f"{value:.{max(0, 2 - math.floor(math.log10(max(value, 1e-3))))}f}" if value < 100 else f"{value:.0f}"


def _extras(row: Row) -> list[str]:
    words = []
    if "bytes_per_second" in row and row["variant"].endswith("alone"):
        words.append(f"{row['bytes_per_second'] / 1e9:.1f} GB/s")
    if "images_per_second" in row:
        words.append(f"{row['images_per_second']:.3g} images/s, {row['flops'] / row['batch'] / 1e9:.1f} GFLOP each")
    if "scan_share" in row:
        words.append(f"{100 * row['scan_share']:.0f} % scan")
    if "image_tokens" in row:
        words.append(f"{row['image_tokens']} tokens")
    if "tokens_per_second" in row:
        words.append(f"{row['tokens_per_second']:.3g} tokens/s")
    return words


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """One table for each setting, with the ratio of medians to its first row."""
    for group in _groups(rows):
        first = group[0]
        what = "encoders" if first["part"] == "encoder" else f"{first['part']}: {first['name']}"
        size = f"{first['height']}x{first['width']}"
        table = Table(
            title=f"{what}, {size}, batch {first['batch']}, {first['dtype']}, {first['passes']}",
            title_justify="left",
            box=SIMPLE_HEAD,
            padding=0,
        )
        for column in ("", "median ms", "quartiles", "fastest", "over first", "peak MB", ""):
            table.add_column(column, justify="right" if column else "left", no_wrap=bool(column))
        for row in group:
            name = f"{row['name']}, {row['variant']}" if row["part"] == "encoder" else row["variant"]
            table.add_row(
                name,
                milliseconds(row["median"]),
                f"{milliseconds(row['lower_quartile'])}-{milliseconds(row['upper_quartile'])}",
                milliseconds(row["fastest"]),
                f"{row['median'] / first['median']:.2f}",
                f"{row['peak_bytes'] / 1e6:.1f}",
                ", ".join(_extras(row)),
            )
        console.print(table)


def print_summary(record: dict[str, Any], console: Console) -> None:
    """Exponents, crossovers and the machine."""
    for key, exponent in record["exponents"].items():
        console.print(f"{key}: time grows as pixels to the power of {exponent:.2f}", markup=False)
    for crossing in record["crossovers"]:
        console.print(
            f"{crossing['cheaper_above']} is cheaper than {crossing['cheaper_below']} from about "
            f"{crossing['side']:.0f} px (square) up",
            markup=False,
        )
    machine = record["machine"]
    console.print(", ".join(f"{key}: {value}" for key, value in machine.items()), markup=False)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Milliseconds of one picture over the side of a square with as many pixels, both logarithmic; crossings marked.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["part"] == "encoder" and row["batch"] == 1:
            point = (math.sqrt(row["height"] * row["width"]), 1e3 * row["median"])
            curves.setdefault(f"{row['name']}, {row['variant']}", []).append(point)
    for name, points in curves.items():
        style = "--" if any(name.endswith(f", {variant}") for variant in COPY_BASED) else "-"
        axes.plot(*zip(*sorted(points), strict=True), style, marker="o", markersize=3, label=name)
    for crossing in crossovers(rows):
        place = (crossing["side"], 1e3 * crossing["median"])
        axes.plot(*place, "k+", markersize=12)
        axes.annotate(f"{crossing['side']:.0f}", place, textcoords="offset points", xytext=(5, -10))
    axes.set(xscale="log", yscale="log", xlabel="√(pixels)", ylabel="ms per picture, batch 1")
    axes.grid(True, which="both", alpha=0.3)
    if curves:
        axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)


def summaries(rows: Sequence[Row]) -> dict[str, Any]:
    """What follows from the rows together."""
    return {"exponents": exponents(rows), "crossovers": crossovers(rows)}


def _row_of(rows: Sequence[Row], **wanted: Any) -> Row | None:
    return next((row for row in rows if all(row[key] == value for key, value in wanted.items())), None)


def markdown_table(rows: Sequence[Row]) -> list[str]:
    """Lines of the README's table: a VMamba and a ViT side by side, and what the copies would cost. The first
    of equal rows counts."""
    lines = [
        "| encoder | pixels | batch | ms per picture | quartiles | scan | copy-based / ours |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    batches = sorted({row["batch"] for row in rows if row["part"] == "encoder"})
    for (height, width), batch, name in itertools.product(README_SIZES, batches, README_ENCODERS):
        here = {"part": "encoder", "name": name, "height": height, "width": width, "batch": batch}
        row, copies = (_row_of(rows, variant=variant, **here) for variant in ("default", "copy_based"))
        if row is None:
            continue
        quartiles = "-".join(milliseconds(row[f"{which}_quartile"] / batch) for which in ("lower", "upper"))
        ratio = "" if copies is None else f"{copies['median'] / row['median']:.1f}"
        share = f"{100 * row['scan_share']:.0f} %" if "scan_share" in row else ""
        figures = [milliseconds(row["median"] / batch), quartiles, share, ratio]
        lines.append(f"| {name.partition('.')[0]} | {height} | {batch} | {' | '.join(figures)} |")
    return lines


def _taken_on(record: Mapping[str, Any]) -> str:
    """One sentence: device, settings, versions and day."""
    machine = record["machine"]
    threads = "" if machine["cuda"] else f", {machine['cores']} cores, {machine['threads']} threads"
    return (
        f"{machine['device']}{threads}, {record['settings']['dtype']}, PyTorch {machine['versions']['torch']}, "
        f"{machine['date']}, random weights, to the tap, no head."
    )


def readme_block(paths: Sequence[Path]) -> str:
    """The README's part of all results files: one table for each machine, dtype, version of PyTorch and day. What was
    taken more than once is shown of the run with most rounds, among those that took the copy-based composition too.

    Raises:
        ValueError: there is no file, or one that the benchmark did not write.
    """
    if not paths:
        raise ValueError("There are no results files: run the benchmark with --output, or name files after --table.")
    records = []
    for path in paths:
        try:
            record = json.loads(path.read_text())
            with_copies = any(row["variant"] == "copy_based" for row in record["rows"])
            records.append(((with_copies, record["settings"]["rounds"]), _taken_on(record), record["rows"]))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no results file of this benchmark ({error!r}).") from error
    rows: dict[str, list[Row]] = {}
    for _, taken_on, of_record in sorted(records, key=lambda record: record[0], reverse=True):
        rows.setdefault(taken_on, []).extend(of_record)
    tables = {taken_on: markdown_table(of) for taken_on, of in rows.items()}
    return "\n\n".join("\n".join([*lines, "", taken_on]) for taken_on, lines in tables.items() if len(lines) > 2)


def write_readme(readme: Path, block: str) -> None:
    """Puts the block between the README's markers.

    Raises:
        ValueError: the README has no such markers.
    """
    start, end = MARKERS
    text = readme.read_text()
    pattern = re.compile(f"{re.escape(start)}\n.*?{re.escape(end)}", flags=re.DOTALL)
    if pattern.search(text) is None:
        raise ValueError(f"{readme} has no lines {start} and {end} to put the table between.")
    readme.write_text(pattern.sub(lambda _: f"{start}\n{block}\n{end}", text))
