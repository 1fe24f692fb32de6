"""Small saved models, as a run or a conversion leaves them, for tests of cards and pushes."""

import json
from pathlib import Path

import torch
import yaml
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ssm_vlm import (
    LlavaStyleForConditionalGeneration,
    LlavaStyleImageProcessor,
    LlavaStyleProcessor,
    image_processor_arguments,
    load_encoder,
)
from ssm_vlm.modeling.chat_templates import VICUNA_TEMPLATE

ENCODER = "digit_vmamba.digitscenes_64"
RECIPE = {
    "vision_encoder": ENCODER,
    "language_model": "lmsys/vicuna-7b-v1.5",
    "data_path": "somewhere/llava_v1_5_mix665k.json",
    "freeze_vision": True,
    "freeze_connector": False,
    "freeze_language_model": False,
    "learning_rate": 2e-5,
    "max_steps": 5198,
}
RUN = {"steps": 5198, "seconds": 90.0, "batch": 128, "conversations": 665298, "versions": {"torch": "2.13.0"}}
SCORES = {
    "scores": {
        "vqa": {
            "task": "vqa",
            "metric": "vqa accuracy against ten answers",
            "num_items": 200,
            "score": 0.5,
            "kinds": {"count": {"num_items": 150, "score": 0.4}, "colour": {"num_items": 50, "score": 0.8}},
            "floors": {"constant_answer": 0.1, "blank_image": 0.2},
            "floor_source": "the scored items",
        },
        "grounding": {
            "task": "grounding",
            "metric": "share of boxes with an overlap (IoU) of at least 0.5",
            "num_items": 50,
            "score": 0.2,
            "kinds": {"cup": {"num_items": 50, "score": 0.2}},
            "floors": {"mean_box": 0.15},
            "floor_source": "the scored items",
            "box_frame": "centered_square",
            "iou_threshold": 0.5,
        },
    },
    "num_items": 250,
    "blank_images": False,
    "data": "Cups, test",
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, with `<image>`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    backend.train_from_iterator([], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=VICUNA_TEMPLATE,
    )


def save_vlm(folder: Path, *, recipe: dict | None = RECIPE, scores: dict | None = SCORES) -> Path:
    """A complete LLaVA-style model with random weights; recipe and scores are made up."""
    torch.manual_seed(0)
    encoder = load_encoder(ENCODER, pretrained=False)
    processor = LlavaStyleProcessor(LlavaStyleImageProcessor(**image_processor_arguments(ENCODER)), make_tokenizer())
    text = LlamaConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlavaStyleForConditionalGeneration.from_parts(
        encoder, LlamaForCausalLM(text), image_token_id=processor.image_token_id, tap_norm="layernorm"
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if recipe is not None:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        (folder / "finished.json").write_text(json.dumps(RUN))
    if scores is not None:
        (folder / "answers.scores.json").write_text(json.dumps(scores))
    (folder / "README.md").unlink(missing_ok=True)
    return folder


def save_encoder(folder: Path, name: str = ENCODER, **origin) -> Path:
    """A named encoder with random weights and its image processor; `origin` as a conversion notes it."""
    torch.manual_seed(0)
    load_encoder(name, pretrained=False).save_pretrained(folder)
    LlavaStyleImageProcessor(**image_processor_arguments(name)).save_pretrained(folder)
    if origin:
        (folder / "origin.json").write_text(json.dumps(origin))
    (folder / "README.md").unlink(missing_ok=True)
    return folder


def save_photo(folder: Path) -> str:
    """`photo.jpg` in a folder."""
    path = folder / "photo.jpg"
    Image.linear_gradient("L").resize((90, 60)).convert("RGB").save(path)
    return str(path)
