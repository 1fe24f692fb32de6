"""ssm-vlm: which vision encoder should a vision-language model use?

Importing this package registers every model with the Transformers Auto classes and does nothing else.
"""

import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, PreTrainedConfig, PreTrainedModel

from .configuration.configuration_backbone_classifier import BackboneClassifierConfig
from .configuration.configuration_hidden_state_backbone import HiddenStateBackboneConfig
from .configuration.configuration_llava_style import LlavaStyleConfig
from .configuration.configuration_mambavision import MambaVisionConfig
from .configuration.configuration_ssm_vision import SSMVisionConfig
from .configuration.configuration_tapped_timm import TappedTimmConfig
from .configuration.configuration_vit_adapter import VitAdapterConfig
from .configuration.named_encoders import ENCODERS, NamedEncoder, get_named_encoder
from .modeling.connectors import load_connector, model_downsampling, save_connector
from .modeling.encoder_conversion import convert_encoder
from .modeling.encoder_loading import load_encoder
from .modeling.encoder_preprocessing import image_processor_arguments
from .modeling.geometry import Geometry, make_geometry
from .modeling.image_processing_llava_style import LlavaStyleImageProcessor
from .modeling.inference import compile_for_inference
from .modeling.model_card import refresh_card, save_with_card
from .modeling.modeling_backbone_classifier import BackboneForImageClassification
from .modeling.modeling_hidden_state_backbone import HiddenStateBackbone
from .modeling.modeling_llava_style import LlavaStyleForConditionalGeneration, LlavaStyleModel
from .modeling.modeling_mambavision import MambaVisionBackbone, MambaVisionForImageClassification, MambaVisionModel
from .modeling.modeling_ssm_vision import SSMVisionBackbone, SSMVisionForImageClassification, SSMVisionModel
from .modeling.modeling_tapped_timm import TappedTimmBackbone
from .modeling.modeling_vit_adapter import VitAdapterBackbone, VitAdapterModel
from .modeling.processing_llava_style import LlavaStyleProcessor
from .modeling.remote_code import save_with_code
from .modeling.token_grid import encoder_downsampling, grid_size, num_image_tokens

__version__ = "0.1.0"

MODELS: dict[type[PreTrainedConfig], dict[str, type[PreTrainedModel]]] = {
    BackboneClassifierConfig: {"AutoModelForImageClassification": BackboneForImageClassification},
    HiddenStateBackboneConfig: {"AutoModel": HiddenStateBackbone, "AutoBackbone": HiddenStateBackbone},
    LlavaStyleConfig: {
        "AutoModel": LlavaStyleModel,
        "AutoModelForImageTextToText": LlavaStyleForConditionalGeneration,
    },
    MambaVisionConfig: {
        "AutoModel": MambaVisionModel,
        "AutoBackbone": MambaVisionBackbone,
        "AutoModelForImageClassification": MambaVisionForImageClassification,
    },
    SSMVisionConfig: {
        "AutoModel": SSMVisionModel,
        "AutoBackbone": SSMVisionBackbone,
        "AutoModelForImageClassification": SSMVisionForImageClassification,
    },
    TappedTimmConfig: {"AutoModel": TappedTimmBackbone, "AutoBackbone": TappedTimmBackbone},
    VitAdapterConfig: {"AutoModel": VitAdapterModel, "AutoBackbone": VitAdapterBackbone},
}
"""Config of each family of models -> Auto class -> model: registered here, and found through it in saved folders."""

for config_class, models in MODELS.items():
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto_class, model in models.items():
        getattr(transformers, auto_class).register(config_class, model, exist_ok=True)
        save_with_card(model)
    save_with_code(config_class, {"AutoConfig": config_class, **models})
AutoImageProcessor.register(
    LlavaStyleConfig,
    image_processor_classes={"pil": LlavaStyleImageProcessor, "torchvision": LlavaStyleImageProcessor},
    exist_ok=True,
)
AutoProcessor.register(LlavaStyleConfig, LlavaStyleProcessor, exist_ok=True)
save_with_code(LlavaStyleImageProcessor, {"AutoImageProcessor": LlavaStyleImageProcessor})
save_with_code(LlavaStyleProcessor, {"AutoProcessor": LlavaStyleProcessor})
refresh_card(LlavaStyleImageProcessor)
refresh_card(LlavaStyleProcessor)

__all__ = [
    "ENCODERS",
    "MODELS",
    "BackboneClassifierConfig",
    "BackboneForImageClassification",
    "Geometry",
    "HiddenStateBackbone",
    "HiddenStateBackboneConfig",
    "LlavaStyleConfig",
    "LlavaStyleForConditionalGeneration",
    "LlavaStyleImageProcessor",
    "LlavaStyleModel",
    "LlavaStyleProcessor",
    "MambaVisionBackbone",
    "MambaVisionConfig",
    "MambaVisionForImageClassification",
    "MambaVisionModel",
    "NamedEncoder",
    "SSMVisionBackbone",
    "SSMVisionConfig",
    "SSMVisionForImageClassification",
    "SSMVisionModel",
    "TappedTimmBackbone",
    "TappedTimmConfig",
    "VitAdapterBackbone",
    "VitAdapterConfig",
    "VitAdapterModel",
    "compile_for_inference",
    "convert_encoder",
    "encoder_downsampling",
    "get_named_encoder",
    "grid_size",
    "image_processor_arguments",
    "load_connector",
    "load_encoder",
    "make_geometry",
    "model_downsampling",
    "num_image_tokens",
    "save_connector",
]
