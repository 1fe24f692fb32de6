"""Any timm model, cut after its tap, behind the Backbone contract.

Transformers' own `TimmBackbone` imports timm with this library, and can neither be saved and loaded, nor be told the
arguments of a model; what is here takes its place.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput
from transformers.utils import is_timm_available
from transformers.utils.generic import can_return_tuple

from ..configuration.configuration_tapped_timm import TappedTimmConfig


class TappedTimmBackbone(BackboneMixin, PreTrainedModel):
    """A timm model with the arguments, the stage names and the sizes that its config holds.

    Stages after the tap are not kept. Feature maps are un-normed, but for those of a plain model whose config says
    `apply_final_norm`.

    Raises:
        ImportError: where timm is not installed.
        ValueError: where timm's model is not the one that the config describes.
    """

    config: TappedTimmConfig
    base_model_prefix = "timm_model"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    _no_split_modules = ["TappedTimmBackbone"]
    _supports_sdpa = True  # timm calls it by itself

    def __init__(self, config: TappedTimmConfig):
        if not is_timm_available():
            raise ImportError(f"{config.backbone} is a timm model: run `pip install ssm-vlm[timm]`.")
        super().__init__(config)
        self.timm_model = _create(config)
        # timm's name of the order that Swin, MambaOut and some more give: [B, h, w, C]
        self.channels_last = str(getattr(self.timm_model, "output_fmt", "")).endswith("NHWC")
        self.num_features = config.stage_channels
        built = [stage["num_chs"] for stage in self.timm_model.feature_info.info]
        if built != self.num_features[: len(built)]:  # a cut timm model may forget the stages after its tap
            raise ValueError(
                f"timm's {config.backbone} has stages of {built} channels, the config says {self.num_features}."
            )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """timm has filled its own parameters; what no file holds is filled here, after a model without memory."""
        fill = getattr(module, "init_non_persistent_buffers", None)
        if fill is not None:
            fill()

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
        feature_maps = tuple(self.timm_model(pixel_values))
        if self.channels_last:
            feature_maps = tuple(feature_map.permute(0, 3, 1, 2).contiguous() for feature_map in feature_maps)
        return BackboneOutput(
            feature_maps=feature_maps, hidden_states=feature_maps if output_hidden_states else None, attentions=None
        )


def _create(config: TappedTimmConfig) -> Any:
    """timm's model, an `nn.Module`."""
    if is_timm_available():  # so guarded, saved code is loaded where timm is absent
        import timm
        from timm.models._features import FeatureGetterNet
    # timm compares some sizes with tuples, which JSON has not
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in config.model_args.items()}
    if config.apply_final_norm:
        arguments["feature_cls"] = partial(FeatureGetterNet, norm=True)
    return timm.create_model(
        config.backbone,
        features_only=True,
        in_chans=config.num_channels,
        out_indices=tuple(config.out_indices),
        **arguments,
    )


__all__ = ["TappedTimmBackbone"]
