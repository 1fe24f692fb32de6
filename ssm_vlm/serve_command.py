"""`ssm-vlm serve`: `transformers serve`, which then knows the models of this library."""

from collections.abc import Sequence

import transformers
from transformers.models.auto import modeling_auto

from .configuration.configuration_llava_style import LlavaStyleConfig
from .modeling.modeling_llava_style import LlavaStyleForConditionalGeneration

_MODEL_CLASS = LlavaStyleForConditionalGeneration.__name__


def _make_known() -> None:
    """The server looks a model's class up in the package `transformers` and its kind in a table of class names."""
    setattr(transformers, _MODEL_CLASS, LlavaStyleForConditionalGeneration)
    model_type = LlavaStyleConfig.model_type
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type] = _MODEL_CLASS


def main(argv: Sequence[str] | None = None) -> None:
    """Serves models over an HTTP API like OpenAI's; all arguments are those of `transformers serve`.

    Raises:
        ValueError: the packages that serving needs are not installed.
    """
    try:
        from transformers.cli.transformers import app
    except ImportError as error:
        raise ValueError(f"Serving needs more packages: pip install 'ssm-vlm[serving]' ({error}).") from error
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ValueError("Serving needs more packages: pip install 'ssm-vlm[serving]'.")
    _make_known()
    app(args=["serve", *(argv or [])], prog_name="ssm-vlm")
