"""Recipes: one training run as a flat YAML file, its command-line overrides, and the run directory it names."""

import argparse
import dataclasses
import difflib
import hashlib
import json
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)

FINISHED_MARKER = "finished.json"
RECIPE_FILE = "recipe.yaml"

# Where a run is stored and what it prints do not change what it learns.
_NOT_IN_HASH = {
    "output_dir",
    "run_name",
    "disable_tqdm",
    "dataloader_num_workers",
    "dataloader_prefetch_factor",
    "dataloader_persistent_workers",
    "save_total_limit",
    "save_steps",
    "save_strategy",
    "report_to",
}
_NOT_IN_HASH_PREFIXES = ("logging_", "log_", "hub_", "push_to_hub", "eval_")


@dataclass
class RunArguments(TrainingArguments):
    """Hugging Face's TrainingArguments, all of them, with the defaults of this library.

    `output_dir` is the folder that run directories are made in.
    """

    output_dir: str = field(default="runs", metadata={"help": "Folder in which the run directory is made."})
    name: str = field(default="run", metadata={"help": "First part of the run directory's name."})
    seed: int = field(default=7, metadata={"help": "Seed of everything that is random in the run."})
    bf16: bool | None = field(
        default=None, metadata={"help": "Train in bfloat16 autocast; by default wherever a CUDA device can."}
    )
    report_to: str | None = field(default="none", metadata={"help": "Where to log to, as in TrainingArguments."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collators need every column."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    logging_steps: float = field(default=50, metadata={"help": "Log every so many steps."})
    save_steps: float = field(default=200, metadata={"help": "Save a checkpoint to resume from every so many steps."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints to keep while training."})
    fill_batches: bool = field(
        default=False,
        metadata={"help": "Fill the last batch of each modality by repeating samples, as the paper's code does."},
    )

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        super().__post_init__()


def parse_recipe(argv: Sequence[str] | None, *parts: type) -> tuple[Any, ...]:
    """Reads `[recipe.yaml] [--key value ...]` into one object of each dataclass in `parts`.

    The command line goes over the file, the file over the defaults.

    Raises:
        ValueError: no such file, not a flat YAML mapping, a key that no part has (the nearest one is named), or a
            value of the wrong type.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(parts, exit_on_error=False)
    if argv and not argv[0].startswith("-"):
        parser.set_defaults(**_read_yaml(Path(argv.pop(0)), parts))
    for action in parser._actions:
        action.required = False  # a key that the file gives need not be on the command line too
        if typing.get_origin(action.type) is dict or action.type is dict:
            action.type = _mapping
    try:
        *objects, rest = parser.parse_args_into_dataclasses(args=argv, return_remaining_strings=True)
    except argparse.ArgumentError as error:
        raise ValueError(f"The recipe cannot be read: {error}.") from None
    if rest:
        raise ValueError(f"The command line has {rest[0]!r}, which is no key of a recipe{_nearest(rest[0], parts)}.")
    return tuple(objects)


def _read_yaml(path: Path, parts: Sequence[type]) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such recipe file.")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `key: value` lines.")
    for key in values:
        if key not in _keys(parts):
            raise ValueError(f"{path} has the key {key!r}, which is no key of a recipe{_nearest(key, parts)}.")
    # argparse reads strings as it reads the command line, so 2e-5, which YAML takes for a string, becomes a number
    return values


def _mapping(text: str) -> dict[str, Any]:
    """`{key: value}` on the command line, in YAML or JSON."""
    value = yaml.safe_load(text)
    if not isinstance(value, dict):
        raise ValueError(f"{text!r} is no mapping")
    return value


def _keys(parts: Sequence[type]) -> list[str]:
    return [f.name for part in parts for f in dataclasses.fields(part) if f.init]


def _nearest(key: str, parts: Sequence[type]) -> str:
    near = difflib.get_close_matches(key.lstrip("-"), _keys(parts), n=1)
    return f"; did you mean {near[0]!r}" if near else ""


def require(arguments: Any, *keys: str) -> None:
    """Raises ValueError naming the first key that was left out, with what it means."""
    for key in keys:
        if getattr(arguments, key) is None:
            meaning = type(arguments).__dataclass_fields__[key].metadata.get("help", "")
            raise ValueError(f"The recipe lacks the key {key!r}: {meaning}")


def resolved(*objects: Any) -> dict[str, Any]:
    """Every key of the model and data parts, and those of the training arguments that differ from their defaults."""
    values: dict[str, Any] = {}
    for part in objects:
        given = {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.init}
        if isinstance(part, TrainingArguments):
            plain = type(part)(output_dir=part.output_dir)
            given = {key: value for key, value in given.items() if value != getattr(plain, key)}
        values |= given
    return json.loads(json.dumps(values, default=str))


def fingerprint(path: str | None) -> str | None:
    """What a local file or model folder holds, so that a run is named by its inputs' content, not by their place.

    A file is hashed whole; of a folder, `config.json` and the safetensors files. None where there is nothing local.
    """
    if path is None or not Path(path).exists():
        return None
    files = [Path(path)]
    if files[0].is_dir():
        files = [file for pattern in ("config.json", "*.safetensors") for file in sorted(files[0].glob(pattern))]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class RunDirectory:
    """The folder of one run, named by the hash of its resolved recipe and its inputs."""

    path: Path

    @classmethod
    def of(cls, recipe: dict[str, Any], inputs: Sequence[str | None], args: RunArguments) -> "RunDirectory":
        """Finds the directory and points `args.output_dir` at it.

        Args:
            recipe: what `resolved` gives.
            inputs: local files and folders that the recipe names; each counts with its content.
        """
        counted = {
            key: value
            for key, value in recipe.items()
            if key not in _NOT_IN_HASH and not key.startswith(_NOT_IN_HASH_PREFIXES)
        }
        contents = {name: fingerprint(name) for name in inputs if name is not None}
        for key, value in counted.items():  # the place of an input does not count where its content does
            if isinstance(value, str) and contents.get(value):
                counted[key] = contents[value]
        text = json.dumps([counted, sorted(filter(None, contents.values()))], sort_keys=True)
        path = Path(args.output_dir) / f"{args.name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
        path.mkdir(parents=True, exist_ok=True)
        (path / RECIPE_FILE).write_text(yaml.safe_dump(recipe, sort_keys=True))
        args.output_dir = str(path)
        return cls(path)

    @property
    def is_finished(self) -> bool:
        return (self.path / FINISHED_MARKER).is_file()

    def finish(self, summary: dict[str, Any]) -> None:
        """Marks the run as complete; written last, so that a run without it is an interrupted one."""
        partial = self.path / f"{FINISHED_MARKER}.partial"
        partial.write_text(json.dumps(summary, indent=1))
        partial.rename(self.path / FINISHED_MARKER)

    @property
    def summary(self) -> dict[str, Any]:
        """What `finish` was given."""
        return json.loads((self.path / FINISHED_MARKER).read_text())

    def last_checkpoint(self) -> str | None:
        """The newest checkpoint that was written to the end; the Trainer writes `trainer_state.json` last."""
        found = sorted(self.path.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)
        for checkpoint in found:
            if (checkpoint / "trainer_state.json").is_file():
                return str(checkpoint)
            logger.warning(f"{checkpoint} was interrupted while it was written; going on from the one before.")
        return None
