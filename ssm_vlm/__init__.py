"""ssm-vlm: which vision encoder should a vision-language model use?

Importing this package registers every model with the Transformers Auto classes and does nothing else.
"""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from .configuration.configuration_backbone_classifier import BackboneClassifierConfig
from .configuration.configuration_hidden_state_backbone import HiddenStateBackboneConfig
from .configuration.configuration_llava_style import LlavaStyleConfig
from .configuration.configuration_ssm_vision import SSMVisionConfig
from .configuration.named_encoders import ENCODERS, NamedEncoder, get_named_encoder
from .modeling.connectors import load_connector, model_downsampling, save_connector
from .modeling.encoder_loading import convert_encoder, image_processor_arguments, load_encoder
from .modeling.geometry import Geometry, make_geometry
from .modeling.image_processing_llava_style import LlavaStyleImageProcessor
from .modeling.modeling_backbone_classifier import BackboneForImageClassification
from .modeling.modeling_hidden_state_backbone import HiddenStateBackbone
from .modeling.modeling_llava_style import LlavaStyleForConditionalGeneration, LlavaStyleModel
from .modeling.modeling_ssm_vision import SSMVisionBackbone, SSMVisionForImageClassification, SSMVisionModel
from .modeling.processing_llava_style import LlavaStyleProcessor
from .modeling.token_grid import encoder_downsampling, grid_size, num_image_tokens

__version__ = "0.1.0"

AutoConfig.register("backbone_classifier", BackboneClassifierConfig, exist_ok=True)
AutoModelForImageClassification.register(BackboneClassifierConfig, BackboneForImageClassification, exist_ok=True)
AutoConfig.register("hidden_state_backbone", HiddenStateBackboneConfig, exist_ok=True)
AutoBackbone.register(HiddenStateBackboneConfig, HiddenStateBackbone, exist_ok=True)
AutoConfig.register("llava_style", LlavaStyleConfig, exist_ok=True)
AutoModel.register(LlavaStyleConfig, LlavaStyleModel, exist_ok=True)
AutoModelForImageTextToText.register(LlavaStyleConfig, LlavaStyleForConditionalGeneration, exist_ok=True)
AutoImageProcessor.register(
    LlavaStyleConfig,
    image_processor_classes={"pil": LlavaStyleImageProcessor, "torchvision": LlavaStyleImageProcessor},
    exist_ok=True,
)
AutoProcessor.register(LlavaStyleConfig, LlavaStyleProcessor, exist_ok=True)
AutoConfig.register("ssm_vision", SSMVisionConfig, exist_ok=True)
AutoModel.register(SSMVisionConfig, SSMVisionModel, exist_ok=True)
AutoBackbone.register(SSMVisionConfig, SSMVisionBackbone, exist_ok=True)
AutoModelForImageClassification.register(SSMVisionConfig, SSMVisionForImageClassification, exist_ok=True)

__all__ = [
    "ENCODERS",
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
    "NamedEncoder",
    "SSMVisionBackbone",
    "SSMVisionConfig",
    "SSMVisionForImageClassification",
    "SSMVisionModel",
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
