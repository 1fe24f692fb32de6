"""The benchmark's rows as tables in the terminal."""

import math
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .benchmark_encoder import crossovers, exponents
from .benchmark_settings import Row


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
        words.append(f"{row['image_tokens']} image tokens")
    if "encoder_share" in row:
        words.append(f"{100 * row['encoder_share']:.0f} % encoder")
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
            f"{crossing['side']:.0f} px (square) up, {crossing['variant']}",
            markup=False,
        )
    machine = record["machine"]
    console.print(", ".join(f"{key}: {value}" for key, value in machine.items()), markup=False)


def summaries(rows: Sequence[Row]) -> dict[str, Any]:
    """What follows from the rows together."""
    return {"exponents": exponents(rows), "crossovers": crossovers(rows)}
