"""Configuration of the adapter that gives a plain vision transformer the Backbone contract."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import SubConfigSpec


@dataclass(frozen=True)
class HiddenStateFamily:
    """What the adapter has to know about one `model_type` of stock vision transformers.

    Args:
        final_norm: attribute of the stock model that holds the norm after its last block.
        num_prefix_tokens: config -> number of tokens before the first patch token (CLS, distillation, registers).
        takes_interpolation: whether `forward` has the argument `interpolate_pos_encoding`; a family without it
            fits its position embedding to the input by itself.
        fixed_size: config -> whether only pictures of the size that the model was made for can be read.
        drop: attributes of the stock model that only work after the last block (poolers); set to None.
        overrides: config fields that switch off parts which the tap never uses (heads, mask tokens, masking).
        stock_class: name in Transformers of the model, where its `AutoModel` does not know the `model_type`.
    """

    final_norm: str = "layernorm"
    num_prefix_tokens: Callable[[Any], int] = lambda config: 1
    takes_interpolation: bool = True
    fixed_size: Callable[[Any], bool] = lambda config: False
    drop: tuple[str, ...] = ()
    overrides: dict[str, Any] = field(default_factory=dict)
    stock_class: str | None = None


def _cls_and_registers(config: Any) -> int:
    return 1 + config.num_register_tokens


_CLIP = HiddenStateFamily("post_layernorm")
_BEIT = HiddenStateFamily(takes_interpolation=False, drop=("pooler",), overrides={"use_mask_token": False})

HIDDEN_STATE_FAMILIES: dict[str, HiddenStateFamily] = {
    "vit": HiddenStateFamily(drop=("pooler",)),
    "deit": HiddenStateFamily(num_prefix_tokens=lambda config: 2, drop=("pooler",)),
    "beit": _BEIT,
    "data2vec-vision": _BEIT,
    "vit_mae": HiddenStateFamily(overrides={"mask_ratio": 0.0}),
    "vit_msn": HiddenStateFamily(),
    "ijepa": HiddenStateFamily(num_prefix_tokens=lambda config: 0, drop=("pooler",)),
    "clip_vision_model": _CLIP,
    "chinese_clip_vision_model": _CLIP,
    "metaclip_2_vision_model": HiddenStateFamily("post_layernorm", stock_class="MetaClip2VisionModel"),
    "altclip_vision_model": HiddenStateFamily("post_layernorm", stock_class="AltCLIPVisionModel"),
    "clipseg_vision_model": HiddenStateFamily("post_layernorm", stock_class="CLIPSegVisionModel"),
    "blip_vision_model": HiddenStateFamily("post_layernorm", stock_class="BlipVisionModel"),
    "blip_2_vision_model": HiddenStateFamily("post_layernorm", stock_class="Blip2VisionModel"),
    "mlcd_vision_model": HiddenStateFamily("post_layernorm", takes_interpolation=False),
    "siglip_vision_model": HiddenStateFamily("post_layernorm", lambda config: 0, overrides={"vision_use_head": False}),
    "siglip2_vision_model": HiddenStateFamily(
        "post_layernorm", lambda config: 0, takes_interpolation=False, overrides={"vision_use_head": False}
    ),
    "aimv2_vision_model": HiddenStateFamily(
        "rms_norm",
        lambda config: 0,
        takes_interpolation=False,
        fixed_size=lambda config: not config.is_native,
        overrides={"use_head": False},
    ),
    "dinov2": HiddenStateFamily(takes_interpolation=False, overrides={"use_mask_token": False}),
    "dinov2_with_registers": HiddenStateFamily(num_prefix_tokens=_cls_and_registers, takes_interpolation=False),
    "dinov3_vit": HiddenStateFamily("norm", _cls_and_registers, takes_interpolation=False),
    "pixio": HiddenStateFamily(num_prefix_tokens=lambda config: config.n_cls_tokens, takes_interpolation=False),
    "tipsv2_vision_model": HiddenStateFamily(num_prefix_tokens=_cls_and_registers, takes_interpolation=False),
    "internvl_vision": HiddenStateFamily(takes_interpolation=False, overrides={"use_mask_token": False}),
}
"""`model_type` of a stock vision transformer -> what the adapter has to know. A new family adds one entry."""


@strict
class HiddenStateBackboneConfig(BackboneConfigMixin, PreTrainedConfig):
    """A stock vision transformer config (ViT, DeiT, CLIP, SigLIP, DINOv2, ...) together with the block it is tapped at.

    Stages are named "stem" (the embeddings) and "block1" ... "blockK", where blockK is the tap; blocks after it do
    not exist. `out_features` defaults to the tap alone; dense heads may ask for earlier blocks beside it.

    Args:
        vision_config: the stock config, whole: its `num_hidden_layers` counts the blocks of the published model.
        tap_layer: index of the tapped block in the list of blocks, as Python counts: -1 is the last block, -2 the
            second to last (the paper's ViT tap), 0 the first.
        apply_final_norm: whether the features go through the stock model's own final norm. Off by default: the
            second-to-last block was never trained to feed it.

    Raises:
        ValueError: for a stock `model_type` that is not in `HIDDEN_STATE_FAMILIES`, a tap outside the model, a patch
            that is not square, or `out_features` whose last entry is not the tap.
    """

    model_type = "hidden_state_backbone"
    sub_configs_defaults = {"vision_config": SubConfigSpec(config_class=AutoConfig, model_type="vit")}

    vision_config: dict | PreTrainedConfig | None = None
    tap_layer: int = -2
    apply_final_norm: bool = False
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        super().__post_init__(**kwargs)
        stock_type = self.vision_config.model_type
        if stock_type not in HIDDEN_STATE_FAMILIES:
            raise ValueError(
                f"hidden_state_backbone cannot wrap a vision_config of model_type {stock_type!r}; "
                f"it knows {', '.join(sorted(HIDDEN_STATE_FAMILIES))}."
            )
        depth = self.vision_config.num_hidden_layers
        if not -depth <= self.tap_layer < depth:
            raise ValueError(
                f"tap_layer {self.tap_layer} is outside the {depth} blocks of vision_config ({stock_type}): "
                f"give {-depth} to {depth - 1}, where -2 is the second-to-last block."
            )
        if isinstance(self.vision_config.patch_size, list | tuple) and len(set(self.vision_config.patch_size)) > 1:
            raise ValueError(
                f"hidden_state_backbone needs square patches, vision_config has {self.vision_config.patch_size}."
            )
        self.stage_names = ["stem"] + [f"block{index}" for index in range(1, self.num_blocks + 1)]
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)
        if self._out_features[-1] != self.stage_names[-1]:
            raise ValueError(
                f"The last of out_features must be the tap {self.stage_names[-1]!r} (tap_layer {self.tap_layer}), "
                f"got {self._out_features}."
            )

    @property
    def stock_config(self) -> Any:
        """`vision_config`, which is a config object once this one is made."""
        return self.vision_config

    @property
    def family(self) -> HiddenStateFamily:
        """What is known about the wrapped model type."""
        return HIDDEN_STATE_FAMILIES[self.stock_config.model_type]

    @property
    def num_blocks(self) -> int:
        """Number of blocks up to and including the tap."""
        return self.tap_layer % self.stock_config.num_hidden_layers + 1

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the first patch token; the adapter drops them."""
        return self.family.num_prefix_tokens(self.stock_config)

    @property
    def hidden_size(self) -> int:
        """Width at the tap."""
        return self.stock_config.hidden_size

    @property
    def patch_size(self) -> int:
        """Pixels per side of a patch, which is the total stride at the tap."""
        size = self.stock_config.patch_size
        return size[0] if isinstance(size, list | tuple) else size

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels that the position embedding was made for."""
        if not hasattr(self.stock_config, "image_size"):  # SigLIP 2 counts the patches of a square
            return (math.isqrt(self.stock_config.num_patches) * self.patch_size,) * 2
        size = self.stock_config.image_size
        return tuple(size) if isinstance(size, list | tuple) else (size, size)

    @property
    def num_channels(self) -> int:
        """Colour channels of the input."""
        return self.stock_config.num_channels


__all__ = ["HIDDEN_STATE_FAMILIES", "HiddenStateBackboneConfig", "HiddenStateFamily"]
