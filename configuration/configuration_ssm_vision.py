"""Configuration of the hierarchical vision encoder with a mixer slot (VMamba and its matched alternatives)."""

from typing import TYPE_CHECKING, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin

MIXER_NAMES = ("ss2d", "dwconv", "window_attention", "global_attention", "identity")


@strict
class SSMVisionConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""A stem, up to four stages of (norm, mixer, norm, MLP) blocks, and a downsampling between stages.

    The defaults are VMamba v2 Small, `s2l15`. VMamba v0 is `stem="conv4", downsample="patch_merge", mlp_ratio=0.0,
    d_state=16, gated=True, conv_bias=True`. The *tap*, the last of `out_features`, is where features are taken; stages
    after it are neither allocated nor computed.

    Args:
        image_size: side (or height and width) in pixels that the weights were trained at; a default for tools that
            need a picture size. Any other size works.
        num_channels: channels of the picture.
        stem: `"conv4"` one 4x4 stride-4 convolution and norm (v0; the map is floor(size / 4)), `"conv3x2"` two padded
            3x3 stride-2 convolutions, each with a norm (v2; the map is ceil(size / 4)).
        hidden_sizes: width of each stage; 1 to 4 stages.
        depths: number of blocks of each stage.
        mixer: name in the mixer table, or one name per stage: `"ss2d"`, `"dwconv"`, `"window_attention"`,
            `"global_attention"`, `"identity"`.
        mlp_ratio: hidden width of the MLP over the stage width; 0 leaves out the MLP and its norm (v0).
        hidden_act: activation of the MLP and the `conv3x2` stem.
        downsample: between stages, `"patch_merge"` 2x2 neighbours to one, norm, linear (v0) or `"conv3"` padded 3x3
            stride-2 convolution and norm (v2). Both round odd maps up.
        output_norm: norm over the channels of each returned feature map: `"none"`, `"layernorm"` with weights (dense
            checkpoints hold one per stage), or `"parameter_free"` (classification checkpoints, which hold none: so the
            paper tapped them). A classifier has a norm of its own in its place.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
        layer_norm_eps: epsilon of every norm.
        initializer_range: standard deviation of the truncated normal that linear weights are drawn from.
        ssm_ratio: (ss2d) inner width over stage width.
        d_state: (ss2d) number of states per inner channel.
        gated: (ss2d) multiply the scan's output by SiLU of a second projection (v0).
        conv_bias: (ss2d) whether the depthwise convolution has a bias.
        dt_rank: (ss2d) rank of the step-size projection; `"auto"` is ceil(width of that stage / 16).
        dt_min, dt_max: (ss2d) range of the initial step sizes, drawn log-uniformly.
        dwconv_ratio: (dwconv) inner width over stage width.
        dwconv_kernel: (dwconv) side of the depthwise kernel, odd.
        head_dim: (attention) channels per head, a multiple of 4 that divides the width.
        window_size: (window_attention) side of a window in positions; every second block shifts it by half.
        rope_theta: (attention) base of the two-dimensional rotary position encoding.

    Raises:
        ValueError: for an unknown mixer or activation, lists of different length, a width that does not fit, or a
            number that is too small.
    """

    model_type = "ssm_vision"
    base_config_key = "vision_config"

    image_size: int | list[int] | tuple[int, ...] = 224
    num_channels: int = 3
    stem: Literal["conv4", "conv3x2"] = "conv3x2"
    hidden_sizes: list[int] | tuple[int, ...] = (96, 192, 384, 768)
    depths: list[int] | tuple[int, ...] = (2, 2, 15, 2)
    mixer: str | list[str] | tuple[str, ...] = "ss2d"
    mlp_ratio: float | int = 4.0
    hidden_act: str = "gelu"
    downsample: Literal["patch_merge", "conv3"] = "conv3"
    output_norm: Literal["none", "layernorm", "parameter_free"] = "none"
    drop_path_rate: float | int = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    ssm_ratio: float | int = 2.0
    d_state: int = 1
    gated: bool = False
    conv_bias: bool = False
    dt_rank: int | Literal["auto"] = "auto"
    dt_min: float = 1e-3
    dt_max: float = 0.1
    dwconv_ratio: float | int = 1.0
    dwconv_kernel: int = 7
    head_dim: int = 32
    window_size: int = 7
    rope_theta: float | int = 100.0
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None
    if TYPE_CHECKING:  # BackboneConfigMixin takes it by keyword too
        out_features: list[str] = []

    def __post_init__(self, **kwargs):
        self.hidden_sizes, self.depths = list(self.hidden_sizes), list(self.depths)
        self.stage_names = ["stem"] + [f"stage{index}" for index in range(1, len(self.depths) + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        kwargs.pop("stage_names", None)
        super().__post_init__(**kwargs)
        self._check_stages()

    def _check_stages(self):
        """Stages, mixers and widths agree, and no number is too small."""
        stages = len(self.depths)
        if (
            not 1 <= stages <= 4
            or len(self.hidden_sizes) != stages
            or min([*self.depths, *self.hidden_sizes], default=0) < 1
        ):
            raise ValueError(
                "SSMVisionConfig: hidden_sizes and depths must be lists of 1 to 4 positive integers of equal length, "
                f"got hidden_sizes={self.hidden_sizes} and depths={self.depths}."
            )
        if len(self.mixers) != stages or not set(self.mixers) <= set(MIXER_NAMES):
            raise ValueError(
                f"SSMVisionConfig: mixer must be one of {', '.join(MIXER_NAMES)}, or a list of {stages} of them (one "
                f"per stage), got {self.mixer!r}."
            )
        if self.stem == "conv3x2" and self.hidden_sizes[0] % 2:
            raise ValueError(
                f"SSMVisionConfig: the conv3x2 stem needs an even hidden_sizes[0], got {self.hidden_sizes[0]}."
            )
        if self.dwconv_kernel % 2 == 0:
            raise ValueError(f"SSMVisionConfig: dwconv_kernel must be odd, got {self.dwconv_kernel}.")
        least = {"head_dim": 1, "window_size": 1, "dwconv_kernel": 1, "d_state": 1, "num_channels": 1, "mlp_ratio": 0}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"SSMVisionConfig: {name} must be at least {smallest}, got {getattr(self, name)}.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(
                f"SSMVisionConfig: there is no activation {self.hidden_act!r} for hidden_act, use for example 'gelu'."
            )
        for name in ("ssm_ratio", "dwconv_ratio"):
            if int(getattr(self, name) * min(self.hidden_sizes)) < 1:
                raise ValueError(f"SSMVisionConfig: {name}={getattr(self, name)} leaves a mixer no inner channel.")
        for width, mixer in zip(self.hidden_sizes, self.mixers, strict=True):
            if mixer.endswith("attention") and (self.head_dim % 4 or width % self.head_dim):
                raise ValueError(
                    f"SSMVisionConfig: {mixer} needs a head_dim that is a multiple of 4 and divides the stage width, "
                    f"got head_dim={self.head_dim} for width {width}."
                )

    @property
    def mixers(self) -> list[str]:
        """Mixer name of each stage."""
        return [self.mixer] * len(self.depths) if isinstance(self.mixer, str) else list(self.mixer)

    @property
    def tap_stage(self) -> int:
        """Index of the tap in `stage_names`: 0 is the stem, k the k-th stage. Later stages do not exist."""
        return self.stage_names.index(self.out_features[-1])

    @property
    def hidden_size(self) -> int:
        """Width of the features at the tap."""
        return self.hidden_sizes[max(self.tap_stage - 1, 0)]

    @property
    def num_hidden_layers(self) -> int:
        """Number of stages up to the tap: `hidden_states` has one entry more, the stem's."""
        return self.tap_stage

    @property
    def patch_size(self) -> int:
        """Pixels per position of the tap's map along one side."""
        return 4 * 2 ** max(self.tap_stage - 1, 0)


__all__ = ["MIXER_NAMES", "SSMVisionConfig"]
