"""Trains a LLaVA-style model: `python -m ssm_vlm.training.train_vlm recipe.yaml [--key value ...]`.

One process, `torchrun` and `accelerate launch` all work. The encoder is one key, `vision_encoder`; nothing else has to
change with it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, set_seed

from ..modeling.chat_templates import vicuna_template
from ..modeling.connectors import connector_downsampling
from ..modeling.encoder_loading import check_encoder, load_encoder
from ..modeling.encoder_preprocessing import encoder_image_processor
from ..modeling.image_processing_llava_style import LlavaStyleImageProcessor
from ..modeling.model_card import leave_card
from ..modeling.modeling_llava_style import LlavaStyleForConditionalGeneration
from ..modeling.processing_llava_style import LlavaStyleProcessor
from ..modeling.saved_folder import ORIGIN_FILE
from .collator import ConversationCollator, as_list
from .datasets import LlavaConversations
from .recipe import REQUIRED, RunArguments, RunDirectory, fingerprint, parse_recipe, require, resolved, run_script
from .trainer import ControlledTrainer, train_and_save

IMAGE_TOKEN = "<image>"
CHAT_TEMPLATES = {"vicuna": vicuna_template, "own": lambda tokenizer: None}


@dataclass
class ModelArguments:
    """What the model is made of."""

    vision_encoder: str = field(
        default=REQUIRED,
        metadata={"help": "Name in the table (`ssm-vlm encoders`), or folder or Hub id of any vision model."},
    )
    vision_tap: str | None = field(
        default=None, metadata={"help": "Stage or block to take, as stage3 or block11; by default the encoder's own."}
    )
    vision_weights_dir: str | None = field(
        default=None, metadata={"help": "Folder with a folder of weights per encoder name; by default the Hub."}
    )
    vision_pretrained: bool = field(default=True, metadata={"help": "False starts from random encoder weights."})
    language_model: str = field(default=REQUIRED, metadata={"help": "Hub id or folder of a causal language model."})
    chat_template: Literal["own", "vicuna"] = field(
        default="own", metadata={"help": "own: the language model's; vicuna: the Vicuna v1.5 format of the paper."}
    )
    connector: str = field(
        default="mlp2",
        metadata={"help": "linear, mlp2 or mlp3; average_pool_ or pixel_shuffle_ in front makes fewer tokens."},
    )
    connector_grid: list[int] | None = field(
        default=None, metadata={"help": "average_pool_*: at most so many rows and columns of tokens; by default 14 14."}
    )
    connector_factor: int | None = field(
        default=None, metadata={"help": "pixel_shuffle_*: so many rows and columns become one token; by default 2."}
    )
    connector_seed: int | None = field(
        default=None, metadata={"help": "Seed of the connector's weights; by default the tap's width, as in the paper."}
    )
    tap_norm: Literal["none", "layernorm"] = field(
        default="layernorm", metadata={"help": "none, or layernorm without parameters on the encoder's features."}
    )
    token_positions: str = field(
        default="none", metadata={"help": "none, or sincos2d: fixed codes of row and column on the features."}
    )
    geometry: str | None = field(
        default=None, metadata={"help": "How pictures become pixels; by default the encoder's."}
    )
    image_size: int | None = field(default=None, metadata={"help": "Side of the canvas; by default the encoder's."})
    box_frame: Literal["centered_square", "canvas", "raw"] = field(
        default="centered_square", metadata={"help": "Frame of the boxes in the training text."}
    )
    freeze_vision: bool = field(default=True, metadata={"help": "Keep the encoder's weights as they are."})
    freeze_connector: bool = field(default=False, metadata={"help": "Keep the connector's weights as they are."})
    freeze_language_model: bool = field(default=False, metadata={"help": "Keep the language model as it is."})
    vision_train_mode: bool = field(
        default=False, metadata={"help": "Let a frozen encoder run in train mode, as the paper's code does."}
    )


@dataclass
class DataArguments:
    """What the model is trained on."""

    data_path: str = field(default=REQUIRED, metadata={"help": "Conversations in LLaVA's JSON format."})
    image_root: str | None = field(default=None, metadata={"help": "Folder that the pictures' paths start from."})
    max_text_length: int | None = field(
        default=2048, metadata={"help": "Tokens of text to keep of each conversation; image tokens are never cut."}
    )
    on_bad_row: Literal["raise", "skip"] = field(
        default="raise", metadata={"help": "raise, or skip rows that cannot be trained on."}
    )


def build_processor(
    model_args: ModelArguments, encoder_config: PreTrainedConfig, fewer_tokens: list | tuple = ()
) -> LlavaStyleProcessor:
    """Image processor of the encoder and tokenizer of the language model, with `<image>` as a token.

    `fewer_tokens` are the steps by which the connector goes on where the encoder's `downsampling` ends.
    """
    image_processor = encoder_image_processor(model_args.vision_encoder, encoder_config)
    settings: dict[str, Any] = image_processor.to_dict()
    settings["downsampling"] = [*settings["downsampling"], *fewer_tokens]
    if model_args.geometry is not None:
        settings["geometry"] = model_args.geometry
    if model_args.image_size is not None:
        settings["size"] = {"height": model_args.image_size, "width": model_args.image_size}
    with _named("language_model", model_args.language_model):
        tokenizer = AutoTokenizer.from_pretrained(model_args.language_model)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    return LlavaStyleProcessor(
        LlavaStyleImageProcessor(**settings),
        tokenizer,
        chat_template=CHAT_TEMPLATES[model_args.chat_template](tokenizer),
    )


@contextmanager
def _named(key: str, value: str) -> Iterator[None]:
    """What cannot be loaded is told in one line, with the recipe's key."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(f"{key}: {value!r} cannot be loaded: {reason}") from error


def build_model(
    model_args: ModelArguments,
) -> tuple[LlavaStyleForConditionalGeneration, LlavaStyleProcessor]:
    """The model, its parts loaded and its frozen parts frozen, and its processor."""
    connector_options = {
        "connector_grid": model_args.connector_grid,
        "connector_factor": model_args.connector_factor,
    }
    fewer_tokens = connector_downsampling(model_args.connector, **connector_options)
    encoder = load_encoder(
        model_args.vision_encoder,
        tap=model_args.vision_tap,
        weights_dir=model_args.vision_weights_dir,
        pretrained=model_args.vision_pretrained,
    )
    processor = build_processor(model_args, encoder.config, fewer_tokens)
    with _named("language_model", model_args.language_model):
        language_model = AutoModelForCausalLM.from_pretrained(model_args.language_model, dtype=torch.float32)
    rows: int = language_model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    if len(processor.tokenizer) > rows:
        language_model.resize_token_embeddings(len(processor.tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    model = LlavaStyleForConditionalGeneration.from_parts(
        encoder.float(),
        language_model,
        image_token_id=processor.image_token_id,
        connector=model_args.connector,
        connector_seed=model_args.connector_seed,
        **connector_options,
        tap_norm=model_args.tap_norm,
        token_positions=model_args.token_positions,
        freeze_vision=model_args.freeze_vision,
        vision_train_mode=model_args.vision_train_mode,
        box_frame=model_args.box_frame,
    )
    model.connector.requires_grad_(not model_args.freeze_connector)
    model.language_model.requires_grad_(not model_args.freeze_language_model)
    return model, processor


def picture_fingerprint(data: LlavaConversations, most: int = 1000) -> str:
    """Sizes of the files of up to so many pictures, spread over the data: those of another set are not all the same."""
    rows = np.flatnonzero(data.is_multimodal)
    rows = rows[:: max(1, len(rows) // most)]
    sizes = [os.path.getsize(path) for row in rows.tolist() for path in as_list(data[row]["image"])]
    return hashlib.sha256(str(sizes).encode()).hexdigest()[:16]


def train_vlm(model_args: ModelArguments, data_args: DataArguments, args: RunArguments) -> RunDirectory:
    """Trains, unless the run is already finished. The run directory then holds the complete model."""
    require(model_args, "vision_encoder", "language_model")
    require(data_args, "data_path")
    connector_downsampling(
        model_args.connector,
        connector_grid=model_args.connector_grid,
        connector_factor=model_args.connector_factor,
    )
    check_encoder(model_args.vision_encoder, model_args.vision_tap)
    data = LlavaConversations(data_args.data_path, data_args.image_root, on_bad_row=data_args.on_bad_row)
    text_only = int((~data.is_multimodal).sum())
    if model_args.freeze_language_model and text_only:
        raise ValueError(
            f"{data_args.data_path} has {text_only} conversations without a picture, which teach nothing where "
            "freeze_language_model is true: leave them out or train the language model."
        )
    weights = model_args.vision_weights_dir and Path(model_args.vision_weights_dir) / model_args.vision_encoder
    inputs: dict[str, Callable[[], str | None]] = {
        "vision_encoder": partial(fingerprint, model_args.vision_encoder),
        "vision_weights_dir": partial(fingerprint, weights),
        "language_model": partial(fingerprint, model_args.language_model),
        "data_path": partial(fingerprint, data_args.data_path),
        "image_root": partial(picture_fingerprint, data),
    }
    run = RunDirectory.of(resolved(model_args, data_args, args), inputs, args)
    if run.is_finished:
        return run
    data.check_images()
    set_seed(args.seed)
    model, processor = build_model(model_args)
    geometry = processor.image_processor.get_geometry(224, 224)
    tokens = processor.count_image_tokens(geometry.canvas_height, geometry.canvas_width)
    trainer = ControlledTrainer(
        model=model,
        args=args,
        train_dataset=data,
        data_collator=ConversationCollator(processor, data_args.max_text_length),
        grouping=(data.lengths(tokens), data.is_multimodal),
    )

    def summary() -> dict[str, Any]:
        local = [key for key in ("vision_encoder", "language_model") if Path(getattr(model_args, key)).exists()]
        origin = Path(weights or model_args.vision_encoder) / ORIGIN_FILE
        noted = {"encoder_origin": json.loads(origin.read_text())} if origin.is_file() else {}
        return {"conversations": len(data), "local": local, **noted}

    train_and_save(trainer, run, processor.save_pretrained, summary)
    if trainer.is_world_process_zero():
        leave_card(run.path)
    return run


def main(argv: Sequence[str] | None = None) -> RunDirectory:
    return train_vlm(*parse_recipe(argv, ModelArguments, DataArguments, RunArguments, prog="ssm-vlm train"))


if __name__ == "__main__":
    run_script(main)
