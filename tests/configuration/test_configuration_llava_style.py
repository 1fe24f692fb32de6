"""LlavaStyleConfig: what it accepts, what it refuses, and that it survives a save."""

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, ConvNextConfig, LlamaConfig, ViTConfig

from ssm_vlm import LlavaStyleConfig, SSMVisionConfig


def test_round_trip_through_auto_config(tmp_path):
    config = LlavaStyleConfig(
        vision_config=ConvNextConfig(out_features=["stage3"]),
        text_config=LlamaConfig(hidden_size=32),
        connector="mlp3",
        connector_seed=7,
        tap_norm="layernorm",
        image_token_id=5,
        freeze_vision=False,
        vision_train_mode=True,
        box_frame="canvas",
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is LlavaStyleConfig
    ours, theirs = (
        {key: value for key, value in c.to_dict().items() if not key.startswith("_")} for c in (config, loaded)
    )
    assert theirs == ours
    assert theirs["connector_seed"] == 7 and theirs["box_frame"] == "canvas"
    assert loaded.vision_config.out_features == ["stage3"]


def test_sub_configs_may_be_dicts():
    config = LlavaStyleConfig(
        vision_config={"model_type": "swin", "out_features": ["stage2"], "embed_dim": 24},
        text_config={"model_type": "qwen2", "hidden_size": 48},
    )
    assert config.vision_config.embed_dim == 24
    assert config.get_text_config().hidden_size == 48


def test_defaults_are_the_ssm_encoder_and_llama():
    config = LlavaStyleConfig()
    assert isinstance(config.vision_config, SSMVisionConfig)
    assert config.text_config.model_type == "llama"
    assert (config.connector, config.tap_norm, config.freeze_vision) == ("mlp2", "none", True)


def test_a_config_without_backbone_is_refused():
    with pytest.raises(ValueError, match="'vit' config, which is not a Backbone config.*HiddenStateBackboneConfig"):
        LlavaStyleConfig(vision_config=ViTConfig())


@pytest.mark.parametrize(
    "wrong",
    [{"tap_norm": "rmsnorm"}, {"box_frame": "letterbox"}, {"freeze_vision": "yes"}, {"image_token_id": "<image>"}],
)
def test_wrong_values_name_the_field(wrong):
    with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(wrong))):
        LlavaStyleConfig(**wrong)


@pytest.mark.parametrize("tied", [True, False])
def test_tying_follows_the_language_model(tied):
    config = LlavaStyleConfig(text_config=LlamaConfig(tie_word_embeddings=tied), tie_word_embeddings=not tied)
    assert config.tie_word_embeddings is tied
