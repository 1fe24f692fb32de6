"""`ssm-vlm convert`: published weights become a folder that Transformers loads."""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.utils import logging

from .modeling.encoder_conversion import Conversion, convert_published

_STEPS = 4


def describe(conversion: Conversion, encoder: str | None) -> str:
    """What was made, in a few lines."""
    model = conversion.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    names = conversion.names
    lines = {
        "class": type(model).__name__,
        "named": encoder or ", ".join(names[:4]) + ("" if len(names) < 5 else ", ...") or "no encoder of the table",
        "stages": " ".join(name for name in getattr(model.config, "stage_names", None) or () if name != "stem"),
        "parameters": f"{parameters:,}",
        "left out": f"{len(conversion.discarded)} tensors of the source",
        "pictures": f"as for {conversion.preprocessing}" if conversion.preprocessing else "as for the source",
    }
    shown = "\n".join(f"  {key:<11}{value}" for key, value in lines.items() if value)
    if encoder is None and conversion.preprocessing and len(names) != 1:
        shown += "\n  (with --encoder NAME the source is held to that encoder, and pictures are prepared as it needs)"
    return f"{conversion.folder}\n{shown}"


def main(argv: Sequence[str] | None = None) -> int:
    """Converts one source and says what it was."""
    parser = argparse.ArgumentParser(prog="ssm-vlm convert", description=__doc__.partition(": ")[2])
    parser.add_argument("source", metavar="SOURCE", help="published file, or folder of a downloaded repository")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder to make")
    parser.add_argument("--encoder", metavar="NAME", help="refuse a source that is not this one of `ssm-vlm encoders`")
    parser.add_argument("--push", metavar="REPO", help="upload the folder to this repository of the Hub")
    arguments = parser.parse_args(argv)
    logging.disable_progress_bar()
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("starting", total=_STEPS)

        def progress(step: str) -> None:
            bar.update(task, description=step, advance=1)

        conversion = convert_published(arguments.source, arguments.output, arguments.encoder, progress)
    print(describe(conversion, arguments.encoder))
    if arguments.push:
        from .push_command import push_folder

        print(push_folder(conversion.folder, arguments.push))
    return 0


__all__ = ["describe", "main"]
