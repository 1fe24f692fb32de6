"""`ssm-vlm encoders`: the table of named encoders."""

import argparse
import json
import sys
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from rich.console import Console
from rich.table import Table

from .configuration.named_encoders import ENCODERS, NamedEncoder
from .modeling.token_grid import encoder_downsampling, grid_size

_FOOT = (
    "Parameters and FLOPs are counted up to the tap, at the canvas shown; a multiply and an add are two FLOPs. "
    "top-1 is that of the whole published model on ImageNet at 224 pixels. loaded: whether this code ever loaded the "
    "published file itself, beyond tests on random weights in its layout; own: trained by this project."
)
_LOADED = {(True, True): "yes", (True, False): "no", (False, False): "own", (False, True): "own"}
_WIDE = 150


def describe(encoder: NamedEncoder) -> dict[str, Any]:
    """One row of the table, JSON-ready; sizes are [height, width], the grid's in tokens."""
    config, preprocessing = encoder.config(), encoder.preprocessing
    rows, columns = grid_size(preprocessing.height, preprocessing.width, encoder_downsampling(config))
    return {
        "name": encoder.name,
        "model_type": config.model_type,
        "tap": config.out_features[-1],
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


def _table(rows: Iterable[dict[str, Any]]) -> Table:
    table = Table(caption=_FOOT, caption_justify="left")
    left: dict[str, Any] = {"overflow": "fold"}
    right: dict[str, Any] = {"justify": "right", "no_wrap": True}
    columns = {"encoder": {"no_wrap": True}, "tap": left, "canvas": right, "geometry": left, "tokens": right}
    columns |= {"params M": right, "GFLOPs": right, "top-1": right, "licence": left, "loaded": left}
    for heading, options in columns.items():
        table.add_column(heading, **options)
    for row in rows:
        canvas, grid = ("x".join(map(str, row[key])) for key in ("canvas", "grid"))
        table.add_row(
            row["name"],
            row["tap"],
            canvas,
            row["geometry"],
            f"{grid} = {row['tokens']}",
            f"{row['parameters'] / 1e6:.2f}",
            f"{row['flops'] / 1e9:.2f}",
            "" if row["imagenet_top1"] is None else f"{row['imagenet_top1']:.1f}",
            row["licence"],
            _LOADED[row["weights"] is not None, row["loaded_from_real_file"]],
        )
    return table


def main(argv: list[str] | None = None) -> int:
    """Lists the named encoders.

    Returns:
        0, or 1 where `--filter` meets none.
    """
    parser = argparse.ArgumentParser(prog="ssm-vlm encoders", description="List the named encoders.")
    parser.add_argument(
        "--filter", metavar="GLOB", default="*", help="only names that match, such as 'vmamba_*.in1k_*'"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args(argv)
    rows = [describe(encoder) for name, encoder in ENCODERS.items() if fnmatchcase(name, arguments.filter)]
    if not rows:
        print(f"No encoder's name matches {arguments.filter!r}; `ssm-vlm encoders` lists all.", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else _WIDE).print(_table(rows))
    return 0


__all__ = ["describe", "main"]
