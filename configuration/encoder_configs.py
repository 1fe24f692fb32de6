"""How a config that holds the config of an encoder reads it: by `model_type`, this library's own encoders first.

Reading own encoders here, and not through the Auto classes, is what lets a saved model be loaded where this library is
not installed and nothing of it is registered.
"""

from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_hidden_state_backbone import HiddenStateBackboneConfig
from .configuration_mambavision import MambaVisionConfig
from .configuration_ssm_vision import SSMVisionConfig
from .configuration_tapped_timm import TappedTimmConfig
from .configuration_vit_adapter import VitAdapterConfig

OWN_ENCODER_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    config.model_type: config
    for config in (HiddenStateBackboneConfig, MambaVisionConfig, SSMVisionConfig, TappedTimmConfig, VitAdapterConfig)
}
"""`model_type` -> config of each Backbone of this library; its model is in `modeling.own_backbones`."""


class EncoderConfigSpec(SubConfigSpec):
    """The encoder among the sub-configs of a config: own or stock, from a config, its dict, or the default."""

    def get_config_class(self, model_type: str | None = None) -> type[PreTrainedConfig]:
        return OWN_ENCODER_CONFIGS.get(model_type or "") or super().get_config_class(model_type)

    def create_subconfig(self, key: str, subconfig: dict | PreTrainedConfig | None = None, **kwargs):
        # Under the name "backbone_config" Transformers would look among registered configs only.
        return super().create_subconfig("encoder", subconfig, **kwargs)


__all__ = ["OWN_ENCODER_CONFIGS", "EncoderConfigSpec"]
