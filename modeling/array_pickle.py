"""Reads the numpy arrays out of a pickle without running anything that it contains: detectron2's model zoo files.

`pickle` builds objects by calling whatever the file names. Here the names that numpy arrays are pickled under stand for
small functions of this module, which read bytes, and every other name is refused; numpy's own unpickling code, which
trusts its input, is never called.
"""

import codecs
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np

_NUMBERS = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"}


class _NumberType:
    """A numpy dtype as a pickle describes it: a code such as "f4", then a state that holds the byte order."""

    __slots__ = ("dtype",)

    def __init__(self, code: str, *_copy_flags: bool):
        if code not in _NUMBERS:
            kind = "Python objects" if code.startswith("O") else f"elements of type {code!r}"
            raise pickle.UnpicklingError(f"it holds an array of {kind}; only arrays of numbers are read")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        order = state[1]
        if order not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError(f"it holds an array of byte order {order!r}")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """An array as a pickle describes it: made empty, then given shape, type and bytes."""

    __slots__ = ("values",)

    def __setstate__(self, state: tuple) -> None:
        _version, shape, number_type, is_fortran, data = state
        self.fill(data, number_type, shape, "F" if is_fortran else "C")

    def fill(self, data: Any, number_type: Any, shape: tuple, order: Literal["C", "F"]) -> "_Array":
        if not isinstance(number_type, _NumberType):
            raise pickle.UnpicklingError("it holds an array whose type is not a numpy dtype")
        if isinstance(data, str):  # how Python 2 wrote bytes
            data = data.encode("latin1")
        if not isinstance(data, bytes | bytearray):
            raise pickle.UnpicklingError(f"it holds an array made of a {type(data).__name__}; only bytes are read")
        dtype, sizes = number_type.dtype, [int(size) for size in shape]
        if min(sizes, default=0) < 0 or math.prod(sizes) * dtype.itemsize != len(data):
            raise pickle.UnpicklingError(f"it holds an array of shape {tuple(shape)} in {len(data)} bytes")
        values = np.frombuffer(data, dtype).reshape(sizes, order=order)
        self.values = values.astype(dtype.newbyteorder("="), copy=False)
        return self


def _empty_array(*_what_numpy_would_build: Any) -> _Array:
    return _Array()


def _array_from_buffer(
    data: Any, number_type: Any, shape: tuple, order: Literal["C", "F"], *_axis_order: Any
) -> _Array:
    if order not in ("C", "F"):
        raise pickle.UnpicklingError(f"it holds an array of memory order {order!r}")
    return _Array().fill(data, number_type, shape, order)


def _number(number_type: Any, data: Any) -> Any:
    return _Array().fill(data, number_type, (), "C").values[()]


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How Python 3 writes bytes in protocol 2."""
    if codecs.lookup(encoding).name != "iso8859-1":
        raise pickle.UnpicklingError(f"it holds text in the encoding {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """How Python 3 writes empty bytes in protocol 2: as a call of `bytes` without arguments."""
    return b""


class _Admitted:
    """A function that a pickle may call, and may not change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it sets the state of a function")


_ADMITTED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _Admitted(_encode),
    ("__builtin__", "bytes"): _Admitted(_no_bytes),
    ("numpy", "ndarray"): None,  # only ever an argument of `_reconstruct`
    ("numpy", "dtype"): _Admitted(_NumberType),
}
for _core in ("numpy.core", "numpy._core"):
    _ADMITTED[_core + ".multiarray", "_reconstruct"] = _Admitted(_empty_array)
    _ADMITTED[_core + ".multiarray", "scalar"] = _Admitted(_number)
    _ADMITTED[_core + ".numeric", "_frombuffer"] = _Admitted(_array_from_buffer)


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}; only arrays and plain containers are read")
        return _ADMITTED[module, name]


def read_array_pickle(path: str | PathLike) -> dict[str, np.ndarray]:
    """The arrays of a detectron2 model zoo file: `{"model": {name: array}, "__author__": ..., ...}`, or a bare dict.

    Args:
        path: the file, of any pickle protocol, written by Python 2 or 3 and any numpy.

    Returns:
        Name -> array. An array shares the memory of the bytes that were read, and may not be writable.

    Raises:
        OSError: the file is not there.
        ValueError: it is no pickle, names anything but arrays and plain containers, or holds no dict of arrays; the
            message says what. Nothing that the file names is imported or called.
    """
    try:
        with Path(path).open("rb") as file:
            contents = _ArrayUnpickler(file, encoding="latin1").load()
    except OSError:
        raise
    except Exception as error:  # a broken pickle can fail in any way
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ValueError(f"{str(path)!r} is not a file of arrays that can be read safely: {reason}.") from error
    if isinstance(contents, dict) and isinstance(contents.get("model"), dict):
        contents = contents["model"]
    if not isinstance(contents, dict) or not contents:
        raise ValueError(f"{str(path)!r} holds no arrays: expected a dict of them, or one under 'model'.")
    arrays = {}
    for name, value in contents.items():
        values = value.values if isinstance(value, _Array) and hasattr(value, "values") else value
        if not isinstance(name, str) or not isinstance(values, np.ndarray | np.generic):
            raise ValueError(f"{str(path)!r} holds {name!r}, which is a {type(value).__name__} and not an array.")
        arrays[name] = np.asarray(values)
    return arrays


__all__ = ["read_array_pickle"]
