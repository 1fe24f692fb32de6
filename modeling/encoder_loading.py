"""From a name, a folder or a Hub id to an encoder: step two of two, a whole checkpoint becomes a tapped Backbone.

Step one, from a published file to a whole checkpoint, is `published_weights`. Loading is strict. Every tensor of
the whole model is there with its shape; a tensor that is not loaded belongs to a part that the tapped model does not
have, its head or what lies after the tap; a tensor that the whole model does not have is a tap's norm, which stays
neutral and is never trained: the config says `output_norm="parameter_free"`, whoever saves and loads it again.
"""

import copy
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from safetensors import SafetensorError
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.backbone_utils import BackboneMixin
from transformers.utils import logging

from ..configuration.configuration_tapped_timm import TappedTimmConfig
from ..configuration.named_encoders import ENCODERS, NamedEncoder, get_named_encoder
from ..configuration.taps import says_its_norm, tapped_config, vision_part
from ..configuration.timm_stages import tapped_timm_config
from .checkpoint_files import FILES_OF_A_REPOSITORY, read_state_dict, shards_of
from .checkpoint_layout import StateDict
from .checkpoint_report import check_fit, check_same_architecture, is_of_type, listed, report_misfit
from .modeling_tapped_timm import TappedTimmBackbone
from .own_backbones import IDLE_NORM, TAP_NORMS, freeze_neutral_norms
from .published_weights import PublishedWeights, on_meta, read_published
from .timm_backbones import load_timm_encoder, names_in_whole

_BACKBONES: Any = AutoBackbone._model_mapping
_MODELS: Any = AutoModel._model_mapping
"""Config class -> model class, of stock and registered families; read lazily by Transformers."""

_PART_PREFIX = r"^(?:model\.)?(?:vision_tower|vision_model|vision_encoder|backbone)\.(?:vision_model\.)?"
"""Under what names models that contain a vision model keep it (LLaVA, CLIP, AIMv2, UPerNet, ...)."""

_MOST_BLOCKS = 10_000

_TIMM = "timm/"
"""Owner of timm's repositories on the Hub."""


def load_encoder(
    name_or_dir: str | PathLike,
    *,
    tap: str | None = None,
    weights_dir: str | PathLike | None = None,
    pretrained: bool = True,
) -> PreTrainedModel:
    """Builds an encoder: one with a name in the table, a saved one, or any vision model in Transformers' format.

    Weights of a name come from the folder `weights_dir/NAME` where `weights_dir` is given, else from the Hub where the
    table knows a repository.

    Args:
        name_or_dir: exact name in `ENCODERS`; or a folder or Hub id (`owner/name`) that holds a vision model, whole or
            tapped, or a model that contains one, such as CLIP.
        tap: the stage or block whose features are used ("stage3", "block11"). By default that of the name, that of a
            Backbone that was saved with one, else the third of four stages or the second-to-last block.
        weights_dir: folder that holds one folder per encoder, as `ssm-vlm convert` writes them.
        pretrained: False gives random weights.

    Returns:
        A Backbone in eval mode; `feature_maps[-1]` is [B, C, H, W] at its tap.

    Raises:
        ValueError: no such name or folder, no such tap, or weights of another architecture.
        OSError: the weights are not to be had; the message says how to get them.
    """
    name = str(name_or_dir)
    if name in ENCODERS:
        return _load_named(ENCODERS[name], tap, weights_dir, pretrained)
    path = Path(name_or_dir)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"The folder {name!r} holds no config.json, so no saved encoder.")
    if not path.is_dir() and not _is_hub_id(name):
        get_named_encoder(name)  # raises, naming the nearest
    if pretrained:
        return _load_saved(name, tap)
    if name.startswith(_TIMM) and not path.is_dir():  # timm knows its models without the Hub
        return _random(tapped_timm_config(name.removeprefix(_TIMM), tap))
    return _random(_tapped_as_saved(saved_config(name), tap))


def _random(config: PreTrainedConfig) -> PreTrainedModel:
    """A Backbone with random weights."""
    return freeze_neutral_norms(AutoBackbone.from_config(config)).eval()


def _is_parameter_free(config: PreTrainedConfig) -> bool:
    """Whether a stock Backbone has to have a norm at its tap that does nothing but norm."""
    return says_its_norm(config) and getattr(config, "output_norm", None) == "parameter_free"


def check_encoder(name_or_dir: str | PathLike, tap: str | None = None) -> None:
    """Whether `load_encoder` knows this encoder and this tap, as far as can be told without weights and the Hub.

    Raises:
        ValueError: no such name or folder, no such tap, or a model that cannot be tapped.
    """
    name = str(name_or_dir)
    if name in ENCODERS:
        config = ENCODERS[name].config()
    elif (Path(name) / "config.json").is_file():
        config = saved_config(name)
    elif Path(name).is_dir():
        raise ValueError(f"The folder {name!r} holds no config.json, so no saved encoder.")
    elif _is_hub_id(name):
        return
    else:
        config = get_named_encoder(name).config()  # raises, naming the nearest
    if tap is not None or name not in ENCODERS:
        _tapped_as_saved(config, tap)


def read_named(encoder: NamedEncoder, source: str | PathLike) -> PublishedWeights:
    """Reads a published file and holds it to a named encoder, keys and shapes.

    Raises:
        ValueError: naming what differs.
    """
    published = read_published(source, encoder)
    hold_to_named(encoder, published.config, str(source))
    return published


def hold_to_named(encoder: NamedEncoder, config: PreTrainedConfig, where: str) -> None:
    """Holds a whole model, by its config, to a named encoder: the keys and shapes up to the tap, and what none shows.

    Raises:
        ValueError: naming what differs.
    """
    expected = encoder.config()
    family = (expected.vision_config if expected.model_type == "hidden_state_backbone" else expected).model_type
    family = "timm_wrapper" if family == "tapped_timm" else family
    if vision_part(config).model_type != family:
        raise ValueError(f"{where} holds a {config.model_type!r} model, but {encoder.name!r} is a {family!r} model.")
    try:
        tapped = tapped_config(config, expected.out_features[-1])
    except ValueError:  # a model without this tap: it lacks the keys up to it
        tapped = tapped_config(config)
    check_fit(where, _on_meta(tapped).state_dict(), _on_meta(expected).state_dict())
    check_same_architecture(where, tapped, expected)


def _on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    return on_meta(_BACKBONES[type(config)], config)


def read_transformers(source: str | PathLike) -> PreTrainedModel:
    """The whole vision model in a folder or repository in Transformers' format, with its head where it has one.

    Of a model that contains a vision model (CLIP, SigLIP, ...) only that is read.

    Raises:
        ValueError: naming tensors that are missing, unexpected or of another shape.
        OSError: there is no such model.
    """
    model, missing = _read_what_is_there(source)
    report_misfit(str(source), missing=missing, unexpected=(), misshaped=())
    return model


def _read_what_is_there(source: str | PathLike) -> tuple[PreTrainedModel, set[str]]:
    """The same, and which of its tensors are not in the source but random: poolers, often."""
    config = saved_config(source)
    part, saved_class = vision_part(config), _saved_class(config)
    model_class: Any = saved_class
    options: dict[str, Any] = {}
    if part is not config:
        model_class = _part_class(on_meta(saved_class, config), part)
        options = {"config": part, "key_mapping": {_PART_PREFIX: ""}}
    for index in Path(source).glob("*.index.json"):
        shards_of(index)
    with _report_of_ours(), _damage_in_one_sentence(source):
        model, info = model_class.from_pretrained(source, output_loading_info=True, **options)
    unexpected = info["unexpected_keys"]
    if part is not config:  # the rest of the composite is no part of the vision model
        own = {key.partition(".")[0] for key in model.state_dict()}
        unexpected = [key for key in unexpected if key.partition(".")[0] in own]
    report_misfit(str(source), missing=(), unexpected=unexpected, misshaped=info["mismatched_keys"])
    _check_numbers(source, model, whole=part is config)
    _check_tap_norm(source, model)
    is_backbone = isinstance(model, BackboneMixin)
    if is_backbone:  # to a whole Swin its last norm is not idle
        freeze_neutral_norms(model)
    return model.eval(), info["missing_keys"]


def _check_tap_norm(source: str | PathLike, model: PreTrainedModel) -> None:
    """Holds the norms behind the taps of a Backbone to its config, which says "layernorm" where it said nothing.

    Raises:
        ValueError: the config says that they have no parameters, but somebody trained them.
    """
    norms = {name: norm for name, norm in model.named_parameters() if name.startswith(TAP_NORMS)}
    if norms and not _is_parameter_free(model.config):
        model.config.output_norm = "layernorm"
        return
    trained = [name for name, norm in norms.items() if not torch.equal(norm, _neutral(name, norm))]
    if trained:
        raise ValueError(
            f"The config in {str(source)!r} says output_norm='parameter_free', but {listed(trained)} was trained: if "
            "that was meant, write 'layernorm'."
        )


def _neutral(name: str, norm: torch.Tensor) -> torch.Tensor:
    """What a parameter of this name and shape is in a norm that does nothing but norm."""
    return torch.full(norm.shape, 1.0 if name.endswith("weight") else 0.0, dtype=norm.dtype)


def _check_numbers(source: str | PathLike, model: PreTrainedModel, whole: bool) -> None:
    """Raises ValueError naming weights that are stored as whole numbers: Transformers casts them without a word.

    Checkpoints may name their tensors as older versions of Transformers do, so that only the last part of a name is
    held to the model's; buffers of whole numbers, `position_ids` and the like, are as they should be.
    """
    stored: Any = source
    if not Path(source).is_dir():
        cached = (try_to_load_from_cache(str(source), name) for name in FILES_OF_A_REPOSITORY)
        stored = next((file for file in cached if isinstance(file, str)), None)
    if stored is None:
        return
    wanted = {
        key.rpartition(".")[2]: tensor for key, tensor in model.state_dict().items() if tensor.is_floating_point()
    }
    mistyped = [
        f"{key} {tensor.dtype} instead of {model.dtype}"
        for key, tensor in read_state_dict(stored).items()
        if (name := key.rpartition(".")[2]) in wanted
        and not is_of_type(tensor, wanted[name])
        and (whole or re.match(_PART_PREFIX, key))
    ]
    report_misfit(str(source), missing=(), unexpected=(), misshaped=(), mistyped=mistyped)


def _read_tensors(source: str | PathLike) -> tuple[StateDict, type[PreTrainedModel], PreTrainedConfig]:
    """The tensors that a source in Transformers' format holds of a whole model, its class and its config."""
    model, missing = _read_what_is_there(source)
    left_out = TAP_NORMS if _is_parameter_free(model.config) else ()
    tensors = {
        key: tensor for key, tensor in model.state_dict().items() if key not in missing and not key.startswith(left_out)
    }
    return tensors, type(model), model.config


@contextmanager
def _report_of_ours() -> Iterator[None]:
    """Transformers' own report of what was not loaded is left out: here it is an error, or as it should be."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


@contextmanager
def _damage_in_one_sentence(source: str | PathLike) -> Iterator[None]:
    """What safetensors and Transformers say of files that are missing or damaged."""
    try:
        yield
    except pickle.UnpicklingError as error:  # torch's own words recommend to run the code in the file
        raise ValueError(
            f"The weights in {str(source)!r} cannot be read safely: they are of another format, are damaged, or need "
            "code of their own to run."
        ) from error
    except (SafetensorError, RuntimeError, OSError, ValueError, TypeError, KeyError, EOFError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"The weights in {str(source)!r} cannot be read: {reason}.") from error


def _part_class(whole: PreTrainedModel, part: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of the model inside `whole` that has this kind of config."""
    for module in whole.modules():
        if isinstance(module, PreTrainedModel) and type(module.config) is type(part):
            return type(module)
    return _MODELS[type(part)]


def _saved_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that saved a checkpoint, by the name in its config; without one the Auto class decides."""
    for name in filter(lambda name: isinstance(name, str), config.architectures or ()):
        for auto in (AutoBackbone, AutoModelForImageClassification, AutoModel):
            model_class = auto._model_mapping.get(type(config), None)
            for candidate in model_class if isinstance(model_class, tuple) else (model_class,):
                if candidate is not None and candidate.__name__ == name:
                    return candidate
        stock = getattr(transformers, name, None)
        if isinstance(stock, type) and issubclass(stock, PreTrainedModel):
            return stock
    if type(config) in _MODELS:
        return _MODELS[type(config)]
    raise ValueError(f"A {config.model_type!r} checkpoint is of no model class that is known here.")


def saved_config(source: str | PathLike) -> PreTrainedConfig:
    """The config in a folder or repository in Transformers' format.

    Raises:
        ValueError, OSError: there is none, or it cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        _check_depth(vision_part(config))
        return config
    except Exception as error:  # configs check their fields, each in its own way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        name = str(source)
        where = "No model can be read from the folder" if Path(name).is_dir() else "No folder or model on the Hub is"
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{where} {name!r}: {reason}") from error


def _check_depth(config: PreTrainedConfig) -> None:
    """Raises ValueError for numbers of blocks that no encoder has: it would take forever to build."""
    depth = getattr(config, "num_hidden_layers", None)
    for blocks in [1 if depth is None else depth, *(getattr(config, "depths", None) or ())]:
        if not isinstance(blocks, int) or not 0 <= blocks <= _MOST_BLOCKS:
            raise ValueError(f"it says that the encoder has {blocks!r} blocks.")


def _is_tapped(config: PreTrainedConfig) -> bool:
    """Whether this is the config of a saved Backbone with a tap; one that returns every stage is a whole model."""
    if type(config) not in _BACKBONES:
        return False
    stages = [name for name in config.stage_names or () if name != "stem"]
    is_backbone = _BACKBONES[type(config)].__name__ in (config.architectures or ())
    return is_backbone and (config.out_features != stages or len(stages) == 1)


def _tapped_as_saved(config: PreTrainedConfig, tap: str | None) -> PreTrainedConfig:
    return config if tap is None and _is_tapped(config) else tapped_config(config, tap)


def _load_saved(source: str, tap: str | None = None) -> PreTrainedModel:
    config = saved_config(source)
    if tap is None and _is_tapped(config):
        return read_transformers(source)
    tapped = tapped_config(config, tap)  # a model that cannot be tapped is told before its weights are read
    if config.model_type == "timm_wrapper" and isinstance(tapped, TappedTimmConfig):
        return load_timm_encoder(
            source if Path(source).is_dir() else hf_hub_download(source, "model.safetensors"), tapped
        )
    tensors, model_class, _ = _read_tensors(source)
    return tap_whole(tensors, model_class, tapped, source)


def _load_named(
    encoder: NamedEncoder, tap: str | None, weights_dir: str | PathLike | None, pretrained: bool
) -> PreTrainedModel:
    expected = encoder.config()
    if not pretrained:
        return _random(expected if tap is None else tapped_config(expected, tap))
    if weights_dir is not None:
        folder = Path(weights_dir) / encoder.name
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"There is no saved encoder in {str(folder)!r}. {_how_to_get(encoder)}")
        return _load_whole(encoder, str(folder), tap)
    if encoder.weights is None or encoder.weights.hub_id is None:
        raise OSError(f"No repository on the Hub holds {encoder.name!r} as safetensors. {_how_to_get(encoder)}")
    hub_id = encoder.weights.hub_id
    try:
        if encoder.weights.layout == "transformers":
            return _load_whole(encoder, hub_id, tap)
        published = read_named(encoder, hf_hub_download(hub_id, "model.safetensors"))
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(f"Cannot get {encoder.name!r} from the Hub ({reason}). {_how_to_get(encoder)}") from error
    config = expected if tap is None else tapped_config(published.config, tap)
    return tap_whole(published.tensors, published.model_class, config, hub_id)


def _load_whole(encoder: NamedEncoder, source: str, tap: str | None) -> PreTrainedModel:
    """A named encoder out of a whole model, or a Backbone already tapped as its name says."""
    expected = encoder.config()
    saved = saved_config(source)
    if _is_tapped(saved):
        check_same_architecture(source, saved, expected)
        return _load_saved(source, tap)
    tensors, model_class, whole_config = _read_tensors(source)
    hold_to_named(encoder, whole_config, source)
    config = expected if tap is None else tapped_config(whole_config, tap)
    return tap_whole(tensors, model_class, config, source)


def tap_whole(
    tensors: Mapping[str, torch.Tensor], model_class: type[PreTrainedModel], config: PreTrainedConfig, where: str
) -> PreTrainedModel:
    """The Backbone of everything up to the tap of `config`, with the tensors of a whole model.

    Args:
        tensors: of the whole model, all of them.
        model_class: its class.
        config: a Backbone config, tapped.
        where: where the tensors come from, for the message.

    Raises:
        ValueError: naming tensors that the Backbone needs and the whole model lacks, or has in another shape.
    """
    tapped = _on_meta(config)
    picked, is_normed = _tensors_of(tapped, tensors, model_class, where)
    if says_its_norm(config):
        config = copy.deepcopy(config)
        config.output_norm = "layernorm" if is_normed else "parameter_free"
    dtype = next(tensor.dtype for tensor in picked.values() if tensor.is_floating_point())
    with _report_of_ours():
        backbone = type(tapped).from_pretrained(None, config=config, state_dict=picked, dtype=dtype)
    return freeze_neutral_norms(backbone).eval()


def _tensors_of(
    tapped: PreTrainedModel, tensors: Mapping[str, torch.Tensor], model_class: type[PreTrainedModel], where: str
) -> tuple[StateDict, bool]:
    """What the tapped model (without memory) takes from the whole one, under its names; whether with a tap's norm."""
    prefix = model_class.base_model_prefix
    picked: dict[str, Any] = {}
    missing, misshaped = [], []
    is_normed = False
    timm_names = names_in_whole(tapped) if isinstance(tapped, TappedTimmBackbone) else {}
    for key, own in tapped.state_dict().items():
        source = timm_names.get(key) or _name_in_whole(key, tapped)
        found = tensors.get(source, tensors.get(f"{prefix}.{source}"))
        fits = found is not None and found.shape == own.shape
        is_normed |= fits and key.startswith(TAP_NORMS)
        if not fits and key.startswith(IDLE_NORM) or found is None and key.startswith(TAP_NORMS):
            found = _neutral(key, torch.empty(own.shape))
        elif found is None:
            missing.append(source)
        elif not fits:
            misshaped.append(f"{source} {tuple(found.shape)} instead of {tuple(own.shape)}")
        picked[key] = found
    report_misfit(where, missing=missing, unexpected=(), misshaped=misshaped)
    return picked, is_normed


def _name_in_whole(key: str, tapped: PreTrainedModel) -> str:
    """A tensor of a tapped model -> its name in the whole model without that model's own prefix."""
    if tapped.config.model_type == "hidden_state_backbone" and key.startswith("norm."):
        return f"{tapped.config.family.final_norm}.{key.removeprefix('norm.')}"
    return key.removeprefix(f"{tapped.base_model_prefix}.")


def _is_hub_id(name: str) -> bool:
    owner, slash, repository = name.partition("/")
    return bool(owner.strip(".") and slash and repository) and "/" not in repository


def _how_to_get(encoder: NamedEncoder) -> str:
    if encoder.weights is None:
        return (
            "This project trains it: give weights_dir=FOLDER with a saved encoder in FOLDER/"
            f"{encoder.name}, or pretrained=False (in a recipe: vision_weights_dir, vision_pretrained)."
        )
    download = f"Download {encoder.weights.url or f'https://huggingface.co/{encoder.weights.hub_id}'}"
    return (
        f"{download}, run `ssm-vlm convert DOWNLOAD --encoder {encoder.name} --output FOLDER/{encoder.name}` and give "
        "weights_dir=FOLDER, or pretrained=False for random weights (in a recipe: vision_weights_dir, "
        "vision_pretrained)."
    )


__all__ = [
    "check_encoder",
    "hold_to_named",
    "load_encoder",
    "read_named",
    "read_transformers",
    "saved_config",
    "tap_whole",
]
