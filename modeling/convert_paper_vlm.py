"""The vision-language checkpoints that arXiv 2603.19209 released, made into complete `LlavaStyle` models.

A release is a tar (or the folder that was in it) with `config.json` and `checkpoints/latest-checkpoint.pt`. The
checkpoint is `{"model": {"projector": {...}, "llm_backbone": {...}}}`: the connector as `projector.0.weight`, ..., and
the language model as `llm.model...`, `llm.lm_head...`. The encoder's weights and the tokenizer are not in it. Names,
checksums and settings are those of `model_zoo/models.yaml` in github.com/raykuo18/vlm-ssm-vision-encoders, which the
release's own loader puts over what `config.json` says.
"""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from ..configuration.configuration_llava_style import LlavaStyleConfig
from ..configuration.named_encoders import NamedEncoder, get_named_encoder
from .chat_templates import vicuna_template
from .checkpoint_files import file_sha256, read_checkpoint
from .checkpoint_report import check_finite, check_fit
from .encoder_conversion import SHARD_SIZE, check_target, is_transformers_folder, write_whole
from .encoder_loading import hold_to_named, load_encoder, read_named, read_transformers, tap_whole
from .encoder_preprocessing import image_processor_arguments
from .image_processing_llava_style import LlavaStyleImageProcessor
from .modeling_llava_style import LlavaStyleForConditionalGeneration
from .processing_llava_style import LlavaStyleProcessor
from .published_weights import on_meta
from .release_archive import CHECKPOINT, CONFIG, read_config, unpack_checkpoint


@dataclass(frozen=True)
class Release:
    """One released checkpoint; all eight have the letterbox of their encoder and the 2-MLP on Vicuna 7B v1.5.

    Args:
        run: name of the training run.
        vision_backbone: key of `VISION_BACKBONES`.
        sha256: checksum of the tar.
        settings: what else the loader of the release puts over `config.json`.
    """

    run: str
    vision_backbone: str
    sha256: str
    settings: Mapping[str, Any] = field(default_factory=dict)


_LAST_BLOCK_OF_STAGE_3 = {"vmamba_feature_stage": 3, "vmamba_feature_layer": 14}

RELEASES: dict[str, Release] = {
    "vit-s-in1k-224": Release(
        "in1k-224px-vit-s+7b-vicuna+ep1+ft+x7",
        "in1k-vit-s",
        "9359fc2e2bcd3a5afe5b801fcf99b964dad8becc398eac79ac118c9334340505",
    ),
    "maxvit-t-in1k-224-s3": Release(
        "in1k-224px-maxvit-t-letterbox-s3+7b-vicuna+ep1+ft+x7",
        "in1k-224px-maxvit-t-s3",
        "2b844750143b028f90bce4d96f00696713c15c0e332ccc7dac770fa485869f4e",
    ),
    "mambavision-b-in1k-224-s3": Release(
        "mambavision-b-letterbox-s3+7b-vicuna+ep1+ft+x7",
        "mambavision-b-s3",
        "c8cf2e870dbda8bd6d45b6388c4bc71e9ee8296b28cdf44c843d9e5916eeeeeb",
    ),
    "vmamba-s-in1k-224-s3": Release(
        "vmamba-small-s2l15+7b-vicuna+ep1+s3l14+ft+x7",
        "vmamba-small-s2l15",
        "0b3febfb685975ea8b9e81ab3e9f2f9637b67b8cca92f52a7899ba5a1130108f",
        _LAST_BLOCK_OF_STAGE_3,
    ),
    "vitdet-b-coco-1024": Release(
        "vitdet-b-maskrcnn-letterbox+7b-vicuna+ep1+ft+x7",
        "vitdet-b-maskrcnn",
        "15d4c2bc08c44c9fe731ca0fbdf7449833782fcc1daace1866765dd753fec1de",
    ),
    "vmamba-s-coco-1333x800": Release(
        "vmamba-small-s2l15-maskrcnn-1x-letterbox+7b-vicuna+ep1+s3l14+ft+x7",
        "vmamba-small-s2l15-det-maskrcnn-1x",
        "e9629e577275c042b0a9c48e666c9af81fef7291b7d23ed2b47ca03b4b0fa118",
        _LAST_BLOCK_OF_STAGE_3,
    ),
    "vit-adapter-deit-b-ade20k-512": Release(
        "vit-adapter-upernet-deit-b-ade20k-512-letterbox+7b-vicuna+ep1+ft+x7",
        "vit-adapter-upernet-deit-b-ade20k-512",
        "d0cbd0a1d698496bbed4f38ca05e50e8a0f2a07e265157b7053beb4c9f64a73f",
    ),
    "vmamba-s-ade20k-512": Release(
        "vmamba-small-s2l15-ade20k-letterbox+7b-vicuna+ep1+s3l14+ft+x7",
        "vmamba-small-s2l15-seg-ade20k",
        "bb3eef2ba5f7b9abd2cdd0d459e88c06d05ab75d8250843a7c51c819a509b188",
        _LAST_BLOCK_OF_STAGE_3,
    ),
}
"""Public id, which is also the name of the tar -> what is known of it."""

VISION_BACKBONES: dict[str, str] = {
    "in1k-vit-s": "vit_small_patch16.augreg_in1k_224",
    "in1k-224px-maxvit-t-s3": "maxvit_tiny.in1k_224",
    "mambavision-b-s3": "mambavision_base.in1k_224_before_mixers",
    "vmamba-small-s2l15": "vmamba_small_s2l15.in1k_224",
    "vitdet-b-maskrcnn": "vitdet_base_patch16.coco_maskrcnn_1024",
    "vmamba-small-s2l15-det-maskrcnn-1x": "vmamba_small_s2l15.coco_maskrcnn_1x",
    "vit-adapter-upernet-deit-b-ade20k-512": "vit_adapter_base.deit_ade20k_upernet_512",
    "vmamba-small-s2l15-seg-ade20k": "vmamba_small_s2l15.ade20k_upernet_512",
}
"""`vision_backbone_id` of the release -> encoder in our table, tapped as the release taps it."""


def _square(side: int) -> dict[str, Any]:
    return {"geometry": f"square_{side}", "size": {"height": side, "width": side}}


_SEGMENTATION = {"geometry": "letterbox_corner", "size": {"height": 512, "width": 2048}, "size_divisor": 32}

RESIZE_STRATEGIES: dict[str, dict[str, Any]] = {
    "letterbox": {},  # that of the named encoder: centred for classifiers, in the corner for detectors and segmenters
    "vitdet-detection": {},
    "vmamba-detection": {"geometry": "letterbox_corner", "size_divisor": 32},
    "vmamba-segmentation": _SEGMENTATION,
    "vit-adapter-segmentation": _SEGMENTATION,
    "vmamba-classification": {"geometry": "resize_crop", "crop_pct": 0.875},
    "resize-naive": {"geometry": "resize"},
    **{f"letterbox-square-{side}": _square(side) for side in (224, 256, 512, 1024)},
}
"""`image_resize_strategy` of the release -> what our image processor changes of the encoder's own preprocessing."""

CONNECTORS: dict[str, str] = {"linear": "linear", "gelu-mlp": "mlp2", "fused-gelu-mlp": "mlp3"}
"""`arch_specifier` of the release, without "no-align+" in front -> our connector."""

IMAGE_TOKEN = "<image>"

LANGUAGE_MODELS: dict[str, str] = {"vicuna-v15-7b": "lmsys/vicuna-7b-v1.5"}
"""`llm_backbone_id` of the release -> Hub id of its config and tokenizer."""


def convert_paper_release(
    source: str | PathLike,
    folder: str | PathLike,
    *,
    encoder_weights: str | PathLike | None = None,
    language_model: str | None = None,
    progress: Callable[[str], Any] = lambda step: None,
) -> Path:
    """Writes a released checkpoint as a complete model with its processor, which `from_pretrained` loads.

    The tar of a known release is held to its checksum. Only the checkpoint is unpacked, to a temporary file beside the
    output, and its tensors are mapped from there, so the weights are in memory at most once.

    Args:
        source: the tar, or the folder that was in it.
        folder: where the model goes; it appears whole or not at all, and an existing one is replaced.
        encoder_weights: the encoder's published file, or a folder that `ssm-vlm convert` made of it; by default the
            Hub, where it has the file.
        language_model: folder or Hub id with the config and the tokenizer of the language model that was fine-tuned;
            by default Vicuna 7B v1.5 on the Hub.
        progress: called with the name of each step as it begins.

    Returns:
        The folder.

    Raises:
        OSError: a file is not there, or the disk is too small.
        ValueError: the archive is not safe or not a release, or something in it does not fit: the message says what.
    """
    source, folder = Path(source), Path(folder)
    check_target(folder, source)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.release.") as scratch:
        progress("reading")
        settings, origin = _settings(source)
        encoder = _named_encoder(settings, source)
        connector = _connector(settings, source)
        geometry = _entry(RESIZE_STRATEGIES, settings, "image_resize_strategy", source)
        published = _entry(LANGUAGE_MODELS, settings, "llm_backbone_id", source)
        progress("loading the encoder and the tokenizer")
        text_config, tokenizer = _language_model(language_model or published)
        backbone = _load_encoder(encoder, encoder_weights)
        progress("unpacking")
        tensors = _tensors(unpack_checkpoint(source, Path(scratch)), source)
        rows = _vocabulary(tensors, tokenizer, source)
        text_config.vocab_size, text_config.pad_token_id = len(rows), tokenizer.pad_token_id
        text_config.dtype = rows.dtype

        image_processor = LlavaStyleImageProcessor(**image_processor_arguments(encoder.name) | geometry)
        processor = LlavaStyleProcessor(image_processor, tokenizer, chat_template=vicuna_template(tokenizer))
        config = LlavaStyleConfig(
            vision_config=backbone.config,
            text_config=text_config,
            connector=connector,
            tap_norm="none",  # VMamba's is the encoder's own output norm; the paper norms no other tap
            image_token_id=processor.image_token_id,
            box_frame="centered_square",
        )
        model = on_meta(LlavaStyleForConditionalGeneration, config)
        tensors |= {f"vision_tower.{key}": tensor for key, tensor in backbone.state_dict().items()}
        check_fit(str(source), tensors, model.state_dict())
        check_finite(str(source), tensors)
        model.load_state_dict(tensors, assign=True)
        progress("writing")
        origin |= {"layout": "paper_vlm", "encoder": encoder.name, "language_model": published}

        def save(new: Path) -> None:
            model.eval().save_pretrained(new, max_shard_size=SHARD_SIZE)
            processor.save_pretrained(new)

        write_whole(folder, save, origin)
    return folder


# --- what it says ---------------------------------------------------------------------------------------------------


def _settings(source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`config.json` of a release as its own loader reads it, and where the release comes from.

    The tar of a known release must be that very file.
    """
    text = read_config(source)
    try:
        config = json.loads(text)
        settings = dict(config["model"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{CONFIG} in {str(source)!r} is not that of a release: it needs a dict 'model'.") from error
    sha256 = None if source.is_dir() else file_sha256(source)
    for key in ("vmamba_feature_stage", "vmamba_feature_layer"):
        settings[key] = config.get(key) if settings.get(key) is None else settings[key]
    name = source.name if source.is_dir() else source.stem
    claims = {name, settings.get("model_id"), config.get("run_id")}
    for public_id, release in RELEASES.items():
        if claims & {public_id, release.run}:
            if sha256 not in (None, release.sha256):
                raise ValueError(
                    f"{str(source)!r} is not the release {public_id!r}, or its download is damaged: its SHA-256 is "
                    f"{sha256}, that of the release is {release.sha256}."
                )
            settings |= {
                "vision_backbone_id": release.vision_backbone,
                "image_resize_strategy": "letterbox",
                "arch_specifier": "no-align+gelu-mlp",
                "llm_backbone_id": "vicuna-v15-7b",
                **release.settings,
            }
    return settings, {"source": source.name, "sha256": sha256}


def _entry(table: Mapping[str, Any], settings: Mapping[str, Any], key: str, source: Path) -> Any:
    value = settings.get(key)
    if not isinstance(value, str) or value not in table:
        raise ValueError(
            f"{CONFIG} in {str(source)!r} has {key} {value!r}, which is not known: known are {', '.join(table)}."
        )
    return table[value]


def _connector(settings: Mapping[str, Any], source: Path) -> str:
    arch = str(settings.get("arch_specifier")).removeprefix("no-align+")
    return _entry(CONNECTORS, {"arch_specifier": arch}, "arch_specifier", source)


def _named_encoder(settings: Mapping[str, Any], source: Path) -> NamedEncoder:
    encoder = get_named_encoder(_entry(VISION_BACKBONES, settings, "vision_backbone_id", source))
    if settings["vision_backbone_id"].startswith("vmamba"):
        config = encoder.config()
        last = config.depths[2] - 1
        stage, layer = settings.get("vmamba_feature_stage"), settings.get("vmamba_feature_layer")
        if stage != 3 or layer not in (None, -1, last):
            raise ValueError(
                f"{CONFIG} in {str(source)!r} taps VMamba at stage {stage or 'last'}, block {layer}: only the last "
                f"block of stage 3 (block {last}) can be converted."
            )
    return encoder


def _load_encoder(encoder: NamedEncoder, source: str | PathLike | None) -> PreTrainedModel:
    """The named encoder, tapped, out of a published file, a converted folder or the Hub."""
    if source is None:
        try:
            return load_encoder(encoder.name)
        except OSError as error:
            assert encoder.weights is not None  # the paper trained no encoder of its own
            file = encoder.weights.url or f"https://huggingface.co/{encoder.weights.hub_id}"
            raise OSError(
                f"The weights of {encoder.name!r}, which no release of the paper holds, are not to be had: download "
                f"{file} and give it, `--encoder-weights FILE`, encoder_weights=FILE."
            ) from error
    if is_transformers_folder(Path(source)):
        whole = read_transformers(source)
        hold_to_named(encoder, whole.config, str(source))
        return tap_whole(whole.state_dict(), type(whole), encoder.config(), str(source))
    published = read_named(encoder, source)
    return tap_whole(published.tensors, published.model_class, encoder.config(), str(source))


# --- its tensors ----------------------------------------------------------------------------------------------------


def _tensors(checkpoint: Path, source: Path) -> dict[str, torch.Tensor]:
    """Connector and language model under our names, mapped from the file."""
    contents = read_checkpoint(checkpoint)
    groups = contents.get("model") if isinstance(contents, dict) else None
    groups = groups if isinstance(groups, dict) else {}
    for name in ("projector", "llm_backbone"):
        if not isinstance(groups.get(name), dict) or not all(map(torch.is_tensor, groups[name].values())):
            raise ValueError(f"{CHECKPOINT} in {str(source)!r} holds no tensors under 'model', {name!r}.")
    others = sorted(set(groups) - {"projector", "llm_backbone"})
    if others:
        raise ValueError(
            f"{CHECKPOINT} in {str(source)!r} also holds {', '.join(others)}, which this conversion would lose: only "
            "runs with a frozen encoder can be converted."
        )
    tensors = {_connector_key(key): tensor for key, tensor in groups["projector"].items()}
    return tensors | {
        f"language_model.{key.removeprefix('llm.')}": tensor for key, tensor in groups["llm_backbone"].items()
    }


def _connector_key(key: str) -> str:
    """projector.2.bias -> connector.layers.1.bias; GELU stands at the odd places, and a linear projector has none."""
    match key.split("."):
        case ["projector", ("weight" | "bias") as what]:
            return f"connector.layers.0.{what}"
        case ["projector", place, ("weight" | "bias") as what] if place.isdecimal() and int(place) % 2 == 0:
            return f"connector.layers.{int(place) // 2}.{what}"
    return f"projector {key}"


def _language_model(llm_source: str) -> tuple[PreTrainedConfig, Any]:
    """Config of the language model, and its tokenizer with two tokens that it lacks: the paper's <PAD>, and ours."""
    try:
        config = AutoConfig.from_pretrained(llm_source)
        tokenizer = AutoTokenizer.from_pretrained(llm_source)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        if not is_sentencepiece_available() or not is_protobuf_available():
            reason += "; a tokenizer.model, such as Vicuna's, is read with `pip install sentencepiece protobuf`"
        raise OSError(
            f"Config and tokenizer of the language model cannot be loaded from {llm_source!r} ({reason}). Give the "
            "folder of a download of it: `--language-model DIR`, language_model=DIR."
        ) from error
    config._name_or_path = ""  # else the folder on this machine is saved with it
    tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    return config, tokenizer


def _vocabulary(tensors: Mapping[str, torch.Tensor], tokenizer: Any, source: Path) -> torch.Tensor:
    """The embeddings [rows, width], which the release padded to a multiple of 64 rows, for its tokenizer and <PAD>."""
    embeddings = tensors.get("language_model.model.embed_tokens.weight")
    if embeddings is None:
        raise ValueError(f"{CHECKPOINT} in {str(source)!r} holds no embeddings, llm.model.embed_tokens.weight.")
    rows = -(-(len(tokenizer) - 1) // 64) * 64  # of all tokens but ours for a picture
    if len(embeddings) != rows:
        raise ValueError(
            f"The embeddings in {str(source)!r} have {len(embeddings)} rows, but the tokenizer of the language model "
            f"and <PAD> make {rows}, a multiple of 64: it is that of another language model."
        )
    return embeddings


__all__ = [
    "CONNECTORS",
    "LANGUAGE_MODELS",
    "RELEASES",
    "RESIZE_STRATEGIES",
    "VISION_BACKBONES",
    "Release",
    "convert_paper_release",
]
