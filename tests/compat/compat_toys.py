"""What the tests of other people's tools share: a toy processor, toy configs and conversations."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from ssm_vlm import (
    LlavaStyleImageProcessor,
    LlavaStyleProcessor,
    SSMVisionConfig,
    encoder_downsampling,
)

LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def vision_config() -> SSMVisionConfig:
    return SSMVisionConfig(hidden_sizes=[8, 8, 16], depths=[1, 1, 1], out_features=["stage3"], output_norm="layernorm")


def make_processor(**settings) -> LlavaStyleProcessor:
    """Canvas 32x48 and so 2 x 3 image tokens; a byte-level tokenizer."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["USER: what colour is it? ASSISTANT: red"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    image_processor = LlavaStyleImageProcessor(
        size={"height": 32, "width": 48},
        geometry="resize",
        downsampling=encoder_downsampling(vision_config()),
        **settings,
    )
    return LlavaStyleProcessor(image_processor, tokenizer)


def text_config(processor) -> LlamaConfig:
    tokenizer = processor.tokenizer
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def make_telling(model):
    """Larger random weights: what is generated depends on the picture."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed_tokens" not in name:
                parameter.mul_(6)
    return model.eval()


def question(picture, text="what colour is it?") -> list[dict]:
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]


def conversation(picture, answer: str) -> list[dict]:
    return question(picture) + [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def encode(processor, conversations, **options):
    return processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
        **options,
    )
