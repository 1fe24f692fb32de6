"""Recipes: one training run as a flat YAML file, its command-line overrides, and the run directory it names."""

import argparse
import dataclasses
import difflib
import hashlib
import json
import os
import re
import shutil
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)

REQUIRED: Any = None
"""Default of a key that every recipe has to give a value; `require` tells which is missing."""

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
    "per_device_eval_batch_size",
    "dataloader_pin_memory",
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
    bf16: bool | None = field(  # type: ignore[assignment]  # None until `__post_init__`
        default=None, metadata={"help": "Train in bfloat16 autocast; by default wherever a CUDA device can."}
    )
    report_to: str | None = field(default="none", metadata={"help": "Where to log to, as in TrainingArguments."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collators need every column."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    logging_steps: float = field(default=50, metadata={"help": "Log every so many steps."})
    save_steps: float = field(default=200, metadata={"help": "Save a checkpoint to resume from every so many steps."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints to keep while training."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Not needed: a process without pictures gives the connector gradients, too."}
    )
    fill_batches: bool = field(
        default=False,
        metadata={"help": "Fill the last batch of each modality by repeating samples, as the paper's code does."},
    )

    def __post_init__(self):
        if not torch.accelerator.is_available():
            self.use_cpu = True  # else each process of torchrun would take itself for the only one
        if self.bf16 is None:
            self.bf16 = not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        if self.disable_tqdm is None:  # a log file gets one line of numbers every `logging_steps` instead
            self.disable_tqdm = not sys.stderr.isatty()
        if self.disable_tqdm:
            logging.disable_progress_bar()  # those of loading and saving
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
        super().__post_init__()


def parse_recipe(argv: Sequence[str] | None, *parts: Any, prog: str | None = None) -> tuple[Any, ...]:
    """Reads `[recipe.yaml] [--key value ...]` into one object of each dataclass in `parts`.

    The command line goes over the file, the file over the defaults. `prog` is the command that the help shows.

    Raises:
        ValueError: no such file, not a flat YAML mapping, a key that no part has (the nearest one is named), or a
            value of the wrong type; file and key are named.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    usage = "%(prog)s [recipe.yaml] [--key value ...]"
    parser = HfArgumentParser(parts, prog=prog, usage=usage, exit_on_error=False, allow_abbrev=False)
    actions = {action.dest: action for action in reversed(parser._actions)}  # `--key` stands before its `--no_key`
    mappings = {key for key, hint in _hints(parts).items() if _takes_mapping(hint)}
    for action in parser._actions:
        action.required = False  # a key that the file gives need not be on the command line too
        if typing.get_origin(action.type) is dict or action.type is dict:
            action.type = _mapping
    where, from_file = "the command line", []
    if argv and not argv[0].startswith("-"):
        where = argv.pop(0)
        for key, value in _read_yaml(Path(where), parts).items():
            if value is None:
                parser.set_defaults(**{key: None})
            else:
                from_file += _as_options(where, actions[key], key, value, key in mappings)
        _parse(where, parser.parse_known_args, from_file)
    *objects, rest = _parse(
        "The command line",
        partial(parser.parse_args_into_dataclasses, return_remaining_strings=True, look_for_args_file=False),
        from_file + _as_words(argv, actions),
        f"The recipe ({where})",
    )
    if rest:
        raise ValueError(f"The command line has {rest[0]!r}, which is no key of a recipe{_nearest(rest[0], parts)}.")
    return tuple(objects)


def _parse(where: str, parse: Callable[[list[str]], Any], options: list[str], whole: str = "The recipe") -> Any:
    """Parses options that come from `where`; a value that does not fit together with others is laid to the whole."""
    try:
        return parse(options)
    except argparse.ArgumentError as error:
        key = (error.argument_name or "").partition("/")[0].lstrip("-")
        raise ValueError(f"{where}: the key {key!r} has a bad value: {error.message}.") from None
    except ValueError as error:
        raise ValueError(f"{whole} cannot be used: {error}") from error


class _RecipeLoader(yaml.SafeLoader):
    """YAML in which 2e-5 is a number, as it is in YAML 1.2 and JSON, and not text."""


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _read_yaml(path: Path, parts: Sequence[type]) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such recipe file.")
    try:
        text = path.read_text(encoding="utf-8")
        node, values = yaml.compose(text, _RecipeLoader), yaml.load(text, _RecipeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if node is None or not isinstance(values, dict):
        raise ValueError(f"{path} must hold `key: value` lines.")
    known, seen = _hints(parts), set()
    for key in (key.value for key, _ in node.value):
        if key not in known:
            raise ValueError(f"{path} has the key {key!r}, which is no key of a recipe{_nearest(key, parts)}.")
        if key in seen:
            raise ValueError(f"{path} has the key {key!r} twice.")
        seen.add(key)
    return values


def _as_options(where: str, action: argparse.Action, key: str, value: Any, mapping: bool) -> list[str]:
    """A value of a file as the command line would have it, so that both are read and checked by the same rules."""
    if isinstance(value, list) and action.nargs == "+" and value:
        return [f"--{key}", *map(str, value)]
    if isinstance(value, dict) and mapping:
        return [f"--{key}={json.dumps(value)}"]
    if isinstance(value, list | dict):
        right = "a mapping" if mapping else "a list of at least one value" if action.nargs == "+" else "one value"
        raise ValueError(f"{where}: the key {key!r} has a bad value: {value!r}, where {right} would be right.")
    if isinstance(value, bool) and action.type is str:
        raise ValueError(
            f"{where}: the key {key!r} has a bad value: YAML reads yes, no, on, off as {value}; put text in quotes."
        )
    return [f"--{key}={value}"]


def _as_words(argv: list[str], actions: Mapping[str, argparse.Action]) -> list[str]:
    """`--key [4, 4]` as `--key 4 4`: a list may be written as in the file."""
    words: list[str] = []
    for index, word in enumerate(argv):
        key, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        option = key if equals else argv[index - 1] if index and not key else ""
        action = actions.get(option.removeprefix("--"))
        listed = yaml.safe_load(value) if _LIST.fullmatch(value) and action and action.nargs == "+" else None
        words += [word] if not listed else [*([key] if equals else []), *map(str, listed)]
    return words


_LIST = re.compile(r"\[[^\[\]{}:'\"]+\]")


def _mapping(text: str) -> dict[str, Any]:
    """`{key: value}` on the command line, in YAML or JSON."""
    value = yaml.load(text, _RecipeLoader)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no mapping, such as '{{key: value}}'")
    return value


def _hints(parts: Sequence[type]) -> dict[str, Any]:
    """Every key and its declared type."""
    return {
        f.name: hints[f.name]
        for part, hints in ((part, typing.get_type_hints(part)) for part in parts)
        for f in dataclasses.fields(part)
        if f.init
    }


def _takes_mapping(hint: Any) -> bool:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return any((typing.get_origin(option) or option) is dict for option in options)


def _nearest(key: str, parts: Sequence[type]) -> str:
    near = difflib.get_close_matches(key.lstrip("-").replace("-", "_"), _hints(parts), n=1)
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


_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "*processor_config.json",
    "chat_template*",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.safetensors",
)


def fingerprint(path: str | Path | None) -> str | None:
    """What a local file or folder holds, so that a run is named by its inputs' content, not by their place.

    Of a file and of a model folder (one with `config.json`: its weights, configs and tokenizer) every byte counts; of
    any other folder, which may hold a million pictures, the names and sizes of the files below it. None where there is
    nothing local.
    """
    if path is None or not Path(path).exists():
        return None
    root, digest = Path(path), hashlib.sha256()
    if root.is_file():
        _count_bytes(root, digest)
    elif (root / "config.json").is_file():
        for file in sorted({file for pattern in _MODEL_FILES for file in root.glob(pattern) if file.is_file()}):
            digest.update(file.name.encode())
            _count_bytes(file, digest)
    else:
        for folder, below, names in os.walk(root, followlinks=True):
            below.sort()
            for name in sorted(names):
                file = Path(folder, name)
                digest.update(f"{file.relative_to(root)} {file.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]


def _count_bytes(file: Path, digest: Any) -> None:
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)


@dataclass(frozen=True)
class RunDirectory:
    """The folder of one run, named by the hash of its resolved recipe and its inputs.

    Attributes:
        path: the folder; `begin` makes it.
        recipe: what `resolved` gave.
    """

    path: Path
    recipe: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(
        cls, recipe: dict[str, Any], inputs: Mapping[str, Callable[[], str | None]], args: RunArguments
    ) -> "RunDirectory":
        """Finds the directory and points `args.output_dir` at it; on several processes, the main one looks.

        Args:
            recipe: what `resolved` gives.
            inputs: by key of the recipe, what gives the fingerprint of that which it names; it takes the place of the
                key's value. Where it gives None, as for an id on the Hub, the value counts.
        """
        counted = {
            key: value
            for key, value in recipe.items()
            if key not in _NOT_IN_HASH and not key.startswith(_NOT_IN_HASH_PREFIXES)
        }
        if args.world_size > 1:  # it multiplies the batch
            counted["world_size"] = args.world_size

        def name() -> str:
            contents = {key: content() or counted.get(key) for key, content in inputs.items()}
            return hashlib.sha256(json.dumps(counted | contents, sort_keys=True).encode()).hexdigest()[:10]

        path = Path(args.output_dir) / f"{args.name}-{ask_main_process(name)}"
        args.output_dir = str(path)
        return cls(path, recipe)

    @contextmanager
    def begin(self) -> Iterator[None]:
        """Makes the folder and keeps every other command that runs the same recipe out of it. Main process only.

        Raises:
            ValueError: another command is at it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("w") as lock:
            if os.name == "posix":
                import fcntl

                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ValueError(f"{self.path} is being trained by another command: wait for it.") from None
            (self.path / RECIPE_FILE).write_text(yaml.safe_dump(self.recipe, sort_keys=True))
            yield

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
        """The newest checkpoint that was written to the end, which the Trainer does with `trainer_state.json`.

        Any that were not are deleted, lest the Trainer keep one of them in place of a good one. Main process only.
        """
        last = None
        for checkpoint in sorted(self.path.glob("checkpoint-[0-9]*"), key=lambda p: int(p.name.rpartition("-")[2])):
            try:
                json.loads((checkpoint / "trainer_state.json").read_text())
                last = str(checkpoint)
            except (OSError, ValueError):
                logger.warning(f"{checkpoint} was interrupted while it was written; going on without it.")
                shutil.rmtree(checkpoint)
        return last


def ask_main_process(question: Callable[[], Any]) -> Any:
    """What the main process answers, on every process: files change, and all have to go by one look at them."""
    answer = [question() if PartialState().is_main_process else None]
    return broadcast_object_list(answer)[0]


def run_script(main: Callable[[], Any]) -> None:
    """Runs the `main` of a script and says where its run is; what a user can put right is one line, no traceback."""
    try:
        result = main()
        if isinstance(result, RunDirectory) and PartialState().is_main_process:
            print(f"finished: {result.path}")
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
