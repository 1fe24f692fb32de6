"""From the config of any encoder to its Backbone, this library's own first, whether or not they are registered."""

from transformers import AutoBackbone, PreTrainedConfig, PreTrainedModel

from .modeling_hidden_state_backbone import HiddenStateBackbone
from .modeling_mambavision import MambaVisionBackbone
from .modeling_ssm_vision import SSMVisionBackbone
from .modeling_tapped_timm import TappedTimmBackbone
from .modeling_vit_adapter import VitAdapterBackbone

OWN_BACKBONES: dict[str, type[PreTrainedModel]] = {
    backbone.config_class.model_type: backbone  # type: ignore[union-attr]  # Transformers sets it from `config`
    for backbone in (
        HiddenStateBackbone,
        MambaVisionBackbone,
        SSMVisionBackbone,
        TappedTimmBackbone,
        VitAdapterBackbone,
    )
}
"""`model_type` -> each Backbone of this library; its config is in `configuration.encoder_configs`."""


def build_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """A Backbone with random weights: of this library by `model_type`, else of Transformers.

    Models that contain an encoder build it here and not with `AutoBackbone`, so that one that was loaded as remote code
    is made of remote code throughout, even beside this library.
    """
    own = OWN_BACKBONES.get(config.model_type)
    return AutoBackbone.from_config(config) if own is None else own._from_config(config)


TAP_NORMS = "hidden_states_norms."
"""Norms that Transformers' backbones put behind a tap, by the beginning of their names."""

IDLE_NORM = "swin.layernorm."
"""Behind the last stage that a Swin has: behind another one when its later stages are cut. No feature map passes it."""


def freeze_neutral_norms(backbone: PreTrainedModel) -> PreTrainedModel:
    """A tap norm that the config calls parameter-free is not trained: it has no parameters, so to speak.

    `from_pretrained` makes every loaded parameter trainable, so whoever contains a Backbone calls this in `train()`.
    """
    is_parameter_free = getattr(backbone.config, "output_norm", None) == "parameter_free"
    neutral = (TAP_NORMS, IDLE_NORM) if is_parameter_free else (IDLE_NORM,)
    for name, parameter in backbone.named_parameters():
        if name.startswith(neutral):
            parameter.requires_grad_(False)
    return backbone


__all__ = ["IDLE_NORM", "OWN_BACKBONES", "TAP_NORMS", "build_backbone", "freeze_neutral_norms"]
