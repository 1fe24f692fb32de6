"""Toys that the tests of saved code save: every model class of this library, and complete VLMs over several towers."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import is_timm_available

import ssm_vlm

SSM = {"hidden_sizes": [4, 8], "depths": [1, 2], "mixer": ["ss2d", "window_attention"], "head_dim": 4, "num_labels": 3}
VIT = {
    "model_type": "vit", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1,
    "patch_size": 8, "image_size": 32,
}  # fmt: skip
SWIN = {
    "model_type": "swin", "embed_dim": 4, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2,
    "out_features": ["stage2"], "image_size": 32,
}  # fmt: skip
LLAMA = LlamaConfig(
    vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=2,
)  # fmt: skip
IMAGE_TOKEN = 3


def tower(name: str) -> PreTrainedConfig:
    fields = {"ssm_vision": {"model_type": "ssm_vision", **SSM}, "swin": SWIN}
    fields["hidden_state_backbone"] = {"model_type": "hidden_state_backbone", "vision_config": VIT}
    return AutoConfig.for_model(**fields[name])


CONFIGS: dict[type[PreTrainedConfig], Callable[[], PreTrainedConfig]] = {
    ssm_vlm.BackboneClassifierConfig: lambda: ssm_vlm.BackboneClassifierConfig(
        backbone_config=tower("ssm_vision"), num_labels=3, pooling="max"
    ),
    ssm_vlm.HiddenStateBackboneConfig: lambda: tower("hidden_state_backbone"),
    ssm_vlm.LlavaStyleConfig: lambda: vlm_config("ssm_vision"),
    ssm_vlm.MambaVisionConfig: lambda: ssm_vlm.MambaVisionConfig(
        hidden_sizes=[4, 4, 8, 8], depths=[1, 1, 2, 2], stem_width=2, num_attention_heads=[2, 2], window_sizes=[3, 2],
        layer_scale=0.5, num_labels=3,
    ),
    ssm_vlm.SSMVisionConfig: lambda: tower("ssm_vision"),
    ssm_vlm.TappedTimmConfig: lambda: ssm_vlm.TappedTimmConfig(
        backbone="resnet10t", stage_names=["stem", "stage1", "stage2", "stage3", "stage4"], out_features=["stage1"],
        stage_channels=[64, 64, 128, 256, 512], stage_downsampling=[[2, "ceil"]] * 5,
    ),
    ssm_vlm.VitAdapterConfig: lambda: ssm_vlm.VitAdapterConfig(
        hidden_size=8, num_hidden_layers=4, num_attention_heads=2, conv_inner_size=2, deform_num_heads=2,
        pretrain_image_size=32, injector_init_value=0.5, out_features=["stage2", "stage4"],
    ),
}  # fmt: skip
"""A new family of models adds one small config; every class that `ssm_vlm.MODELS` lists for it is then tested."""
NEEDS_TIMM = {"TappedTimmBackbone"}


def vlm_config(encoder: str, **fields) -> PreTrainedConfig:
    settings = {"image_token_id": IMAGE_TOKEN, "tap_norm": "layernorm", "token_positions": "sincos2d", **fields}
    return ssm_vlm.LlavaStyleConfig(vision_config=tower(encoder), text_config=LLAMA, **settings)


class Toy(NamedTuple):
    """A model class, its toy config, and the Auto class that finds it."""

    model_class: type[PreTrainedModel]
    config: Callable[[], PreTrainedConfig]
    auto_class: str

    def build(self) -> PreTrainedModel:
        torch.manual_seed(0)
        model = self.model_class(self.config())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.3)
        return model.eval()


TOYS: dict[str, Toy] = {}
for _config_class, _models in ssm_vlm.MODELS.items():
    for _auto_class, _model_class in _models.items():
        TOYS.setdefault(_model_class.__name__, Toy(_model_class, CONFIGS.get(_config_class), _auto_class))
VLM = ssm_vlm.LlavaStyleForConditionalGeneration
for _encoder in ("hidden_state_backbone", "swin"):
    TOYS[f"{VLM.__name__} over {_encoder}"] = Toy(
        VLM, lambda encoder=_encoder: vlm_config(encoder), "AutoModelForImageTextToText"
    )


def cases() -> list:
    """Names of the toys as parameters of a test, those that need timm marked so."""
    timm = [pytest.mark.timm, pytest.mark.skipif(not is_timm_available(), reason="timm is not installed")]
    return [pytest.param(name, marks=timm if name in NEEDS_TIMM else []) for name in TOYS]


def processor(config: PreTrainedConfig) -> ssm_vlm.LlavaStyleProcessor:
    """For a model of this config: 32x48 canvases, a token for every byte."""
    special = ["<s>", "</s>", "<pad>", "<image>"]
    tokens = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    image_processor = ssm_vlm.LlavaStyleImageProcessor(
        geometry="letterbox_corner",
        size={"height": 32, "width": 48},
        downsampling=ssm_vlm.encoder_downsampling(config.vision_config),
    )
    return ssm_vlm.LlavaStyleProcessor(image_processor, tokenizer)


def conversation() -> list[dict]:
    picture = Image.linear_gradient("L").resize((60, 30)).convert("RGB")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]
    return [{"role": "user", "content": content}]
