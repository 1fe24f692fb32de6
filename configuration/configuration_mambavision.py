"""Configuration of MambaVision (arXiv 2407.08083): two convolutional stages, two of Mamba mixers and attention."""

from typing import TYPE_CHECKING

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin

_STAGES = 4


@strict
class MambaVisionConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""A stem, two stages of convolutional blocks and two of windowed blocks, with a stride-2 convolution in between.

    The defaults are MambaVision-T. In stages 3 and 4 the first half of the blocks (rounded up) mixes with a selective
    scan and the rest with attention. A *tap* is one of `stem`, `stage1`, `stage1_downsampled`, `stage2`, ... `stage4`:
    `stageK` is the output of the K-th stage, `stageK_downsampled` is that after the convolution that leads to the next.
    What many call "stage 3" of MambaVision is `stage2_downsampled`, which lies before any mixer and any attention.
    Nothing after the tap, the last of `out_features`, is allocated or computed.

    Args:
        image_size: side in pixels that the weights were trained at; a default for tools that need a picture size. Any
            other size works.
        num_channels: channels of the picture.
        stem_width: channels between the two stride-2 convolutions of the stem.
        hidden_sizes: width of each of the four stages.
        depths: number of blocks of each of the four stages.
        num_attention_heads: of stages 3 and 4.
        window_sizes: side, in positions, of the windows of stages 3 and 4, inside which their blocks mix. Maps that
            they do not divide are padded with zeros at the bottom and right; padding takes part in the mixing, as it
            does in the published model.
        mlp_ratio: hidden width of the MLP over the width of its stage.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        d_state: states per channel of the scan.
        dt_rank: rank of the step-size projection; `None` is ceil(width of the stage / 16).
        layer_scale: initial value of the learned scale of each residual branch of stages 3 and 4; `None` for no scale.
        conv_layer_scale: the same of stages 1 and 2.
        final_norm: whether `stage4` passes the BatchNorm that stands before the classifier. Other taps have no norm.
        hidden_act: activation of the MLPs.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
        layer_norm_eps: epsilon of the norms of stages 3 and 4.
        initializer_range: standard deviation of the truncated normal that linear weights are drawn from.
        dt_min, dt_max: range of the initial step sizes, drawn log-uniformly.

    Raises:
        ValueError: for a list of another length, a number that is too small, a width that does not fit the heads, or
            an unknown activation.
    """

    model_type = "mambavision"
    base_config_key = "vision_config"

    image_size: int | list[int] | tuple[int, ...] = 224
    num_channels: int = 3
    stem_width: int = 32
    hidden_sizes: list[int] | tuple[int, ...] = (80, 160, 320, 640)
    depths: list[int] | tuple[int, ...] = (1, 3, 8, 4)
    num_attention_heads: list[int] | tuple[int, ...] = (8, 16)
    window_sizes: list[int] | tuple[int, ...] = (14, 7)
    mlp_ratio: float | int = 4.0
    qkv_bias: bool = True
    d_state: int = 8
    dt_rank: int | None = None
    layer_scale: float | None = None
    conv_layer_scale: float | None = None
    final_norm: bool = True
    hidden_act: str = "gelu"
    drop_path_rate: float | int = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    dt_min: float = 1e-3
    dt_max: float = 0.1
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None
    if TYPE_CHECKING:  # BackboneConfigMixin takes it by keyword too
        out_features: list[str] = []

    def __post_init__(self, **kwargs):
        if "in_dim" in kwargs:
            raise ValueError(
                "This is the configuration of NVIDIA's own MambaVision code, whose tensors have other names: give "
                "`ssm-vlm convert` the model.safetensors or .pth.tar of that repository, the file and not the folder, "
                "or name the encoder with --encoder."
            )
        for name in ("hidden_sizes", "depths", "num_attention_heads", "window_sizes"):
            setattr(self, name, list(getattr(self, name)))
        self.stage_names = ["stem", "stage1"]
        for stage in range(2, _STAGES + 1):
            self.stage_names += [f"stage{stage - 1}_downsampled", f"stage{stage}"]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        kwargs.pop("stage_names", None)
        super().__post_init__(**kwargs)
        self._check_sizes()

    def _check_sizes(self):
        """Lists fit together, and no number is too small."""
        lengths = {"hidden_sizes": 4, "depths": 4, "num_attention_heads": 2, "window_sizes": 2}
        for name, length in lengths.items():
            values = getattr(self, name)
            if len(values) != length or min(values) < 1:
                which = "four stages" if length == _STAGES else "stages 3 and 4"
                raise ValueError(
                    f"MambaVisionConfig: {name} must be {length} positive integers, of {which}, got {values}."
                )
        for width, heads in zip(self.hidden_sizes[2:], self.num_attention_heads, strict=True):
            if width % 2 or width % heads:
                raise ValueError(
                    "MambaVisionConfig: the widths of stages 3 and 4 must be even multiples of their number of heads, "
                    f"got width {width} for {heads} heads."
                )
        least = {"num_channels": 1, "stem_width": 1, "d_state": 1, "dt_rank": 1}
        for name, smallest in least.items():
            if getattr(self, name) is not None and getattr(self, name) < smallest:
                raise ValueError(f"MambaVisionConfig: {name} must be at least {smallest}, got {getattr(self, name)}.")
        if int(self.mlp_ratio * min(self.hidden_sizes[2:])) < 1:
            raise ValueError(f"MambaVisionConfig: mlp_ratio={self.mlp_ratio} leaves an MLP no hidden channel.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(
                f"MambaVisionConfig: there is no activation {self.hidden_act!r} for hidden_act, use for example 'gelu'."
            )

    @property
    def tap_index(self) -> int:
        """Index of the tap in `stage_names`. Whatever comes later does not exist."""
        return self.stage_names.index(self.out_features[-1])

    @property
    def widths(self) -> list[int]:
        """Channels at each of `stage_names`."""
        first, *others = self.hidden_sizes
        return [first, first] + [width for width in others for _ in range(2)]

    @property
    def hidden_size(self) -> int:
        """Width of the features at the tap."""
        return self.widths[self.tap_index]

    @property
    def num_hidden_layers(self) -> int:
        """Number of `stage_names` from `stage1` to the tap: `hidden_states` has one entry more, the stem's."""
        return self.tap_index

    @property
    def patch_size(self) -> int:
        """Pixels per position of the tap's map along one side."""
        return 4 * 2 ** (self.tap_index // 2)


__all__ = ["MambaVisionConfig"]
