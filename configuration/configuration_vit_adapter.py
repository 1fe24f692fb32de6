"""Configuration of ViT-Adapter (arXiv 2205.08534): a plain vision transformer with a feature pyramid beside it."""

from typing import TYPE_CHECKING, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin


@strict
class VitAdapterConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""A ViT of 16x16 patches, a convolutional pyramid beside it, and interactions that move features between the two.

    The defaults are the DeiT-S segmenter. Stages are the pyramid's levels, "stage1" to "stage4" at strides 4, 8, 16
    and 32, each after its BatchNorm. They grow together, so that a tap saves only what is left at the end: the other
    levels' norms, the two convolutions that only stage1 needs, and the last extractors' work on levels nobody reads.

    Args:
        image_size: side (or height and width) in pixels that the weights were trained at; a default for tools that
            need a picture size. Any other size works.
        pretrain_image_size: side in pixels that the position embedding was made for; it is resized to the picture.
        num_channels: channels of the picture.
        hidden_size: width of the ViT and of every level.
        num_hidden_layers: number of the ViT's blocks, a multiple of `num_interactions`.
        num_attention_heads: heads of the ViT.
        mlp_ratio: hidden width of a block's MLP over `hidden_size`.
        hidden_act: activation of the MLPs and convolutional feed-forward networks.
        qkv_bias: whether the ViT's queries, keys and values have a bias.
        layer_scale: whether each branch of a block is scaled per channel.
        window_size: side in patches of the windows that all but the last block of each interaction attend in; 0 for
            none. The published detectors have 14, the segmenters 0, and no tensor shows it.
        num_interactions: number of times the ViT takes from the pyramid and gives to it, after equally many blocks.
        conv_inner_size: width of the pyramid's stem; its levels have once, twice, 4 and 4 times as many channels.
        deform_num_heads: heads of the deformable attention between the two.
        deform_num_points: points that each head reads in each level.
        deform_ratio: width of the deformable attention's values over `hidden_size`.
        conv_ffn_ratio: hidden width of the extractors' convolutional feed-forward network; 0 for none.
        num_extra_extractors: extractors that follow that of the last interaction.
        added_vit_features: which of the ViT's maps is added to the levels, resized: "each" level that of the
            interaction of its number (segmenters), the "last" one to all (detectors), or "none".
        injector_init_value: initial scale of what the ViT takes from the pyramid.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0, and of every extractor.
        layer_norm_eps: epsilon of the layer norms.
        initializer_range: standard deviation of the truncated normal that linear weights are drawn from.

    Raises:
        ValueError: widths, heads or depths that do not divide, or a number that is too small.
    """

    model_type = "vit_adapter"
    base_config_key = "vision_config"

    image_size: int | list[int] | tuple[int, ...] = 512
    pretrain_image_size: int = 224
    num_channels: int = 3
    hidden_size: int = 384
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    mlp_ratio: float | int = 4.0
    hidden_act: str = "gelu"
    qkv_bias: bool = True
    layer_scale: bool = True
    window_size: int = 0
    num_interactions: int = 4
    conv_inner_size: int = 64
    deform_num_heads: int = 6
    deform_num_points: int = 4
    deform_ratio: float | int = 1.0
    conv_ffn_ratio: float | int = 0.25
    num_extra_extractors: int = 2
    added_vit_features: Literal["each", "last", "none"] = "each"
    injector_init_value: float | int = 0.0
    drop_path_rate: float | int = 0.0
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None
    if TYPE_CHECKING:  # BackboneConfigMixin takes it by keyword too
        out_features: list[str] = []

    def __post_init__(self, **kwargs):
        self.stage_names = ["stage1", "stage2", "stage3", "stage4"]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        kwargs.pop("stage_names", None)
        super().__post_init__(**kwargs)
        self._check_sizes()

    def _check_sizes(self):
        """Widths and depths divide, and no number is too small."""
        least = {"num_channels": 1, "hidden_size": 1, "num_hidden_layers": 1, "num_interactions": 1, "window_size": 0}
        least |= {"deform_num_points": 1, "num_extra_extractors": 0, "conv_inner_size": 1, "pretrain_image_size": 16}
        least |= {"conv_ffn_ratio": 0, "num_attention_heads": 1, "deform_num_heads": 1}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"VitAdapterConfig: {name} must be at least {smallest}, got {getattr(self, name)}.")
        quotients = {
            ("hidden_size", "num_attention_heads"): self.hidden_size % self.num_attention_heads,
            ("hidden_size * deform_ratio", "deform_num_heads"): self.value_size % self.deform_num_heads,
            ("num_hidden_layers", "num_interactions"): self.num_hidden_layers % self.num_interactions,
        }
        for (whole, part), rest in quotients.items():
            if rest:
                raise ValueError(f"VitAdapterConfig: {whole} must be a multiple of {part}={getattr(self, part)}.")
        if self.value_size < 1:
            raise ValueError(f"VitAdapterConfig: deform_ratio={self.deform_ratio} leaves no channel.")
        if self.added_vit_features == "each" and self.num_interactions != len(self.stage_names):
            raise ValueError(
                'VitAdapterConfig: added_vit_features="each" needs one interaction per level, so num_interactions=4, '
                f"got {self.num_interactions}."
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(
                f"VitAdapterConfig: there is no activation {self.hidden_act!r} for hidden_act, use for example 'gelu'."
            )

    @property
    def value_size(self) -> int:
        """Width of the deformable attention's values."""
        return round(self.hidden_size * self.deform_ratio)

    @property
    def patch_size(self) -> int:
        """Pixels per position of the tap's map along one side."""
        return 4 * 2 ** self.stage_names.index(self.out_features[-1])


__all__ = ["VitAdapterConfig"]
