"""First step of two: a published file becomes a whole Transformers checkpoint, all stages and the head included."""

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration.encoder_entry import NamedEncoder
from .checkpoint_files import read_state_dict
from .checkpoint_layout import BrokenFileError, StateDict
from .checkpoint_report import check_fit
from .layouts import LAYOUTS, recognise_layout, without_wrapper


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


def read_published(source: str | PathLike, encoder: NamedEncoder | None = None) -> PublishedWeights:
    """Reads a published file strictly: each of its keys is loaded or stands on its layout's list of discards.

    Args:
        source: the file, or a folder with one.
        encoder: what the file is said to hold: gives the layout, the checksum, and what no shape shows.

    Raises:
        OSError: the file is not there.
        ValueError: it is damaged or of another kind; keys and shapes that do not fit are named.
    """
    where = str(source)
    named = encoder.weights if encoder is not None else None
    tensors = read_state_dict(source, named.sha256 if named is not None else None)
    tensors = without_wrapper(tensors)
    layout = recognise_layout(tensors, where)
    if encoder is not None and named is not None and named.layout != layout:
        raise ValueError(f"{where} is in the layout {layout!r}, but {encoder.name!r} comes in {named.layout!r}.")
    rules = LAYOUTS[layout]
    try:
        model_class, config = rules.infer(tensors)
        if encoder is not None:
            config = _as_named(config, encoder.config(), rules.unseen)
        discarded = {key for key in tensors if _matches(rules.discards, key)}
        kept = {key: tensor for key, tensor in tensors.items() if key not in discarded}
        converted = rules.convert(kept, config)
        expected = on_meta(model_class, config).state_dict()
    except ImportError as error:  # timm is not installed everywhere
        raise OSError(f"{where} is in the layout {layout!r}. {' '.join(str(error).split())}") from error
    except Exception as error:  # shapes of any kind meet arithmetic and configs that take them for granted
        raise ValueError(f"{where} looks like {layout!r} but cannot be read as that: {_sentence(error)}") from error
    check_fit(where, converted, expected)
    return PublishedWeights(layout, model_class, config, converted, sorted(discarded))


def _as_named(inferred: PreTrainedConfig, named: PreTrainedConfig, unseen: Iterable[str]) -> PreTrainedConfig:
    """What no shape shows as the named encoder has it: of a plain transformer its whole config, but for the labels."""
    if named.model_type == "hidden_state_backbone" and named.vision_config.model_type == inferred.model_type:
        config = copy.deepcopy(named.vision_config)
        config.id2label, config.label2id = inferred.id2label, inferred.label2id
        return config
    if named.model_type == inferred.model_type:
        for field in unseen:
            setattr(inferred, field, copy.deepcopy(getattr(named, field)))
    return inferred


def _matches(patterns: Iterable[str], key: str) -> bool:
    return any(re.match(pattern, key) for pattern in patterns)


def _sentence(error: Exception) -> str:
    if isinstance(error, BrokenFileError):
        return str(error)
    if isinstance(error, KeyError) and error.args and isinstance(error.args[0], str):
        return f"it lacks {error.args[0]}."
    return "it lacks tensors that tell its sizes, or has them in shapes that do not go together."


__all__ = ["PublishedWeights", "on_meta", "read_published"]
