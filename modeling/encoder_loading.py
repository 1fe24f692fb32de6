"""From a name in the table to a loaded encoder, and from a published file to weights that load by name."""

import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from transformers import AutoBackbone, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.image_utils import PILImageResampling

from ..configuration.named_encoders import ENCODERS, NamedEncoder, get_named_encoder
from .checkpoint_files import read_state_dict
from .convert_swin import convert_swin
from .convert_timm_vit import convert_timm_vit
from .convert_vmamba import convert_vmamba_state_dict
from .image_processing_llava_style import LlavaStyleImageProcessor
from .token_grid import encoder_downsampling

StateDict = dict[str, torch.Tensor]


def _inside_the_adapter(state_dict: StateDict) -> StateDict:
    return {f"vision_model.{key}": tensor for key, tensor in state_dict.items()}


LAYOUTS: dict[str, Callable[[StateDict], StateDict]] = {
    "timm_vit": convert_timm_vit,
    "swin": convert_swin,
    "vmamba": convert_vmamba_state_dict,
    "stock": _inside_the_adapter,
    "stock_backbone": dict,
}
"""Name in `WeightSource.layout` -> function that renames the keys of a file to ours."""

_READ_BY_STOCK_CLASS = {"stock", "stock_backbone"}
"""Layouts of Transformers itself: the stock class reads these files, since it knows their older names."""

_NOT_ARCHITECTURE = {"_name_or_path", "architectures", "dtype", "id2label", "label2id", "problem_type", "return_dict"}
_NOT_ARCHITECTURE |= {"transformers_version", "output_attentions", "output_hidden_states", "drop_path_rate"}


def load_encoder(
    name_or_dir: str | PathLike, *, weights_dir: str | PathLike | None = None, pretrained: bool = True
) -> PreTrainedModel:
    """Builds an encoder from its name in the table, or loads one that was saved.

    Weights of a name come from the folder `weights_dir/NAME` where `weights_dir` is given, else from the Hub where the
    table knows a repository.

    Args:
        name_or_dir: exact name in `ENCODERS`, or a folder written by `save_pretrained` of a Backbone.
        weights_dir: folder that holds one folder per encoder, as `convert_encoder` writes them.
        pretrained: False gives random weights.

    Returns:
        A Backbone in eval mode; `feature_maps[-1]` is [B, C, H, W] at its tap.

    Raises:
        ValueError: no such name or folder, or weights of another architecture.
        OSError: the weights are not to be had; the message says how to get them.
    """
    name = str(name_or_dir)
    if name not in ENCODERS:
        if (Path(name_or_dir) / "config.json").is_file():
            return _load_saved(Path(name_or_dir))
        if Path(name_or_dir).is_dir():
            raise ValueError(f"The folder {name!r} holds no config.json, so no saved encoder.")
        get_named_encoder(name)  # raises, naming the nearest
    encoder = ENCODERS[name]
    if not pretrained:
        return AutoBackbone.from_config(encoder.config()).eval()
    if weights_dir is not None:
        return _load_saved(_weights_folder(encoder, Path(weights_dir)), expected=encoder.config())
    if encoder.weights is None or encoder.weights.hub_id is None:
        raise OSError(f"No repository on the Hub holds {name!r} as safetensors. {_how_to_get(encoder)}")
    try:
        return _load_published(encoder, encoder.weights.hub_id)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(f"Cannot get {name!r} from the Hub ({reason}). {_how_to_get(encoder)}") from error


def convert_encoder(name: str, source: str | PathLike, weights_dir: str | PathLike) -> Path:
    """Turns published weights into the folder `weights_dir/NAME` that `load_encoder(NAME, weights_dir=...)` reads.

    The folder also gets the image processor that the weights were made with. It appears whole or not at all.

    Args:
        name: exact name in `ENCODERS`.
        source: the published file (`.pth`, `.safetensors`) or a download of its Hub repository.
        weights_dir: where the folder goes; an existing folder of that name is replaced.

    Returns:
        The folder.

    Raises:
        ValueError: a key of the file that is neither loaded nor declared to be discarded, a parameter that the file
            lacks, a shape that differs: each is named.
    """
    encoder = get_named_encoder(name)
    if encoder.weights is None:
        raise ValueError(f"{name!r} has no published weights: this project trains it.")
    backbone = _load_published(encoder, source)
    weights_dir = Path(weights_dir)
    weights_dir.mkdir(parents=True, exist_ok=True)
    target = weights_dir / name
    with tempfile.TemporaryDirectory(dir=weights_dir, prefix=f".{name}.") as scratch:
        backbone.save_pretrained(Path(scratch) / name)
        LlavaStyleImageProcessor(**image_processor_arguments(name)).save_pretrained(Path(scratch) / name)
        if target.exists():
            shutil.rmtree(target)
        (Path(scratch) / name).rename(target)
    return target


def image_processor_arguments(name: str) -> dict[str, Any]:
    """Arguments of `LlavaStyleImageProcessor` for a named encoder: its preprocessing and its token arithmetic."""
    encoder = get_named_encoder(name)
    preprocessing = encoder.preprocessing
    return {
        "geometry": preprocessing.geometry,
        "size": {"height": preprocessing.height, "width": preprocessing.width},
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
        "resample": PILImageResampling[preprocessing.interpolation.upper()],
        "downsampling": encoder_downsampling(encoder.config()),
    }


def _how_to_get(encoder: NamedEncoder) -> str:
    if encoder.weights is None:
        return (
            "This project trains it: give weights_dir=FOLDER with a saved encoder in FOLDER/"
            f"{encoder.name}, or pretrained=False (in a recipe: vision_weights_dir, vision_pretrained)."
        )
    download = f"Download {encoder.weights.url or 'https://huggingface.co/' + encoder.weights.hub_id}"
    return (
        f"{download}, run convert_encoder({encoder.name!r}, DOWNLOAD, FOLDER) and give weights_dir=FOLDER, "
        "or pretrained=False for random weights (in a recipe: vision_weights_dir, vision_pretrained)."
    )


def _weights_folder(encoder: NamedEncoder, weights_dir: Path) -> Path:
    folder = weights_dir / encoder.name
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"There is no saved encoder in {str(folder)!r}. {_how_to_get(encoder)}")
    return folder


def _load_saved(folder: Path, expected: PreTrainedConfig | None = None) -> PreTrainedModel:
    """A Backbone written by `save_pretrained`, every key checked, of the `expected` architecture where one is given."""
    config = AutoConfig.from_pretrained(folder)
    if type(config) not in AutoBackbone._model_mapping:
        raise ValueError(f"The folder {str(folder)!r} holds a {config.model_type!r} model, which is not a Backbone.")
    if expected is not None:
        _check_same_architecture(str(folder), config, expected)
    backbone_class = AutoBackbone._model_mapping[type(config)]
    backbone, info = backbone_class.from_pretrained(folder, output_loading_info=True)
    _report(str(folder), info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    return backbone.eval()


def _load_published(encoder: NamedEncoder, source: str | PathLike) -> PreTrainedModel:
    """Reads published weights strictly: what is dropped and what stays neutral is what the table declares."""
    weights, where = encoder.weights, str(source)
    backbone = AutoBackbone.from_config(encoder.config()).eval()
    if weights.layout in _READ_BY_STOCK_CLASS:
        published = _read_stock(source, backbone.config, weights.discards)
    else:
        path = Path(hf_hub_download(where, "model.safetensors") if where == weights.hub_id else source)
        file = path / "model.safetensors" if path.is_dir() else path
        published = {key.removeprefix("backbone."): tensor for key, tensor in read_state_dict(file).items()}
    unmet = [pattern for pattern in weights.discards if not any(re.match(pattern, key) for key in published)]
    if unmet:
        raise ValueError(
            f"{where} holds no key like {', '.join(unmet)}, which {encoder.name!r} declares to discard: it is another "
            "architecture or another file."
        )
    kept = {key: tensor for key, tensor in published.items() if not _matches(weights.discards, key)}
    converted, ours = LAYOUTS[weights.layout](kept), backbone.state_dict()
    _report(
        where,
        [key for key in ours if key not in converted and not _matches(weights.neutral, key)],
        [key for key in converted if key not in ours],
        [
            f"{key} {tuple(converted[key].shape)} instead of {tuple(tensor.shape)}"
            for key, tensor in ours.items()
            if key in converted and converted[key].shape != tensor.shape
        ],
    )
    backbone.load_state_dict(converted, strict=False)
    return backbone


def _read_stock(source: str | PathLike, config: PreTrainedConfig, discards: Iterable[str]) -> StateDict:
    """State dict of a stock model as its own class loads it, keys that the class leaves out included."""
    stock_config = config.vision_config if config.model_type == "hidden_state_backbone" else config
    stock_class = AutoModel._model_mapping[type(stock_config)]
    model, info = stock_class.from_pretrained(source, output_loading_info=True)
    needed = [key for key in info["missing_keys"] if not _matches(discards, key)]
    _report(str(source), needed, (), info["mismatched_keys"])
    if stock_config is not config:
        _check_same_architecture(str(source), model.config, stock_config)
    return model.state_dict() | {key: torch.empty(0) for key in info["unexpected_keys"]}


def _matches(patterns: Iterable[str], key: str) -> bool:
    return any(re.match(pattern, key) for pattern in patterns)


def _architecture(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of a config that decide what it computes, those of configs inside it under `name.field`."""
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, dict) and key not in _NOT_ARCHITECTURE:
            flat |= _architecture(value, f"{prefix}{key}.")
        elif key not in _NOT_ARCHITECTURE:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def _check_same_architecture(where: str, config: PreTrainedConfig, expected: PreTrainedConfig) -> None:
    """Fields that no tensor shape shows (heads, activations, epsilons, the tap) must agree, too."""
    ours, theirs = _architecture(expected.to_dict()), _architecture(config.to_dict())
    differing = sorted(key for key in ours if theirs.get(key) != ours[key])
    if differing:
        pairs = _listed(f"{key} {theirs.get(key)!r} instead of {ours[key]!r}" for key in differing)
        raise ValueError(f"The weights in {where} are of another architecture: {pairs}.")


def _report(where: str, missing: Iterable, unexpected: Iterable, mismatched: Iterable) -> None:
    """Raises one sentence that names what does not fit."""
    groups = {"lacks": missing, "has undeclared": unexpected, "has another shape for": mismatched}
    found = [f"{verb} {_listed(keys)}" for verb, keys in groups.items() if keys]
    if found:
        raise ValueError(f"The checkpoint {where} does not fit: it {'; it '.join(found)}.")


def _listed(keys: Iterable) -> str:
    names = sorted(str(key) for key in keys)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


__all__ = ["LAYOUTS", "convert_encoder", "image_processor_arguments", "load_encoder"]
