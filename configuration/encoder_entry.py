"""What one row of the table of named encoders holds."""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Preprocessing:
    """How pictures became pixels when the weights were made; it travels with them.

    Args:
        height: canvas height in pixels.
        width: canvas width in pixels.
        mean: per channel, of values in [0, 1].
        std: per channel, of values in [0, 1].
        interpolation: "bicubic", "bilinear" or "nearest".
        geometry: name of the geometry that lays a picture on the canvas. Classification weights take the letterbox of
            LLaVA's box labels, as the paper does, not the centre crop of their own evaluation.
    """

    height: int
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    geometry: str = "letterbox"


@dataclass(frozen=True)
class WeightSource:
    """Where published weights come from.

    Args:
        layout: how the file names its tensors: a name in `LAYOUTS` of `modeling.layouts`, or "transformers" for a
            model that is in Transformers' own format already.
        hub_id: Hugging Face repository that holds them as safetensors.
        url: a release file, to be downloaded by hand and given to `ssm-vlm convert`.
        sha256: checksum of that file in hexadecimal, or its beginning, where it is known; a file that has another is
            refused.
    """

    layout: str
    hub_id: str | None = None
    url: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class NamedEncoder:
    """One row of the table.

    Args:
        name: `variant.tag`.
        config: builds the Backbone config, tapped.
        preprocessing: what the weights expect.
        parameters: number of parameters that the tap depends on.
        flops: operations for one picture up to the tap (multiply and add are two).
        licence: SPDX identifier of the weights' licence.
        weights: where they come from; None for encoders that this project trains.
        imagenet_top1: percent at 224 pixels of the whole published model, with its head.
        loaded_from_real_file: whether the published file itself was ever loaded by this code. Where it is False, the
            conversion is tested on random weights of the reference implementation only.
    """

    name: str
    config: Callable[[], PreTrainedConfig]
    preprocessing: Preprocessing
    parameters: int
    flops: int
    licence: str
    weights: WeightSource | None = None
    imagenet_top1: float | None = None
    loaded_from_real_file: bool = False


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of ImageNet's channels. The detection and segmentation releases use the same ones, on a
0-255 scale."""

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Mean and standard deviation that map [0, 1] to [-1, 1]."""

IN1K_224 = Preprocessing(224, 224, *IMAGENET)

__all__ = ["HALF", "IMAGENET", "IN1K_224", "NamedEncoder", "Preprocessing", "WeightSource"]
