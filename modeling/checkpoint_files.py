"""Reads tensors out of published checkpoint files without running anything that they contain.

Tensors are mapped from the file wherever its format allows it: they take memory only as they are read, once.
"""

import hashlib
import json
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .array_pickle import read_array_pickle
from .checkpoint_layout import StateDict

_CONTAINERS = ("model", "state_dict")
FILES_OF_A_REPOSITORY = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Names of files of weights in a repository on the Hub, in the order in which Transformers looks for them."""


class _Bookkeeping:
    """Stands for any class a training framework pickled beside the tensors (its config, its log): made into a dict."""

    def __new__(cls, *args):
        return OrderedDict()


class _ArrayBookkeeping:
    """The same for pieces of numpy arrays, whose state is a tuple; it is dropped."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


def read_state_dict(path: str | PathLike, sha256: str | None = None) -> StateDict:
    """The tensors in a published file, or in the folder of a downloaded repository.

    `.safetensors`, numpy's `.npz`, detectron2's `.pkl` and PyTorch checkpoints of any suffix are read. A checkpoint is
    unpickled with `weights_only=True`: no code of it runs and nothing is imported. Classes that it names beside tensors
    are replaced by inert ones. Of a dict that holds more than tensors, "model" is taken, else "state_dict".

    Args:
        path: the file, or a folder that holds one file (or shards and their index) under one of the Hub's usual names.
        sha256: checksum that the file must have, in hexadecimal, or its beginning.

    Returns:
        Name -> tensor, on the CPU.

    Raises:
        OSError: the file is not there.
        ValueError: it is not the file that the checksum was made of, not a checkpoint, or holds no state dict.
    """
    path = _file_in(Path(path))
    if sha256 is not None:
        _check_sha256(path, sha256)
    if path.name.endswith(".index.json"):
        return {
            key: tensor for shard in shards_of(path) for key, tensor in read_state_dict(path.parent / shard).items()
        }
    contents = _READERS.get(path.suffix, read_checkpoint)(path)
    for container in _CONTAINERS:
        if isinstance(contents, dict) and isinstance(contents.get(container), dict):
            contents = contents[container]
            break
    if not isinstance(contents, dict) or not contents or not all(torch.is_tensor(v) for v in contents.values()):
        raise ValueError(
            f"{str(path)!r} holds no state dict: expected a dict of tensors, or one under 'model' or 'state_dict'."
        )
    return dict(contents)


def _file_in(path: Path) -> Path:
    if path.is_dir():
        found = [path / name for name in FILES_OF_A_REPOSITORY if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(
                f"The folder {str(path)!r} holds no checkpoint file: expected {', '.join(FILES_OF_A_REPOSITORY)}."
            )
        return found[0]
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint file {str(path)!r}.")
    return path


def shards_of(index: Path) -> list[str]:
    """Names of the files that an index of shards refers to, all of them in its own folder.

    Raises:
        ValueError: it is no index, or it names anything else.
    """
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(index)!r} is no index of shards: it has no weight_map.") from error
    for shard in shards:
        plain = isinstance(shard, str) and shard == Path(shard).name and "\\" not in shard
        if not plain or shard == ".." or shard.endswith(".json"):
            raise ValueError(
                f"{str(index)!r} names {shard!r}, which lies outside its own folder or is no file of weights."
            )
    return shards


def file_sha256(path: Path) -> str:
    """Checksum of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_sha256(path: Path, expected: str) -> None:
    actual = file_sha256(path)
    if not actual.startswith(expected.lower()):
        raise ValueError(
            f"{str(path)!r} is not the published file, or its download is damaged: its SHA-256 is {actual}, that of "
            f"the published file {'begins with' if len(expected) < 64 else 'is'} {expected}."
        )


def _read_safetensors(path: Path) -> StateDict:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is not a safetensors file: {error}.") from error


def _read_npz(path: Path) -> StateDict:
    """Arrays of numbers only: what numpy would have to unpickle is refused."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    except Exception as error:  # as damage has it
        raise ValueError(
            f"{str(path)!r} is not a file of numpy arrays that can be read safely: {_reason(error)}."
        ) from error


def _read_arrays(path: Path) -> StateDict:
    """A pickle of numpy arrays alone, as detectron2 publishes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing writes to it
        return {name: torch.from_numpy(array) for name, array in read_array_pickle(path).items()}


def read_checkpoint(path: Path) -> Any:
    """What a PyTorch checkpoint holds: tensors in containers; no code of it runs, see `read_state_dict`.

    Raises:
        ValueError: it is damaged or of another format.
    """
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # the format before torch 1.6, or no checkpoint at all: told below
        named = []
    inert: list[Any] = [(_ArrayBookkeeping if name.startswith("numpy.") else _Bookkeeping, name) for name in named]
    try:
        with torch.serialization.safe_globals(inert):
            # Only the zip format of torch 1.6 and later can be mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:  # torch's own words recommend to run the code in the file
        raise ValueError(
            f"{str(path)!r} is not a checkpoint that can be read safely: it is of another format, is damaged, or needs "
            "code of its own to run."
        ) from error
    except PermissionError:
        raise
    except Exception as error:  # bytes of any kind are taken for a pickle
        raise ValueError(f"{str(path)!r} is not a checkpoint that can be read safely: {_reason(error)}.") from error


def _reason(error: Exception) -> str:
    """The first line of what torch or numpy says of a file; other errors are only what its bytes happened to do."""
    if not isinstance(error, RuntimeError | ValueError | zipfile.BadZipFile) or not str(error).strip():
        return "it is of another format or damaged"
    return str(error).strip().splitlines()[0].rstrip(".")


_READERS: dict[str, Callable[[Path], Any]] = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".pkl": _read_arrays,
}

__all__ = ["FILES_OF_A_REPOSITORY", "file_sha256", "read_checkpoint", "read_state_dict", "shards_of"]
