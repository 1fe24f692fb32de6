"""Configuration of a timm model cut after its tap: all that the library asks of an encoder, known without timm."""

from dataclasses import field
from math import prod
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin


@strict
class TappedTimmConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    A timm model and its tap. Transformers' `TimmBackboneConfig` names the model only; this one also holds what timm
    would have to be asked for, so that tables, token counts and processors need no timm, and a saved folder no network.

    Args:
        backbone (`str`): timm's name of the architecture, without the tag of its weights.
        num_channels (`int`): colour channels of the input.
        model_args (`dict`): further arguments of `timm.create_model`; none for a published architecture.
        stage_names (`list[str]`): one name per feature map that timm offers, shallow to deep: "stem", "stage1", ... of
            a hierarchical model, "block1", ... of a plain one.
        stage_channels (`list[int]`): the width of each.
        stage_downsampling (`list`): the step `[stride, "ceil" | "floor"]` that leads to each from the one before.
        grid_multiple (`int`, *optional*): rows and columns at the tap must be multiples of it, since attention windows
            have a fixed size.
        only_size (`list[int]`, *optional*): the one height and width, in pixels, that the model takes.
        apply_final_norm (`bool`): whether a plain model's final norm is applied to its feature maps.
        out_features, out_indices: which stages are returned; the last is the tap, and nothing after it is built. The
            last stage by default.

    Raises:
        ValueError: lists of different lengths, or a tap that is not a stage.
    """

    model_type = "tapped_timm"

    backbone: str = ""
    num_channels: int = 3
    model_args: dict[str, Any] = field(default_factory=dict)
    stage_names: list[str] = field(default_factory=list)
    stage_channels: list[int] = field(default_factory=list)
    stage_downsampling: list = field(default_factory=list)
    grid_multiple: int | None = None
    only_size: list[int] | None = None
    apply_final_norm: bool = False
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None
    if TYPE_CHECKING:  # BackboneConfigMixin takes it by keyword too
        out_features: list[str] = []

    def __post_init__(self, **kwargs):
        self.model_args = dict(self.model_args)
        self.stage_names = list(self.stage_names or ["stage1"])
        self.stage_channels = list(self.stage_channels or [1] * len(self.stage_names))
        self.stage_downsampling = [
            list(step) for step in self.stage_downsampling or [[1, "floor"]] * len(self.stage_names)
        ]
        lengths = {len(self.stage_names), len(self.stage_channels), len(self.stage_downsampling)}
        if len(lengths) > 1:
            raise ValueError(
                f"{self.backbone} needs one width and one step of downsampling for each of its {len(self.stage_names)} "
                f"stages, got {len(self.stage_channels)} widths and {len(self.stage_downsampling)} steps."
            )
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Width at the tap."""
        return self.stage_channels[self.out_indices[-1]]

    @property
    def downsampling(self) -> list:
        """Steps from pixels to the tap."""
        return [step for step in self.stage_downsampling[: self.out_indices[-1] + 1] if step[0] > 1]

    @property
    def canvas_multiple(self) -> int | None:
        """What height and width of a canvas must be multiples of, in pixels; None where any will do."""
        return self.grid_multiple and self.grid_multiple * prod(stride for stride, _ in self.downsampling)


__all__ = ["TappedTimmConfig"]
