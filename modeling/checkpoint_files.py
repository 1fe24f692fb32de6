"""Reads tensors out of published checkpoint files without running anything that they contain."""

import pickle
from collections import OrderedDict
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

_CONTAINERS = ("model", "state_dict")


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


def read_state_dict(path: str | PathLike) -> dict[str, torch.Tensor]:
    """The state dict in a `.safetensors` file or in a PyTorch checkpoint.

    A checkpoint is unpickled with `weights_only=True`: no code of it runs and nothing is imported. Classes that it
    names beside tensors are replaced by inert ones. Of a dict that holds more than tensors, "model" is taken, else
    "state_dict".

    Args:
        path: the file.

    Returns:
        Name -> tensor, on the CPU.

    Raises:
        OSError: the file is not there.
        ValueError: it is not a checkpoint, or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint file {str(path)!r}.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is not a safetensors file: {error}.") from error
    contents = _unpickle_tensors(path)
    for container in _CONTAINERS:
        if isinstance(contents, dict) and isinstance(contents.get(container), dict):
            contents = contents[container]
            break
    if not isinstance(contents, dict) or not contents or not all(torch.is_tensor(v) for v in contents.values()):
        raise ValueError(
            f"{str(path)!r} holds no state dict: expected a dict of tensors, or one under 'model' or 'state_dict'."
        )
    return dict(contents)


def _unpickle_tensors(path: Path):
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (ValueError, RuntimeError):  # the format before torch 1.6, or no checkpoint at all: told below
        named = []
    inert = [(_ArrayBookkeeping if name.startswith("numpy.") else _Bookkeeping, name) for name in named]
    try:
        with torch.serialization.safe_globals(inert):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{str(path)!r} is not a checkpoint that can be read safely: {reason}") from error


__all__ = ["read_state_dict"]
