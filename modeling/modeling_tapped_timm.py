"""Any timm model, cut after its tap: Transformers' `TimmBackbone` that can be saved, reloaded and refuse a canvas."""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TimmBackbone
from transformers.modeling_outputs import BackboneOutput
from transformers.utils import is_timm_available
from transformers.utils.generic import can_return_tuple

from ..configuration.configuration_tapped_timm import TappedTimmConfig


def _channels_first(module: nn.Module, args: tuple, feature_maps: list[torch.Tensor]) -> list[torch.Tensor]:
    """Hook of a timm model whose feature maps are [B, h, w, C]."""
    return [feature_map.permute(0, 3, 1, 2).contiguous() for feature_map in feature_maps]


class TappedTimmBackbone(TimmBackbone):
    """A timm model as Transformers wraps it, with the arguments, the stage names and the sizes that its config holds.

    Stages after the tap are not kept. Feature maps are un-normed, but for those of a plain model whose config says
    `apply_final_norm`.

    Raises:
        ImportError: where timm is not installed.
        ValueError: where timm's model is not the one that the config describes.
    """

    config: TappedTimmConfig

    def __init__(self, config: TappedTimmConfig):
        if not is_timm_available():
            raise ImportError(f"{config.backbone} is a timm model: run `pip install ssm-vlm[timm]`.")
        # timm reads lists of the JSON as it reads tuples, but for sizes that it compares
        arguments = {
            key: tuple(value) if isinstance(value, list) else value for key, value in config.model_args.items()
        }
        if config.apply_final_norm and is_timm_available():  # asked again, or saved code would need timm to be loaded
            from timm.models._features import FeatureGetterNet

            arguments["feature_cls"] = partial(FeatureGetterNet, norm=True)
        super().__init__(config, **arguments)

    def _init_timm_backbone(self, backbone: nn.Module) -> None:
        """Called by the stock constructor: takes the stages from the config, held against what timm built."""
        if str(getattr(backbone, "output_fmt", "NCHW")).endswith("NHWC"):  # Swin, MambaOut, ...
            # a hook, since detectors take timm's model out of this class
            backbone.register_forward_hook(_channels_first)
        self.stage_names, self.num_features = self.config.stage_names, self.config.stage_channels
        built = [stage["num_chs"] for stage in backbone.feature_info.info]
        # a pruned timm model forgets the stages after its tap
        if built != self.num_features[: len(built)]:
            raise ValueError(
                f"timm's {self.config.backbone} has stages of {built} channels, the config says {self.num_features}."
            )

    # The stock method takes timm's names only and asks timm's Hub; a saved folder is read as any other model's.
    from_pretrained = classmethod(PreTrainedModel.from_pretrained.__func__)

    def _check_canvas(self, height: int, width: int) -> None:
        config = self.config
        multiple, only = config.canvas_multiple, config.only_size
        if multiple and (height % multiple or width % multiple):
            raise ValueError(
                f"{config.backbone}, tapped at {config.out_features[-1]}, takes canvases whose height and width are "
                f"multiples of {multiple} pixels, got {height}x{width}."
            )
        if only and [height, width] != only:
            raise ValueError(f"{config.backbone} takes canvases of {only[0]}x{only[1]} pixels, got {height}x{width}.")

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool | None = None, **_: Any) -> BackboneOutput:
        """Computes the feature maps named by `config.out_features`.

        Args:
            pixel_values: [B, 3, H, W].
            output_hidden_states: return the same feature maps as hidden states too; timm has no others to give.

        Returns:
            `BackboneOutput` with `feature_maps`, each [B, C, h, w].

        Raises:
            ValueError: for a canvas that the model does not take; the sentence names those that it does.
        """
        self._check_canvas(*pixel_values.shape[-2:])
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        feature_maps = tuple(self._backbone(pixel_values))
        return BackboneOutput(
            feature_maps=feature_maps, hidden_states=feature_maps if output_hidden_states else None, attentions=None
        )


__all__ = ["TappedTimmBackbone"]
