"""How one kind of published checkpoint file becomes a Transformers model: what each `convert_*` module provides."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class CheckpointLayout:
    """One way in which published files name their tensors.

    The four functions and the list see the file's own keys, prefixes such as `backbone.` included; containers such as
    `model` and `state_dict` are already opened. They read keys and shapes; only `convert` moves tensors, and it makes
    views of them wherever it can, since a file may be as large as the memory.

    Args:
        recognises: tensors -> whether the file is of this layout. At most one layout recognises a file.
        infer: tensors -> class and config of the whole published model, read off keys and shapes, any depths and
            widths included: with its classifier (and `num_labels`) where the file has one, tapped at its last stage.
            Raises ValueError where the file is broken.
        convert: (tensors, config) -> tensors under the names of that class. Keys that it does not know it leaves as
            they are, so that loading names them.
        discards: regular expressions for the beginnings of the file's keys that are dropped even of the whole model
            (dense heads, buffers that the config determines). Everything else must be loaded.
        unseen: fields of the config that no tensor shows: taken from the named encoder where one is given; without one
            `infer` follows what most published models have.
        shows_size: whether the tensors show the size of the pictures, so that `infer` puts it into the config.
    """

    recognises: Callable[[Mapping[str, Tensor]], bool]
    infer: Callable[[Mapping[str, Tensor]], tuple[type[PreTrainedModel], PreTrainedConfig]]
    convert: Callable[[Mapping[str, Tensor], PreTrainedConfig], StateDict]
    discards: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    shows_size: bool = False


class BrokenFileError(ValueError):
    """What `infer` and `convert` raise of a file that is not whole: its text tells what is wrong."""


__all__ = ["BrokenFileError", "CheckpointLayout", "StateDict"]
