"""Configuration of the LLaVA-style vision-language model: an encoder, a connector and a language model."""

from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .encoder_configs import EncoderConfigSpec


@strict
class LlavaStyleConfig(PreTrainedConfig):
    """What a LLaVA-style model is: which encoder, which connector, which language model, and how they meet.

    Args:
        vision_config: Config (or its dict with `model_type`) of any registered Transformers Backbone. Its last
            `out_features` entry is the tap.
        text_config: Config (or its dict with `model_type`) of any causal language model.
        connector: Name in `ssm_vlm.modeling.connectors.CONNECTORS`: "linear", "mlp2" (the paper's 2-MLP), "mlp3", or
            these with "average_pool_" or "pixel_shuffle_" in front, which makes fewer tokens first.
        connector_seed: Seed of the connector's own random generator. None means the width of the tap, the rule of the
            paper's code, so that two runs on the same encoder start from the same connector.
        connector_grid: [rows, columns] that "average_pool_..." pools a larger map to; None means [14, 14].
        connector_factor: "pixel_shuffle_..." puts so many rows and so many columns into one token; None means 2.
        tap_norm: "layernorm" puts a LayerNorm without parameters over the channels of the tap, "none" leaves it raw.
        token_positions: "sincos2d" adds fixed codes of each token's row and column to the features after the tap norm,
            alike for every encoder; "none", as in the paper, leaves the place of a token to the language model's own
            order of tokens and to what an encoder lets through of it.
        image_token_id: Id of the token that stands for one image feature in `input_ids`. It may lie outside the
            language model's vocabulary, since its embedding is never looked up. None allows text only.
        freeze_vision: Run the encoder under `no_grad` and in `eval()` mode.
        vision_train_mode: Let a frozen encoder follow `train()`, with DropPath active and BatchNorm on batch
            statistics, as the paper's code does. Has no effect on an encoder that is not frozen.
        box_frame: The frame of the boxes in the text that the model was trained on.
        tie_word_embeddings: Follows `text_config`, which decides.
    """

    model_type = "llava_style"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "image_hidden_states"]
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "vision_config": EncoderConfigSpec(AutoConfig, model_type="ssm_vision"),
        "text_config": SubConfigSpec(AutoConfig, model_type="llama"),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    connector: str = "mlp2"
    connector_seed: int | None = None
    connector_grid: list[int] | None = None
    connector_factor: int | None = None
    tap_norm: Literal["none", "layernorm"] = "none"
    token_positions: Literal["none", "sincos2d"] = "none"
    image_token_id: int | None = None
    freeze_vision: bool = True
    vision_train_mode: bool = False
    box_frame: Literal["centered_square", "canvas", "raw"] = "centered_square"
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        # An empty choice for each part: without it the parts' own are reset to None, and a language model that was
        # already built would go on with eager attention and no causal mask.
        kwargs.setdefault("attn_implementation", {})
        kwargs.setdefault("experts_implementation", {})
        super().__post_init__(**kwargs)
        if not hasattr(self.vision_config, "out_features"):
            raise ValueError(
                f"vision_config is a '{self.vision_config.model_type}' config, which is not a Backbone config: "
                "give a Backbone (ssm_vision, swin, convnext, dinov2, ...), or wrap a model that only has hidden "
                "states with HiddenStateBackboneConfig(vision_config=...)."
            )
        self.tie_word_embeddings = bool(getattr(self.text_config.get_text_config(), "tie_word_embeddings", False))
