"""Published weights become a folder in Transformers' format, whole or not at all."""

import json
import os
import shutil
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
from .checkpoint_report import check_finite, check_same_architecture, listed
from .encoder_loading import hold_to_named, read_named, read_transformers, saved_config
from .encoder_preprocessing import encoder_image_processor, picture_size
from .image_processing_llava_style import LlavaStyleImageProcessor
from .layouts import LAYOUTS
from .model_card import CARD_FILE, is_untouched, leave_card
from .published_weights import read_published
from .saved_folder import ORIGIN_FILE, SavedFolder

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
        assumed: whether that is a guess: no encoder of the table is this one, or several are, and they differ in it.
        discarded: keys of the source that its layout drops.
    """

    folder: Path
    layout: str
    model: PreTrainedModel
    names: list[str]
    preprocessing: str | None
    assumed: bool
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
        folder: where it goes. It appears whole or not at all; one that holds only what an earlier conversion made is
            replaced, but for a card that somebody changed.
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
    check_target(folder, source)
    progress("reading")
    origin: dict[str, Any] = {}
    if is_transformers_folder(source):
        layout, discarded = "transformers", []
        origin = _earlier_origin(source)
        _check_is_encoder(source)
        model = read_transformers(source)
        if named is not None:
            hold_to_named(named, model.config, str(source))
    else:
        published = read_published(source) if named is None else read_named(named, source)
        layout, discarded, model = published.layout, published.discarded, published.model()
    check_finite(str(source), model.state_dict())
    progress("comparing with the table")
    names = _same_architecture(origin.get("layout", layout), model.config)
    processor_name, processor = _image_processor(source, named, layout, names, model.config)
    assumed = named is None and processor_name is not None and not _agree(names)
    if not origin:
        origin = {"encoder": encoder, "layout": layout, "source": source.name}
        if assumed:
            origin["pixels_assumed_from"] = processor_name
    elif named is not None:
        origin = {key: value for key, value in origin.items() if key != "pixels_assumed_from"} | {"encoder": encoder}
    if source.is_file():
        progress("computing the checksum")
        origin["sha256"] = file_sha256(source)
    progress("writing")

    def save(new: Path) -> None:
        model.save_pretrained(new, max_shard_size=SHARD_SIZE)
        processor.save_pretrained(new)

    write_whole(folder, save, origin)
    return Conversion(folder, layout, model, names, processor_name, assumed, discarded)


def convert_encoder(name: str, source: str | PathLike, weights_dir: str | PathLike) -> Path:
    """Turns published weights into the folder `weights_dir/NAME` that `load_encoder(NAME, weights_dir=...)` reads.

    See `convert_published`; the source is held to the named encoder.
    """
    return convert_published(source, Path(weights_dir) / name, name).folder


def write_whole(folder: Path, save: Callable[[Path], None], origin: dict[str, Any]) -> None:
    """Calls `save` with a new folder beside `folder`, gives it that name, and adds origin and model card.

    Args:
        folder: where it goes. A card there that somebody changed stays.
        save: writes the model.
        origin: where the weights come from. What was written, with checksums of all but the weights, is noted with it.

    Raises:
        OSError: it cannot be written; what was in `folder` stays.
        ValueError: `folder` holds what no conversion made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            save(new)
            (new / CARD_FILE).unlink(missing_ok=True)
            files = {file.name: _checksum(file) for file in sorted(new.iterdir())}
            (new / ORIGIN_FILE).write_text(json.dumps(origin | {"files": files}, indent=2) + "\n", encoding="utf-8")
            check_target(folder)  # which may have changed since
            if folder.exists():
                card = folder / CARD_FILE
                if card.is_file() and not is_untouched(card.read_text(encoding="utf-8", errors="replace")):
                    shutil.copy2(card, new)
                folder.rename(Path(scratch) / "old")
            new.rename(folder)
        leave_card(folder)
    except SafetensorError as error:  # how safetensors tells of a full disk
        raise OSError(f"{folder} cannot be written: {error}.") from error


def check_target(folder: Path, source: Path | None = None) -> None:
    """Raises ValueError where a conversion would replace what no conversion made, or its own source."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file; the output must be a folder.")
    if source is not None:
        here, there = (Path(os.path.realpath(path)) for path in (source, folder))  # links may go round in circles
        if here.is_relative_to(there) or there.is_relative_to(here):
            raise ValueError(f"The output {str(folder)!r} and the source {str(source)!r} overlap: give a new folder.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    made = SavedFolder(folder).origin.get("files")
    made = made if isinstance(made, dict) else {}
    foreign = [
        file.name
        for file in folder.iterdir()
        if file.name not in (ORIGIN_FILE, CARD_FILE)
        and (file.name not in made or not file.is_file() or _checksum(file) != made[file.name])
    ]
    if (folder / CARD_FILE).exists() and not made:
        foreign.append(CARD_FILE)
    if foreign or not made:
        raise ValueError(
            f"The folder {str(folder)!r} holds files that no conversion made: give a new one, or take away "
            f"{listed(foreign or [ORIGIN_FILE])}."
        )


def _checksum(file: Path) -> str | None:
    """Of a file that somebody may edit; None for weights."""
    return None if file.suffix == ".safetensors" else file_sha256(file)


def _earlier_origin(source: Path) -> dict[str, Any]:
    """What an earlier conversion noted of the file that this encoder was made of, empty where none did."""
    origin = dict(SavedFolder(source).origin)
    origin.pop("files", None)
    return origin if origin.get("layout") in (*LAYOUTS, "transformers") else {}


def _check_is_encoder(source: Path) -> None:
    """Before weights are read."""
    config = saved_config(source)
    try:
        tapped_config(config)
    except ValueError as error:
        raise ValueError(f"{str(source)!r} holds no vision encoder that can be used: {error}") from error


def is_transformers_folder(source: Path) -> bool:
    """Whether it is in Transformers' format; timm's repositories have a config.json, too, but without `model_type`."""
    config = source / "config.json"
    try:
        fields = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else None
        return isinstance(fields, dict) and "model_type" in fields
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(config)!r} is not JSON: {error}.") from error


def _same_architecture(layout: str, config: PreTrainedConfig) -> list[str]:
    names, size = [], _shown_size(layout, config)
    for name, encoder in ENCODERS.items():
        expected = encoder.config()
        try:
            if encoder.weights is None or encoder.weights.layout != layout:
                continue
            if size not in (None, (encoder.preprocessing.height, encoder.preprocessing.width)):
                continue
            check_same_architecture(name, tapped_config(config, expected.out_features[-1]), expected)
        except ValueError:
            continue
        names.append(name)
    return names


def _shown_size(layout: str, config: PreTrainedConfig) -> tuple[int, int] | None:
    """Height and width of the pictures that a model is for, where a file in this layout shows them."""
    return picture_size(config) if layout in LAYOUTS and LAYOUTS[layout].shows_size else None


def _agree(names: list[str]) -> bool:
    """Whether there is one way in which these encoders of the table prepare pictures."""
    return len({ENCODERS[name].preprocessing for name in names}) == 1


def _image_processor(
    source: Path, named: NamedEncoder | None, layout: str, names: list[str], config: PreTrainedConfig
) -> tuple[str | None, LlavaStyleImageProcessor]:
    """That of the name; else of the source's own; else of the first encoder of this kind in the table, at its size."""
    if named is None and layout == "transformers":
        return None, encoder_image_processor(source, tapped_config(config))
    family = [name for name, encoder in ENCODERS.items() if encoder.weights and encoder.weights.layout == layout]
    if named is not None:
        return named.name, encoder_image_processor(named.name, named.config())
    name = (names + family)[0]
    return name, encoder_image_processor(name, tapped_config(config), _shown_size(layout, config))


__all__ = [
    "SHARD_SIZE",
    "Conversion",
    "check_target",
    "convert_encoder",
    "convert_published",
    "is_transformers_folder",
    "write_whole",
]
