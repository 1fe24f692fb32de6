"""One adapter that gives every plain vision transformer the Backbone contract: [B, C, H, W] at the tap."""

import copy

import torch
import transformers
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput
from transformers.utils.generic import can_return_tuple

from ..configuration.configuration_hidden_state_backbone import HiddenStateBackboneConfig
from .token_grid import grid_size


def _pixels(pixel_values: torch.Tensor, patch_size: int) -> dict[str, torch.Tensor | None]:
    return {"pixel_values": pixel_values}


def _pixels_in_order(pixel_values: torch.Tensor, patch_size: int) -> dict[str, torch.Tensor | None]:
    """MAE sorts its patches by noise before it drops some: with none dropped, this keeps them where they are."""
    rows, columns = (size // patch_size for size in pixel_values.shape[-2:])
    order = torch.arange(rows * columns, device=pixel_values.device, dtype=torch.float32)
    return {"pixel_values": pixel_values, "noise": order.expand(pixel_values.shape[0], -1)}


def _patches(pixel_values: torch.Tensor, patch_size: int) -> dict[str, torch.Tensor | None]:
    """SigLIP 2 reads patches [B, h * w, patch * patch * channels] and the grid that they are from."""
    batch, _, height, width = pixel_values.shape
    rows, columns = height // patch_size, width // patch_size
    seen = pixel_values[..., : rows * patch_size, : columns * patch_size]
    cells = seen.unflatten(3, (columns, patch_size)).unflatten(2, (rows, patch_size))  # [B, C, h, p, w, p]
    return {
        "pixel_values": cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2),  # [B, h * w, p * p * C]
        "pixel_attention_mask": None,  # nothing is padded
        "spatial_shapes": torch.tensor([[rows, columns]] * batch, device="cpu"),  # it is read, not computed with
    }


_INPUTS = {"vit_mae": _pixels_in_order, "siglip2_vision_model": _patches}
"""`model_type` -> (pixels [B, C, H, W], patch size) -> arguments of a stock model that does not read plain pixels."""


class HiddenStateBackbone(BackboneMixin, PreTrainedModel):
    """A stock vision transformer cut after its tap, with prefix tokens dropped and the grid folded back.

    The blocks after the tap, the pooler and (unless `apply_final_norm`) the final norm are neither allocated nor
    computed. The features are the block's output as it is, without norm, as the paper taps its ViTs.
    """

    config: HiddenStateBackboneConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: HiddenStateBackboneConfig):
        super().__init__(config)
        family = config.family
        stock_config = copy.deepcopy(config.stock_config)
        stock_config.num_hidden_layers = config.num_blocks
        if getattr(stock_config, "drop_path_rate", 0.0):  # it grows linearly over the blocks of the whole model
            whole = config.stock_config.num_hidden_layers
            stock_config.drop_path_rate *= (config.num_blocks - 1) / max(whole - 1, 1)
        for name, value in family.overrides.items():
            setattr(stock_config, name, value)
        if family.stock_class is None:
            self.vision_model = AutoModel.from_config(stock_config)
        else:
            self.vision_model = getattr(transformers, family.stock_class)._from_config(stock_config)
        for name in family.drop:
            setattr(self.vision_model, name, None)
        self.norm = getattr(self.vision_model, family.final_norm) if config.apply_final_norm else nn.Identity()
        # Without its norm the stock model returns the last block's output as `last_hidden_state`.
        setattr(self.vision_model, family.final_norm, nn.Identity())
        self.num_features = [config.hidden_size] * len(config.stage_names)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding."""
        return self.vision_model.get_input_embeddings()

    def _interpolation(self, height: int, width: int) -> dict[str, bool]:
        """The argument that fits the position embedding to a `height` x `width` input, where one is needed."""
        trained = self.config.image_size
        takes_argument = self.config.family.takes_interpolation
        resized = (height, width) != trained
        if resized and self.config.family.fixed_size(self.config.stock_config):
            raise ValueError(
                f"This {self.config.stock_config.model_type} reads pictures of {trained[0]}x{trained[1]} pixels only, "
                f"got {height}x{width}."
            )
        if (resized or not takes_argument) and trained[0] != trained[1]:
            raise ValueError(
                f"The position embedding of this {self.config.stock_config.model_type} was made for {trained[0]}x"
                f"{trained[1]} pixels; only one made for a square can be fitted to {height}x{width}."
            )
        return {"interpolate_pos_encoding": True} if resized and takes_argument else {}

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool | None = None, **kwargs) -> BackboneOutput:
        """Computes the feature maps named by `config.out_features`.

        Args:
            pixel_values: [B, 3, H, W]. Rows and columns past a multiple of the patch size are not seen.
            output_hidden_states: also return every block's tokens [B, prefix + h * w, C].

        Returns:
            `BackboneOutput` with `feature_maps`, each [B, C, h, w] with h = H // patch and w = W // patch.

        Raises:
            ValueError: for an input smaller than one patch, or one that the position embedding cannot be fitted to.
        """
        height, width = pixel_values.shape[-2:]
        grid = grid_size(height, width, [[self.config.patch_size, "floor"]])
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        only_tap = self.config.out_indices == [self.config.num_blocks]
        to_inputs = _INPUTS.get(self.config.stock_config.model_type, _pixels)
        outputs = self.vision_model(
            **to_inputs(pixel_values, self.config.patch_size),
            output_hidden_states=output_hidden_states or not only_tap,
            **self._interpolation(height, width),
            **kwargs,
        )
        taps = (
            [outputs.last_hidden_state]
            if only_tap
            else [outputs.hidden_states[self.stage_names.index(name)] for name in self.out_features]
        )
        return BackboneOutput(
            feature_maps=tuple(self._fold(tokens, grid) for tokens in taps),  # type: ignore[arg-type]  # of any length
            hidden_states=outputs.hidden_states if output_hidden_states else None,
            attentions=outputs.get("attentions"),
        )

    def _fold(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """[B, prefix + h * w, C] -> [B, C, h, w]."""
        patches = self.norm(tokens[:, self.config.num_prefix_tokens :])  # [B, h * w, C]
        return patches.transpose(1, 2).unflatten(2, grid).contiguous()


__all__ = ["HiddenStateBackbone"]
