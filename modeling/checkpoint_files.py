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
from torch import Tensor

from .array_pickle import read_array_pickle
from .checkpoint_layout import StateDict
from .checkpoint_report import listed

_CONTAINERS = ("model", "state_dict")
FILES_OF_A_REPOSITORY = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Names of files of weights in a repository on the Hub, in the order in which Transformers looks for them."""


_MOST_COMPRESSION = 100
"""An archive that grows to more than so many times its own size holds no weights: these hardly compress."""


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
        return _read_shards(path)
    contents = _READERS.get(path.suffix, read_checkpoint)(path)
    for container in _CONTAINERS:
        if isinstance(contents, dict) and isinstance(contents.get(container), dict):
            contents = contents[container]
            break
    if not isinstance(contents, dict) or not contents or not all(torch.is_tensor(v) for v in contents.values()):
        raise ValueError(
            f"{str(path)!r} holds no state dict: expected a dict of tensors, or one under 'model' or 'state_dict'."
        )
    _check_tensors(path, contents)
    return dict(contents)


def _check_tensors(path: Path, tensors: dict[Any, Tensor]) -> None:
    """Raises ValueError for names that are no text, and for tensors that are not arrays of numbers held by the file."""
    for name, tensor in tensors.items():
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not isinstance(name, str):
            reason = f"a tensor whose name is {name!r} and no text"
        elif not plain or type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_nested:
            reason = f"{listed([name])}, which is sparse, quantised or without values: only plain tensors are read"
        elif tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            reason = (
                f"{listed([name])}, of shape {tuple(tensor.shape)}, but fewer numbers: expanded tensors are not read"
            )
        else:
            continue
        raise ValueError(f"{str(path)!r} holds {reason}.")


def _read_shards(index: Path) -> StateDict:
    tensors: StateDict = {}
    named = _weight_map(index)
    for shard in shards_of(index):
        there = read_state_dict(index.parent / shard)
        expected = {key for key, file in named.items() if file == shard}
        if there.keys() != expected:
            raise ValueError(
                f"{str(index)!r} does not describe {shard}: only one of the two has {listed(there.keys() ^ expected)}."
            )
        tensors |= there
    return tensors


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
    shards = list(dict.fromkeys(_weight_map(index).values()))
    for shard in shards:
        plain = isinstance(shard, str) and shard == Path(shard).name and "\\" not in shard
        if not plain or shard == ".." or shard.endswith(".json"):
            raise ValueError(
                f"{str(index)!r} names {shard!r}, which lies outside its own folder or is no file of weights."
            )
    return sorted(shards)


def _weight_map(index: Path) -> dict[str, Any]:
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return dict(named.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{str(index)!r} is no index of shards: it has no weight_map.") from error


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
        _check_archive(path)
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
    is_archive = zipfile.is_zipfile(path)  # the format of torch 1.6 and later, which alone can be mapped
    inert: list[Any] = [(_ArrayBookkeeping if name.startswith("numpy.") else _Bookkeeping, name) for name in named]
    try:
        size = _check_archive(path) if is_archive else None
        with torch.serialization.safe_globals(inert):
            contents = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
        if size is not None and _bytes_claimed(contents) > size:  # mapped, it would be read on behind its end
            raise ValueError("its tensors claim more numbers than it holds")
        return contents
    except pickle.UnpicklingError as error:  # torch's own words recommend to run the code in the file
        raise ValueError(
            f"{str(path)!r} is not a checkpoint that can be read safely: it is of another format, is damaged, or needs "
            "code of its own to run."
        ) from error
    except PermissionError:
        raise
    except Exception as error:  # bytes of any kind are taken for a pickle
        raise ValueError(f"{str(path)!r} is not a checkpoint that can be read safely: {_reason(error)}.") from error


def _check_archive(path: Path) -> int:
    """Bytes of data that a zip file of weights says that it holds.

    Raises:
        ValueError: a name is there twice, so that readers may differ in what they read, or most of it is compression.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    names = [member.filename for member in members]
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    if twice:
        raise ValueError(f"it holds {listed(twice)} twice")
    if sum(member.file_size for member in members) > _MOST_COMPRESSION * path.stat().st_size:
        raise ValueError(f"it would grow to more than {_MOST_COMPRESSION} times its size")
    return sum(member.file_size for member in members if "/data/" in member.filename)


def _bytes_claimed(contents: Any) -> int:
    """Of all storages of the tensors in nested containers, each counted once."""
    storages, seen, waiting = {}, set(), [contents]
    while waiting:
        item = waiting.pop()
        if torch.is_tensor(item) and item.layout == torch.strided and item.device.type == "cpu":
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            waiting += item.values() if isinstance(item, dict) else item
    return sum(storages.values())


def _reason(error: Exception) -> str:
    """The first sentence of what torch or numpy says of a file; others are only what its bytes happened to do."""
    words = str(error).strip()
    if not isinstance(error, RuntimeError | ValueError | zipfile.BadZipFile) or not words or " at 0x" in words:
        return "it is of another format or damaged"
    if "can't allocate memory" in words:
        return "it claims more numbers than the memory holds"
    return words.splitlines()[0].partition(". ")[0].rstrip(".")


_READERS: dict[str, Callable[[Path], Any]] = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".pkl": _read_arrays,
}

__all__ = ["FILES_OF_A_REPOSITORY", "file_sha256", "read_checkpoint", "read_state_dict", "shards_of"]
