"""`ssm-vlm convert`: published weights become a folder that Transformers loads."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from huggingface_hub.utils import validate_repo_id
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.utils import logging

from .modeling.convert_paper_vlm import convert_paper_release
from .modeling.encoder_conversion import Conversion, convert_published
from .modeling.release_archive import is_paper_release

_STEPS = 4


def describe(conversion: Conversion, encoder: str | None) -> str:
    """What was made, in a few lines."""
    model = conversion.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    names = conversion.names
    lines = {
        "class": type(model).__name__,
        "named": encoder or ", ".join(names[:4]) + ("" if len(names) < 5 else ", ...") or "no encoder of the table",
        "taps": _taps(model.config),
        "parameters": f"{parameters:,}",
        "left out": f"{len(conversion.discarded)} tensors of the source",
        "pictures": f"{'assumed to be ' if conversion.assumed else ''}as for {conversion.preprocessing}"
        if conversion.preprocessing
        else "as for the source",
    }
    shown = "\n".join(f"  {key:<11}{value}" for key, value in lines.items() if value)
    if encoder is None and conversion.preprocessing and len(names) != 1:
        shown += "\n  (with --encoder NAME the source is held to that encoder, and pictures are prepared as it needs)"
    return f"{conversion.folder}\n{shown}"


def _assumption(conversion: Conversion) -> str:
    """What is not known of the pictures, in a sentence."""
    why = "several of the table have this architecture and differ in it" if conversion.names else "none of the table is"
    return (
        f"note: mean, standard deviation and interpolation of the pictures are assumed, those of "
        f"{conversion.preprocessing}: no file shows them, and {why}"
        + ("." if conversion.names else " this encoder at this size.")
    )


def _taps(config: Any) -> str:
    """Names that `vision_tap` may have; of a plain transformer the first and the last."""
    names = getattr(config, "stage_names", None) or ()
    blocks = getattr(config, "num_hidden_layers", None)
    return " ".join(names) if len(names) > 1 else f"block1 to block{blocks}" if blocks else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Converts one source and says what it was."""
    parser = argparse.ArgumentParser(prog="ssm-vlm convert", description=__doc__.partition(": ")[2])
    parser.add_argument("source", metavar="SOURCE", help="published file, folder of a download, or a paper's VLM .tar")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder to make")
    parser.add_argument("--encoder", metavar="NAME", help="refuse a source that is not this one of `ssm-vlm encoders`")
    parser.add_argument(
        "--encoder-weights", metavar="WEIGHTS", help="of a paper's VLM: its encoder, as published or converted"
    )
    parser.add_argument(
        "--language-model", metavar="DIR", help="of a paper's VLM: folder or Hub id with config and tokenizer"
    )
    parser.add_argument("--push", metavar="REPO", help="upload the folder to this repository of the Hub")
    arguments = parser.parse_args(argv)
    if arguments.push is not None:
        validate_repo_id(arguments.push)
    is_vlm = is_paper_release(arguments.source)
    if is_vlm and arguments.encoder:
        parser.error("--encoder is for encoders; a release of the paper's VLMs says itself which one it has")
    if not is_vlm and (arguments.encoder_weights or arguments.language_model):
        parser.error(f"{arguments.source} is no release of the paper's VLMs, only these take --encoder-weights")
    logging.disable_progress_bar()
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=_STEPS)

        def progress(step: str) -> None:
            bar.update(task, description=step, advance=1)

        if is_vlm:
            parts = {"encoder_weights": arguments.encoder_weights, "language_model": arguments.language_model}
            folder = convert_paper_release(arguments.source, arguments.output, **parts, progress=progress)
            description = str(folder)
        else:
            conversion = convert_published(arguments.source, arguments.output, arguments.encoder, progress)
            folder, description = conversion.folder, describe(conversion, arguments.encoder)
            if conversion.assumed:
                print(_assumption(conversion), file=sys.stderr)
    print(description)
    if arguments.push is not None:
        from .push_command import push_folder

        print(push_folder(folder, arguments.push))
    return 0


__all__ = ["describe", "main"]
