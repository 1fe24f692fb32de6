"""First step of two: a published file becomes a whole Transformers checkpoint, all stages and the head included."""

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .checkpoint_files import read_state_dict
from .checkpoint_layout import StateDict
from .checkpoint_report import check_fit
from .layouts import LAYOUTS, recognise_layout


@dataclass(frozen=True)
class PublishedWeights:
    """A published file as tensors of a whole model.

    Args:
        layout: name in `LAYOUTS`.
        model_class: class of the whole model.
        config: its config.
        tensors: every tensor of that class under its name, views of the file's own wherever possible.
        discarded: keys of the file that its layout drops.
    """

    layout: str
    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    tensors: StateDict
    discarded: list[str]

    def model(self) -> PreTrainedModel:
        """The whole model around these very tensors, no copies; it can be saved, but buffers may be on "meta"."""
        model = on_meta(self.model_class, self.config)
        model.load_state_dict(self.tensors, assign=True)
        return model.eval()


def on_meta(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model without memory: names and shapes only."""
    with torch.device("meta"):
        return model_class(config)


def read_published(
    source: str | PathLike,
    layout: str | None = None,
    *,
    stock_config: PreTrainedConfig | None = None,
    named_config: PreTrainedConfig | None = None,
    sha256: str | None = None,
) -> PublishedWeights:
    """Reads a published file strictly: each of its keys is loaded or stands on its layout's list of discards.

    Args:
        source: the file, or a folder with one.
        layout: name in `LAYOUTS`; recognised where not given.
        stock_config: config of the whole model without its head, where the table knows it: it replaces what the layout
            reads off the shapes, and so also decides what no shape shows.
        named_config: config of the encoder that the file is said to hold: it decides the layout's `unseen` fields.
        sha256: checksum that the file must have.

    Raises:
        OSError: the file is not there.
        ValueError: it is damaged or of another kind; keys and shapes that do not fit are named.
    """
    where = str(source)
    tensors = read_state_dict(source, sha256)
    recognised = recognise_layout(tensors, where)
    if layout not in (None, recognised):
        raise ValueError(f"{where} is in the layout {recognised!r}, not in {layout!r}.")
    rules = LAYOUTS[recognised]
    try:
        model_class, config = rules.infer(tensors)
        if stock_config is not None and stock_config.model_type == config.model_type:
            config = _with_labels_of(config, stock_config)
        if named_config is not None and named_config.model_type == config.model_type:
            for field in rules.unseen:
                setattr(config, field, copy.deepcopy(getattr(named_config, field)))
        discarded = [key for key in tensors if _matches(rules.discards, key)]
        converted = rules.convert({key: tensors[key] for key in tensors if key not in set(discarded)}, config)
    except (ValueError, RuntimeError, IndexError, KeyError, ZeroDivisionError) as error:
        raise ValueError(f"{where} looks like {recognised!r} but cannot be read as that: {_sentence(error)}") from error
    check_fit(where, converted, on_meta(model_class, config).state_dict())
    return PublishedWeights(recognised, model_class, config, converted, discarded)


def _with_labels_of(inferred: PreTrainedConfig, stock_config: PreTrainedConfig) -> PreTrainedConfig:
    config = copy.deepcopy(stock_config)
    config.id2label, config.label2id = inferred.id2label, inferred.label2id
    return config


def _matches(patterns: Iterable[str], key: str) -> bool:
    return any(re.match(pattern, key) for pattern in patterns)


def _sentence(error: Exception) -> str:
    text = f"it lacks {error.args[0]}" if isinstance(error, KeyError) else str(error).strip().splitlines()[0]
    return text if text.endswith(".") else text + "."


__all__ = ["PublishedWeights", "on_meta", "read_published"]
