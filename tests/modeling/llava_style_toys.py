"""Toy encoders and language models for the tests of the LLaVA-style model."""

import torch
from transformers import AutoConfig

from ssm_vlm import LlavaStyleConfig, LlavaStyleForConditionalGeneration

IMAGE = 40  # image token; the language models below know ids 0 to 39
SIZE = 16  # pixels per side of the square pictures: every encoder below has stride 8 at its tap, so 4 tokens

VISION = {
    "ssm_vision": {"hidden_sizes": [4, 8], "depths": [1, 1], "drop_path_rate": 0.9},
    "convnext": {
        "hidden_sizes": [4, 8],
        "depths": [1, 1],
        "num_stages": 2,
        "out_features": ["stage2"],
        "image_size": SIZE,
        "drop_path_rate": 0.9,
    },
    "swin": {
        "embed_dim": 4,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "window_size": 2,
        "out_features": ["stage2"],
        "image_size": SIZE,
    },
    "resnet": {
        "embedding_size": 4,
        "hidden_sizes": [4, 8],
        "depths": [1, 1],
        "layer_type": "basic",
        "out_features": ["stage2"],
    },
    "dinov2": {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "patch_size": 8,
        "image_size": SIZE,
        "out_features": ["stage1"],
    },
    "hidden_state_backbone": {
        "vision_config": {
            "model_type": "vit",
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "patch_size": 8,
            "image_size": SIZE,
        }
    },
}
TEXT = {
    "llama": {"num_key_value_heads": 1},
    "llama-tied": {"tie_word_embeddings": True},
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 8},
    "mistral": {"num_key_value_heads": 1},
    "phi": {},
    "gemma2": {"num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 0.05},
    "granite": {"logits_scaling": 7.0},
    "gpt_neox": {},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "opt": {"ffn_dim": 16, "word_embed_proj_dim": 16},
    "bloom": {"n_layer": 2, "n_head": 2},
    "mixtral": {"num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1},
}
TEXT_COMMON = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def vision_config(name: str, **changes):
    return AutoConfig.for_model(name, **{**VISION[name], **changes})


def text_config(name: str, **changes):
    own = {"gpt2": {"hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"}}
    common = {k: v for k, v in TEXT_COMMON.items() if k not in own.get(name, ())}
    return AutoConfig.for_model(name.split("-")[0], **{**common, **TEXT[name], **changes})


def build(vision="convnext", text="llama", seed=0, **fields) -> LlavaStyleForConditionalGeneration:
    """A tiny model with weights large enough that outputs really depend on the images."""
    torch.manual_seed(seed)
    vision = vision_config(vision) if isinstance(vision, str) else vision
    text = text_config(text) if isinstance(text, str) else text
    config = LlavaStyleConfig(vision_config=vision, text_config=text, **{"image_token_id": IMAGE, **fields})
    model = LlavaStyleForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model.eval()


def row(*parts: int | str) -> list[int]:
    """Token ids; "image" stands for the four tokens of a 16x16 picture, "wide" for the eight of a 16x32 one."""
    lengths = {"image": 4, "wide": 8}
    return [t for part in parts for t in ([IMAGE] * lengths[part] if isinstance(part, str) else [part])]


def batch(*rows: list[int], side="right") -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels of rows padded to one length with 0."""
    longest = max(map(len, rows))
    pads = [[0] * (longest - len(r)) for r in rows]
    ids = torch.tensor([r + p if side == "right" else p + r for r, p in zip(rows, pads, strict=True)])
    mask = torch.tensor(
        [[1] * len(r) + p if side == "right" else p + [1] * len(r) for r, p in zip(rows, pads, strict=True)]
    )
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill((ids == IMAGE) | (mask == 0), -100)}


def pictures(*sizes: tuple[int, int], seed=0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, h, w, generator=generator) for h, w in sizes]


def padded(images: list[torch.Tensor], fill=9.0) -> dict[str, torch.Tensor]:
    """Images in one tensor, padded at the bottom and right with a value that would show if it were ever used."""
    height, width = max(i.shape[1] for i in images), max(i.shape[2] for i in images)
    pixels = torch.full((len(images), 3, height, width), fill)
    for canvas, image in zip(pixels, images, strict=True):
        canvas[:, : image.shape[1], : image.shape[2]] = image
    return {"pixel_values": pixels, "image_sizes": torch.tensor([i.shape[1:] for i in images])}


def learn(model: LlavaStyleForConditionalGeneration) -> LlavaStyleForConditionalGeneration:
    """The model in training mode with the gradients of one batch."""
    model.train()
    pixels = torch.stack(pictures((SIZE, SIZE), (SIZE, SIZE)))
    model(pixel_values=pixels, **batch(row(1, "image", 4), row(1, "image", 5))).loss.backward()
    return model
