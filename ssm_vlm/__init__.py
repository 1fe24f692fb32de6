"""ssm-vlm: which vision encoder should a vision-language model use?

Importing this package registers every model with the Transformers Auto classes and does nothing else.
"""

from transformers import AutoBackbone, AutoConfig

from .configuration.configuration_hidden_state_backbone import HiddenStateBackboneConfig
from .modeling.modeling_hidden_state_backbone import HiddenStateBackbone
from .modeling.token_grid import encoder_downsampling, grid_size, num_image_tokens

__version__ = "0.1.0"

AutoConfig.register("hidden_state_backbone", HiddenStateBackboneConfig, exist_ok=True)
AutoBackbone.register(HiddenStateBackboneConfig, HiddenStateBackbone, exist_ok=True)

__all__ = [
    "HiddenStateBackbone",
    "HiddenStateBackboneConfig",
    "encoder_downsampling",
    "grid_size",
    "num_image_tokens",
]
