"""Configuration of an image classifier on the tap of any encoder."""

from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .encoder_configs import EncoderConfigSpec


@strict
class BackboneClassifierConfig(PreTrainedConfig):
    """An encoder with the same head whatever the encoder: LayerNorm, pooling over positions, one linear layer.

    Args:
        backbone_config: Config (or its dict with `model_type`) of any registered Backbone; its last `out_features`
            entry is the tap that the head reads.
        pooling: "mean" or "max" over the positions of the normed tap. Max lets a small object decide the class, where
            a mean would dilute it with background.
        label_groups: Sizes of consecutive groups of labels of which each picture has one, such as [6, 10] for six
            colours and ten digits; None for one group of all labels, the usual classification.
    """

    model_type = "backbone_classifier"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "backbone_config": EncoderConfigSpec(AutoConfig, model_type="ssm_vision"),
    }

    backbone_config: dict | PreTrainedConfig | None = None
    pooling: Literal["mean", "max"] = "mean"
    label_groups: list[int] | None = None

    def __post_init__(self, **kwargs):
        kwargs.setdefault("attn_implementation", {})  # keeps that of an encoder which is already built
        super().__post_init__(**kwargs)
        if self.label_groups is not None and sum(self.label_groups) != self.num_labels:
            raise ValueError(f"label_groups {self.label_groups} must add up to the {self.num_labels} labels.")
