"""Published weights become a folder in Transformers' format, whole or not at all."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration.named_encoders import ENCODERS, NamedEncoder, get_named_encoder
from ..configuration.taps import tapped_config
from .checkpoint_files import file_sha256
from .checkpoint_report import check_same_architecture
from .encoder_loading import hold_to_named, read_named, read_transformers
from .encoder_preprocessing import encoder_image_processor
from .image_processing_llava_style import LlavaStyleImageProcessor
from .model_card import leave_card
from .published_weights import read_published
from .saved_folder import ORIGIN_FILE

SHARD_SIZE = "4GB"
"""Most that one file of weights holds."""


@dataclass(frozen=True)
class Conversion:
    """What a conversion made.

    Args:
        folder: where it is.
        layout: how the source names its tensors, a name in `LAYOUTS` or "transformers".
        model: the whole model; buffers that are no weights may have no memory.
        names: encoders of the table that have this architecture and come in this layout.
        preprocessing: the encoder of the table whose image processor was taken; None for that of the source.
        discarded: keys of the source that its layout drops.
    """

    folder: Path
    layout: str
    model: PreTrainedModel
    names: list[str]
    preprocessing: str | None
    discarded: list[str]


def convert_published(
    source: str | PathLike,
    folder: str | PathLike,
    encoder: str | None = None,
    progress: Callable[[str], Any] = lambda step: None,
) -> Conversion:
    """Turns a published file into a folder with the whole model, its image processor and a note on its origin.

    Args:
        source: the published file; or a folder in Transformers' format, of which the vision model is taken.
        folder: where it goes. It appears whole or not at all; one that an earlier conversion made is replaced.
        encoder: exact name in `ENCODERS` that the source must be.
        progress: called with the name of each step as it begins.

    Raises:
        ValueError: a source of another kind or another variant; keys and shapes that differ are named.
        OSError: the source is not there, or the folder cannot be written.
    """
    source, folder = Path(source), Path(folder)
    named = None if encoder is None else get_named_encoder(encoder)
    if named is not None and named.weights is None:
        raise ValueError(f"{encoder!r} has no published weights: this project trains it.")
    check_target(folder)
    progress("reading")
    if is_transformers_folder(source):
        layout, discarded = "transformers", []
        model = read_transformers(source)
        if named is not None:
            hold_to_named(named, model.config, str(source))
    else:
        published = read_published(source) if named is None else read_named(named, source)
        layout, discarded, model = published.layout, published.discarded, published.model()
    progress("comparing with the table")
    names = _same_architecture(layout, model.config)
    processor_name, processor = _image_processor(source, named, layout, names, model.config)
    origin = {"encoder": encoder, "layout": layout, "source": source.name}
    if source.is_file():
        progress("computing the checksum")
        origin["sha256"] = file_sha256(source)
    progress("writing")

    def save(new: Path) -> None:
        model.save_pretrained(new, max_shard_size=SHARD_SIZE)
        processor.save_pretrained(new)
        (new / ORIGIN_FILE).write_text(json.dumps(origin, indent=2) + "\n")

    write_whole(folder, save)
    return Conversion(folder, layout, model, names, processor_name, discarded)


def convert_encoder(name: str, source: str | PathLike, weights_dir: str | PathLike) -> Path:
    """Turns published weights into the folder `weights_dir/NAME` that `load_encoder(NAME, weights_dir=...)` reads.

    See `convert_published`; the source is held to the named encoder.
    """
    return convert_published(source, Path(weights_dir) / name, name).folder


def write_whole(folder: Path, save: Callable[[Path], None]) -> None:
    """Calls `save` with a new folder beside `folder`, gives it that name, and adds the model card.

    Raises:
        OSError: it cannot be written; what was in `folder` stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            save(new)
            if folder.exists():
                folder.rename(Path(scratch) / "old")
            new.rename(folder)
        leave_card(folder)
    except SafetensorError as error:  # how safetensors tells of a full disk
        raise OSError(f"{folder} cannot be written: {error}.") from error


def check_target(folder: Path) -> None:
    """Raises ValueError where a conversion would replace what no conversion made."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / ORIGIN_FILE).is_file():
        raise ValueError(f"The folder {str(folder)!r} holds files that no conversion made: give a new one.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file; the output must be a folder.")


def is_transformers_folder(source: Path) -> bool:
    """Whether it is in Transformers' format; timm's repositories have a config.json, too, but without `model_type`."""
    config = source / "config.json"
    try:
        return config.is_file() and "model_type" in json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(config)!r} is not JSON: {error}.") from error


def _same_architecture(layout: str, config: PreTrainedConfig) -> list[str]:
    names = []
    for name, encoder in ENCODERS.items():
        expected = encoder.config()
        try:
            if encoder.weights is None or encoder.weights.layout != layout:
                continue
            check_same_architecture(name, tapped_config(config, expected.out_features[-1]), expected)
        except ValueError:
            continue
        names.append(name)
    return names


def _image_processor(
    source: Path, named: NamedEncoder | None, layout: str, names: list[str], config: PreTrainedConfig
) -> tuple[str | None, LlavaStyleImageProcessor]:
    """That of the name; else of the source's own; else of the first encoder of this kind in the table."""
    if named is None and layout == "transformers":
        return None, encoder_image_processor(source, tapped_config(config))
    family = [name for name, encoder in ENCODERS.items() if encoder.weights and encoder.weights.layout == layout]
    name = named.name if named is not None else (names + family)[0]
    return name, encoder_image_processor(name, named.config() if named is not None else tapped_config(config))


__all__ = [
    "SHARD_SIZE",
    "Conversion",
    "check_target",
    "convert_encoder",
    "convert_published",
    "is_transformers_folder",
    "write_whole",
]
