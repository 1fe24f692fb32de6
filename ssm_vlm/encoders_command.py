"""`ssm-vlm encoders`: the table of named encoders, grouped by family, as many columns as the terminal holds."""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

from .configuration.named_encoders import ENCODERS, NamedEncoder
from .configuration.taps import tap_norm
from .modeling.token_grid import encoder_downsampling, grid_size

_NOTES = {
    "norm": "norm: what the encoder itself does to its tap; parameter-free where the files hold none.",
    "params M": "params, GFLOPs: up to the tap, heads never; a multiply and an add are two FLOPs.",
    "top-1": "top-1: ImageNet, whole published model.",
    "loaded": "loaded: did this code ever load the published file itself? own: this project trains it.",
}
_LOADED = {(True, True): "yes", (True, False): "no", (False, False): "own", (False, True): "own"}
_FAMILY = re.compile(r"vit_adapter|pvt_v2|[a-z]+\d?")
_GAP = "  "


def describe(encoder: NamedEncoder) -> dict[str, Any]:
    """One row of the table, JSON-ready; sizes are [height, width], the grid's in tokens."""
    config, preprocessing = encoder.config(), encoder.preprocessing
    rows, columns = grid_size(preprocessing.height, preprocessing.width, encoder_downsampling(config))
    return {
        "name": encoder.name,
        "family": family(encoder.name),
        "model_type": config.model_type,
        "tap": config.out_features[-1],
        "tap_norm": tap_norm(config),
        "canvas": [preprocessing.height, preprocessing.width],
        "geometry": preprocessing.geometry,
        "grid": [rows, columns],
        "tokens": rows * columns,
        "parameters": encoder.parameters,
        "flops": encoder.flops,
        "imagenet_top1": encoder.imagenet_top1,
        "licence": encoder.licence,
        "weights": encoder.weights and (encoder.weights.hub_id or encoder.weights.url),
        "loaded_from_real_file": encoder.loaded_from_real_file,
    }


def family(name: str) -> str:
    """What the names of one family begin with: "vmamba", "deit3", "vit_adapter", ..."""
    match = _FAMILY.match(name)
    return match[0] if match else name


@dataclass(frozen=True)
class _Column:
    heading: str
    show: Callable[[dict[str, Any]], str]
    is_number: bool = False


def _size(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: "x".join(map(str, row[key]))


_COLUMNS = [  # in the order in which they are shown
    _Column("encoder", lambda row: row["name"]),
    _Column("tap", lambda row: row["tap"]),
    _Column("norm", lambda row: row["tap_norm"]),
    _Column("canvas", _size("canvas"), is_number=True),
    _Column("grid", _size("grid"), is_number=True),
    _Column("tokens", lambda row: str(row["tokens"]), is_number=True),
    _Column("params M", lambda row: f"{row['parameters'] / 1e6:.1f}", is_number=True),
    _Column("GFLOPs", lambda row: f"{row['flops'] / 1e9:.1f}", is_number=True),
    _Column("top-1", lambda row: "" if row["imagenet_top1"] is None else f"{row['imagenet_top1']:.1f}", is_number=True),
    _Column("loaded", lambda row: _LOADED[row["weights"] is not None, row["loaded_from_real_file"]]),
    _Column("licence", lambda row: row["licence"]),
    _Column("geometry", lambda row: row["geometry"]),
    _Column("weights", lambda row: (row["weights"] or "").removeprefix("https://")),
]
_LEAD = {"encoder": 44, "tap": 7}
"""Columns that a row begins with -> most characters that they get where not everything fits."""
_BY_IMPORTANCE = ["encoder", "tap", "tokens", "params M", "top-1", "loaded", "GFLOPs", "licence", "norm", "canvas"]
_BY_IMPORTANCE += ["grid", "geometry", "weights"]


def _chosen(rows: list[dict[str, Any]], room: int | None) -> list[tuple[_Column, int]]:
    """The most important columns that fit into `room` characters, with their widths; all where it is None."""
    widths = {column.heading: max(len(column.heading), *(len(column.show(r)) for r in rows)) for column in _COLUMNS}
    if room is not None and sum(widths.values()) + len(_GAP) * len(widths) > room:
        widths |= {heading: min(widths[heading], most) for heading, most in _LEAD.items()}
    kept: set[str] = set()
    used = -len(_GAP)
    for heading in _BY_IMPORTANCE:
        used += widths[heading] + len(_GAP)
        if room is not None and used > room and kept:
            break
        kept.add(heading)
    return [(column, widths[column.heading]) for column in _COLUMNS if column.heading in kept]


def _line(chosen: list[tuple[_Column, int]], texts: list[str]) -> str:
    """One row; where the name or the tap is too long for its column, what follows stands on a second line."""
    cells: list[str] = []
    lead: list[str] = []
    for (column, width), text in zip(chosen, texts, strict=True):
        (lead if column.heading in _LEAD else cells).append((text.rjust if column.is_number else text.ljust)(width))
    wide = any(len(text) > width for (_, width), text in zip(chosen, texts, strict=True))
    indent = sum(width + len(_GAP) for column, width in chosen if column.heading in _LEAD)
    between = "\n" + " " * indent if wide and cells else _GAP
    return (_GAP.join(lead).rstrip() if wide else _GAP.join(lead)) + between + _GAP.join(cells).rstrip()


def _counted(rows: list[dict[str, Any]]) -> str:
    licences = ", ".join(dict.fromkeys(row["licence"] for row in rows))
    loaded = f"{sum(row['loaded_from_real_file'] for row in rows)} loaded"
    return f"{len(rows)} encoder{'s' if len(rows) > 1 else ''}, {licences}, {loaded if rows[0]['weights'] else 'own'}"


def _print_table(console: Console, rows: list[dict[str, Any]], room: int | None) -> None:
    chosen = _chosen(rows, room)
    width = sum(width + len(_GAP) for _, width in chosen) - len(_GAP)

    def put(text: str | Text, style: str = "") -> None:
        console.print(text, style=style, soft_wrap=True, highlight=False, markup=False)

    put(_line(chosen, [column.heading for column, _ in chosen]), "bold")
    for name, group in groupby(rows, key=lambda row: row["family"]):
        members = list(group)
        title = Text.assemble("── ", (name, "bold"), f"  {_counted(members)} ")
        put(title + Text("─" * max(width - len(title), 2)), "cyan")
        for row in members:
            put(_line(chosen, [column.show(row) for column, _ in chosen]))
    shown = [column.heading for column, _ in chosen]
    notes = [note for heading, note in _NOTES.items() if heading in (*shown, "loaded")]
    if len(shown) < len(_COLUMNS):
        missing = ", ".join(column.heading for column in _COLUMNS if column.heading not in shown)
        notes.append(f"Not shown: {missing}; a wider terminal, --wide or --json shows them.")
    put("")
    for note in notes:
        console.print(note, style="dim", highlight=False, markup=False)


def _matches(name: str, pattern: str) -> bool:
    """A pattern without wildcards may stand anywhere in the name."""
    return fnmatchcase(name, pattern if set(pattern) & set("*?[") else f"*{pattern}*")


def _by_family(encoders: Iterable[NamedEncoder]) -> list[dict[str, Any]]:
    """Rows in the table's order, but the members of each family together."""
    rows = [describe(encoder) for encoder in encoders]
    order = list(dict.fromkeys(row["family"] for row in rows))
    return sorted(rows, key=lambda row: order.index(row["family"]))


def main(argv: list[str] | None = None) -> int:
    """Lists the named encoders.

    Returns:
        0, or 1 where `--filter` meets none.
    """
    parser = argparse.ArgumentParser(prog="ssm-vlm encoders", description="List the named encoders.")
    parser.add_argument(
        "--filter", metavar="PATTERN", default="*", help="part of a name, such as vmamba_small, or 'vit_*.augreg*'"
    )
    parser.add_argument("--wide", action="store_true", help="every column, however wide the terminal")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args(argv)
    rows = _by_family(encoder for name, encoder in ENCODERS.items() if _matches(name, arguments.filter))
    if not rows:
        print(f"No encoder's name matches {arguments.filter!r}; `ssm-vlm encoders` lists all.", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        console = Console()
        whole = arguments.wide or not console.is_terminal
        _print_table(console, rows, None if whole else console.width)
    return 0


__all__ = ["describe", "family", "main"]
