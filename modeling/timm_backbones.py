"""The weights of whole timm models, cut after a tap. Everything here needs timm."""

import sys
from collections.abc import Mapping
from os import PathLike

import torch
from torch import Tensor, nn

from ..configuration.configuration_tapped_timm import TappedTimmConfig
from ..configuration.timm_stages import create_timm_model
from .checkpoint_files import read_state_dict
from .checkpoint_report import check_fit
from .modeling_tapped_timm import TappedTimmBackbone

_WRAPPER = "timm_model."
"""Prefix of our keys, and of those of Transformers' `TimmWrapperForImageClassification`; timm's files have none."""

_EXTRACTORS = ("model", "body", "graph_module")
"""Names under which timm's feature extractors hold a model that they do not rewrite."""


def load_timm_encoder(source: str | PathLike, config: TappedTimmConfig) -> TappedTimmBackbone:
    """Reads the weights of a whole timm model into a Backbone that has nothing after its tap.

    Args:
        source: a file or folder as timm publishes it, or a folder of Transformers' wrapper.
        config: the architecture and the tap.

    Returns:
        The Backbone in eval mode.

    Raises:
        ImportError: timm is not installed.
        ValueError: keys or shapes that the whole model does not have, or lacks; each is named.
    """
    where = str(source)
    tensors = {key.removeprefix(_WRAPPER): tensor for key, tensor in read_state_dict(source).items()}
    whole = create_timm_model(config.backbone, **config.model_args, num_classes=_num_labels(config, tensors))
    # An older file may have names or shapes that its model's own module knows how to bring up to date.
    update = getattr(sys.modules[type(whole).__module__], "checkpoint_filter_fn", None)
    if update is not None and set(tensors) != set(whole.state_dict()):
        tensors = update(tensors, whole)
    check_fit(where, tensors, whole.state_dict())
    with torch.device("meta"):
        cut = TappedTimmBackbone(config)
    kept = {key: tensors[theirs] for key, theirs in names_in_whole(cut, whole).items()}
    return TappedTimmBackbone.from_pretrained(None, config=config, state_dict=kept, dtype=torch.float32).eval()


def _num_labels(config: TappedTimmConfig, tensors: Mapping[str, Tensor]) -> int:
    """Classes of the head in a file, 0 where it has none."""
    names = create_timm_model(config.backbone, **config.model_args).pretrained_cfg.get("classifier")
    name = f"{names[0] if isinstance(names, list | tuple) else names}.weight"
    return len(tensors[name]) if name in tensors else 0


def names_in_whole(cut: TappedTimmBackbone, whole: nn.Module | None = None) -> dict[str, str]:
    """Key of a tapped model -> key of the same tensor in the whole timm model.

    timm's feature extractors hold the same modules under other names: inside `model` or `body`, or with the first
    level of a sequence joined to its parent, `stages_0` for `stages.0`.

    Raises:
        ValueError: a tensor that the whole model does not have under any of these names, or in that shape.
    """
    if whole is None:
        whole = create_timm_model(cut.config.backbone, **cut.config.model_args)
    theirs, found = whole.state_dict(), {}
    for key, tensor in cut.state_dict().items():
        name = key.removeprefix(_WRAPPER)
        first, dot, rest = name.partition(".")
        words = first.split("_")
        splits = [f"{'_'.join(words[:n])}.{'_'.join(words[n:])}{dot}{rest}" for n in range(1, len(words))]
        candidates = (rest,) if first in _EXTRACTORS else (name, *splits)
        match = next((k for k in candidates if k in theirs and theirs[k].shape == tensor.shape), None)
        if match is None:
            raise ValueError(f"timm's {cut.config.backbone} has no tensor for {key} {tuple(tensor.shape)}.")
        found[key] = match
    if len(set(found.values())) != len(found):
        raise ValueError(f"The tensors of timm's {cut.config.backbone} cannot be told apart by their names.")
    return found


__all__ = ["load_timm_encoder", "names_in_whole"]
