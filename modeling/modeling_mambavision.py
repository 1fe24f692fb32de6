"""MambaVision (arXiv 2407.08083): convolutional stages, then windows mixed by selective scans and by attention.

Maps are [B, C, H, W] between stages; inside stages 3 and 4 each window is a sequence, [B * windows, side * side, C].
What the paper leaves open (activations, epsilons, padding) is settled by the outputs of the published model.
"""

import math
from collections.abc import Callable
from itertools import zip_longest

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple

from ..configuration.configuration_mambavision import MambaVisionConfig
from .drop_path import DropPath
from .ops.selective_scan_1d import selective_scan_1d

_STEM_NORM_EPS = 1e-4
_DT_FLOOR = 1e-4


def halving_conv(in_width: int, out_width: int) -> nn.Conv2d:
    """Padded 3x3 stride-2 convolution: [B, C, H, W] -> [B, C', ⌈H/2⌉, ⌈W/2⌉]."""
    return nn.Conv2d(in_width, out_width, kernel_size=3, stride=2, padding=1, bias=False)


class MambaVisionStem(nn.Module):
    """Two stride-2 convolutions, each with BatchNorm and ReLU: [B, 3, H, W] -> [B, C, ⌈H/4⌉, ⌈W/4⌉]."""

    def __init__(self, config: MambaVisionConfig):
        super().__init__()
        self.conv1 = halving_conv(config.num_channels, config.stem_width)
        self.norm1 = nn.BatchNorm2d(config.stem_width, eps=_STEM_NORM_EPS)
        self.conv2 = halving_conv(config.stem_width, config.hidden_sizes[0])
        self.norm2 = nn.BatchNorm2d(config.hidden_sizes[0], eps=_STEM_NORM_EPS)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(pixel_values)))
        return F.relu(self.norm2(self.conv2(x)))


class MambaVisionLayerScale(nn.Module):
    """A learned factor per channel of a residual branch (arXiv 2103.17239), of which `trailing` dimensions follow."""

    def __init__(self, width: int, initial: float, trailing: int):
        super().__init__()
        self.initial, self.trailing = initial, trailing
        self.scale = nn.Parameter(torch.empty(width))

    def init_parameters(self, config: MambaVisionConfig) -> None:
        init.constant_(self.scale, self.initial)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.view(-1, *[1] * self.trailing)


class MambaVisionConvBlock(GradientCheckpointingLayer):
    """x + norm(conv(gelu(norm(conv(x))))) with BatchNorms, of stages 1 and 2."""

    def __init__(self, config: MambaVisionConfig, stage: int, drop_path: float):
        super().__init__()
        width = config.hidden_sizes[stage]
        self.conv1 = nn.Conv2d(width, width, kernel_size=3, padding=1)
        self.norm1 = nn.BatchNorm2d(width)
        self.act = nn.GELU(approximate="tanh")
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1)
        self.norm2 = nn.BatchNorm2d(width)
        scale = config.conv_layer_scale
        self.layer_scale = nn.Identity() if scale is None else MambaVisionLayerScale(width, scale, trailing=2)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.act(self.norm1(self.conv1(x)))
        branch = self.norm2(self.conv2(branch))
        return x + self.drop_path(self.layer_scale(branch))


class MambaVisionMixer(nn.Module):
    """Half of the channels through a convolution and a selective scan, the other half through a convolution alone.

    Section 3.2 of the paper: the branch without a scan stands in place of Mamba's gate, and both convolutions are
    symmetric where Mamba's are causal.
    """

    def __init__(self, config: MambaVisionConfig, stage: int):
        super().__init__()
        width = config.hidden_sizes[stage]
        inner = width // 2
        rank = math.ceil(width / 16) if config.dt_rank is None else config.dt_rank
        self.inner, self.rank, self.states = inner, rank, config.d_state
        self.in_proj = nn.Linear(width, width, bias=False)
        self.conv_scanned = nn.Conv1d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.conv_direct = nn.Conv1d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.x_proj = nn.Linear(inner, rank + 2 * config.d_state, bias=False)
        self.dt_weight = nn.Parameter(torch.empty(inner, rank))
        self.dt_bias = nn.Parameter(torch.empty(inner))
        self.a_log = nn.Parameter(torch.empty(inner, config.d_state))
        self.d = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(width, width, bias=False)

    def init_parameters(self, config: MambaVisionConfig) -> None:
        """Step sizes log-uniform in [dt_min, dt_max], decay rates 1..N, skip 1 (Mamba, arXiv 2312.00752, 3.6)."""
        inner, rank = self.inner, self.rank  # a sharded parameter has no shape here
        init.uniform_(self.dt_weight, -(rank**-0.5), rank**-0.5)
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        dt = torch.exp(torch.rand(inner, device=self.dt_bias.device) * (high - low) + low).clamp(min=_DT_FLOOR)
        init.copy_(self.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # softplus of this is dt
        states = torch.arange(1, self.states + 1, device=self.a_log.device, dtype=torch.float32)
        init.copy_(self.a_log, states.log().expand(inner, -1))
        init.ones_(self.d)

    def forward(self, x: Tensor) -> Tensor:
        scanned, direct = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)  # [B * windows, C / 2, N] each
        scanned = F.silu(self.conv_scanned(scanned)).transpose(1, 2)  # [B * windows, N, C / 2]
        direct = F.silu(self.conv_direct(direct)).transpose(1, 2)
        dt_low_rank, b, c = self.x_proj(scanned).split([self.rank, self.states, self.states], dim=-1)
        scanned = selective_scan_1d(scanned, dt_low_rank, b, c, self.dt_weight, self.dt_bias, self.a_log, self.d)
        return self.out_proj(torch.cat([scanned, direct], dim=-1))


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Attention as two matrix products: [B, heads, N, D] each -> [B, N, heads, D] and the weights [B, heads, N, N]."""
    weights = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


class MambaVisionAttention(nn.Module):
    """Softmax attention between the positions of a window."""

    def __init__(self, config: MambaVisionConfig, stage: int):
        super().__init__()
        width = config.hidden_sizes[stage]
        self.config = config
        self.head_dim = width // config.num_attention_heads[stage - 2]
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        mixed, _ = attend(self, query, key, value, None, scaling=self.scaling, dropout=0.0)
        return self.out_proj(mixed.flatten(2))  # [B * windows, N, C]


class MambaVisionMLP(nn.Module):
    """Two linear layers at every position."""

    def __init__(self, config: MambaVisionConfig, stage: int):
        super().__init__()
        width = config.hidden_sizes[stage]
        hidden = int(config.mlp_ratio * width)
        self.fc1 = nn.Linear(width, hidden)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class MambaVisionBlock(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x)), of stages 3 and 4."""

    def __init__(self, config: MambaVisionConfig, stage: int, mixer: type[nn.Module], drop_path: float):
        super().__init__()
        width, scale = config.hidden_sizes[stage], config.layer_scale
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mixer = mixer(config, stage)
        self.layer_scale1 = nn.Identity() if scale is None else MambaVisionLayerScale(width, scale, trailing=0)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = MambaVisionMLP(config, stage)
        self.layer_scale2 = nn.Identity() if scale is None else MambaVisionLayerScale(width, scale, trailing=0)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.layer_scale1(self.mixer(self.norm1(x))))
        return x + self.drop_path(self.layer_scale2(self.mlp(self.norm2(x))))


class MambaVisionConvStage(nn.Module):
    """Convolutional blocks at one resolution: [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, config: MambaVisionConfig, stage: int, drop_paths: list[float]):
        super().__init__()
        self.blocks = nn.ModuleList(MambaVisionConvBlock(config, stage, rate) for rate in drop_paths)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class MambaVisionWindowStage(nn.Module):
    """Mixer blocks, then attention blocks, inside windows at one resolution: [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, config: MambaVisionConfig, stage: int, drop_paths: list[float]):
        super().__init__()
        self.window_size = config.window_sizes[stage - 2]
        mixers = math.ceil(len(drop_paths) / 2)
        self.blocks = nn.ModuleList(
            MambaVisionBlock(config, stage, MambaVisionMixer if index < mixers else MambaVisionAttention, rate)
            for index, rate in enumerate(drop_paths)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, width = x.shape[:2]
        height_in, width_in = x.shape[2:]
        side = self.window_size
        x = F.pad(x, (0, -width_in % side, 0, -height_in % side))
        x = x.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # [B, C, rows, side, columns, side]
        rows, columns = x.shape[2], x.shape[4]
        x = x.permute(0, 2, 4, 3, 5, 1).reshape(-1, side * side, width)  # [B * windows, N, C]
        for block in self.blocks:
            x = block(x)
        x = x.view(batch, rows, columns, side, side, width).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(batch, width, rows * side, columns * side)[:, :, :height_in, :width_in].contiguous()


STAGES = (MambaVisionConvStage, MambaVisionConvStage, MambaVisionWindowStage, MambaVisionWindowStage)


class MambaVisionPreTrainedModel(PreTrainedModel):
    """What the encoder's models share: flags and the initial distribution of every parameter."""

    config: MambaVisionConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["MambaVisionConvBlock", "MambaVisionBlock"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Linear truncated normal, convolutions torch's default; modules with parameters of their own fill those."""
        super()._init_weights(module)  # norms
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.Conv1d | nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = (module.in_channels // module.groups * math.prod(module.kernel_size)) ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif (init_parameters := getattr(module, "init_parameters", None)) is not None:
            init_parameters(self.config)


class MambaVisionTrunk(MambaVisionPreTrainedModel):
    """Stem, stages and downsamplings up to the tap: what Model and Backbone have in common."""

    def __init__(self, config: MambaVisionConfig):
        super().__init__(config)
        rates = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").tolist()
        first = [sum(config.depths[:stage]) for stage in range(len(STAGES) + 1)]
        widths = config.hidden_sizes
        self.stem = MambaVisionStem(config)
        self.stages = nn.ModuleList(
            STAGES[stage](config, stage, rates[first[stage] : first[stage + 1]])
            for stage in range((config.tap_index + 1) // 2)
        )
        self.downsamples = nn.ModuleList(
            halving_conv(widths[stage], widths[stage + 1]) for stage in range(config.tap_index // 2)
        )
        normed = config.final_norm and config.out_features[-1] == "stage4"
        self.norm = nn.BatchNorm2d(widths[-1]) if normed else nn.Identity()

    def named_maps(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Map [B, C, H, W] at each of `stage_names` up to the tap; that of `stage4` after the final norm."""
        if pixel_values.dim() != 4 or pixel_values.shape[1] != self.config.num_channels or 0 in pixel_values.shape:
            raise ValueError(
                f"{type(self).__name__}: pixel_values must be [batch, {self.config.num_channels}, height, width], got "
                f"{list(pixel_values.shape)}."
            )
        maps = [self.stem(pixel_values)]
        for stage, downsample in zip_longest(self.stages, self.downsamples):
            maps.append(stage(maps[-1]))
            if downsample is not None:
                maps.append(downsample(maps[-1]))
        maps[-1] = self.norm(maps[-1])
        return dict(zip(self.config.stage_names, maps, strict=False))


class MambaVisionModel(MambaVisionTrunk):
    """The encoder as a sequence model: `last_hidden_state` [B, N, C] holds the tap's map row by row.

    `hidden_states` are the maps at each of the config's `stage_names` as sequences; they differ in N and C, and the
    last of them is `last_hidden_state`. Works as vision tower of the stock `LlavaForConditionalGeneration`
    (`vision_feature_layer=-1, vision_feature_select_strategy="full"`).
    """

    def __init__(self, config: MambaVisionConfig):
        super().__init__(config)
        self.patch_size = config.patch_size
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | int | list[int] | None = None, **kwargs
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        """Encode pictures.

        Args:
            pixel_values: [B, channels, height, width] of any size.
            output_hidden_states: whether to return `hidden_states`. Indices (what stock VLMs pass) return them all.
        """
        maps = self.named_maps(pixel_values).values()
        sequences = [one.flatten(2).transpose(1, 2) for one in maps]  # [B, N, C]
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=sequences[-1],
            pooler_output=sequences[-1].mean(1),
            hidden_states=None if output_hidden_states is False else tuple(sequences),
        )


class MambaVisionBackbone(BackboneMixin, MambaVisionTrunk):
    """The encoder as a Transformers Backbone: feature maps [B, C, H, W] of the stages named in `out_features`."""

    has_attentions = False

    def __init__(self, config: MambaVisionConfig):
        super().__init__(config)
        self.num_features = config.widths
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: Tensor, **kwargs) -> BackboneOutput:
        """Encode pictures [B, channels, height, width] of any size."""
        maps = self.named_maps(pixel_values)
        return BackboneOutput(
            feature_maps=tuple(maps[name] for name in self.out_features),  # type: ignore[arg-type]  # of any length
            hidden_states=tuple(maps.values()),
        )


class MambaVisionForImageClassification(MambaVisionPreTrainedModel):
    """Mean over positions and a linear layer on the tap (by default the last stage after its norm)."""

    accepts_loss_kwargs = False

    def __init__(self, config: MambaVisionConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = MambaVisionModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]  # None before init only
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs
    ) -> ImageClassifierOutputWithNoAttention:
        """Logits [B, num_labels], and the loss where `labels` [B] are given."""
        outputs = self.model(pixel_values, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


__all__ = [
    "MambaVisionBackbone",
    "MambaVisionForImageClassification",
    "MambaVisionModel",
    "MambaVisionPreTrainedModel",
]
