"""Hierarchical vision encoder with a mixer slot: VMamba (arXiv 2401.10166) v0 and v2, and its matched alternatives.

Maps are channels-last, [B, H, W, C], throughout; only the Backbone returns [B, C, H, W].
"""

import math

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
from transformers.utils.generic import can_return_tuple

from ..configuration.configuration_ssm_vision import SSMVisionConfig
from .drop_path import DropPath
from .mixers import MIXERS, ChannelsLastConv2d
from .strips import in_strips


class SSMVisionStemConv4(nn.Module):
    """One 4x4 stride-4 convolution and norm (VMamba v0): [B, 3, H, W] -> [B, H // 4, W // 4, C].

    A picture narrower than one patch is padded to one.
    """

    def __init__(self, config: SSMVisionConfig):
        super().__init__()
        self.conv = nn.Conv2d(config.num_channels, config.hidden_sizes[0], kernel_size=4, stride=4)
        self.norm = nn.LayerNorm(config.hidden_sizes[0], eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        height, width = pixel_values.shape[-2:]
        if height < 4 or width < 4:
            pixel_values = F.pad(pixel_values, (0, max(4 - width, 0), 0, max(4 - height, 0)))
        # Layout is changed here, where the map is narrowest; the convolution keeps it.
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        return self.norm(self.conv(pixel_values).permute(0, 2, 3, 1))


class SSMVisionStemConv3x2(nn.Module):
    """Two padded 3x3 stride-2 convolutions, each with a norm (VMamba v2): [B, 3, H, W] -> [B, ⌈H/4⌉, ⌈W/4⌉, C]."""

    def __init__(self, config: SSMVisionConfig):
        super().__init__()
        width = config.hidden_sizes[0]
        self.conv1 = nn.Conv2d(config.num_channels, width // 2, kernel_size=3, stride=2, padding=1)
        self.norm1 = nn.LayerNorm(width // 2, eps=config.layer_norm_eps)
        self.act = ACT2FN[config.hidden_act]
        self.conv2 = ChannelsLastConv2d(width // 2, width, kernel_size=3, stride=2, padding=1)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        # Layout is changed here, where the map is narrowest; the convolution keeps it.
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        x = self.act(self.norm1(self.conv1(pixel_values).permute(0, 2, 3, 1)))
        return self.norm2(self.conv2(x))


class SSMVisionPatchMerge(nn.Module):
    """Each 2x2 neighbourhood to one position: concatenate, norm, project (VMamba v0, Swin). Odd sides are padded."""

    def __init__(self, config: SSMVisionConfig, in_width: int, out_width: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * in_width, eps=config.layer_norm_eps)
        self.reduction = nn.Linear(4 * in_width, out_width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [B, H/2, 2, W/2, 2, C]
        # Within a neighbourhood the columns vary slowest: (0, 0), (1, 0), (0, 1), (1, 1), as in the checkpoints.
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))


class SSMVisionConvDownsample(nn.Module):
    """Padded 3x3 stride-2 convolution and norm (VMamba v2): [B, H, W, C] -> [B, ⌈H/2⌉, ⌈W/2⌉, C']."""

    def __init__(self, config: SSMVisionConfig, in_width: int, out_width: int):
        super().__init__()
        self.conv = ChannelsLastConv2d(in_width, out_width, kernel_size=3, stride=2, padding=1)
        self.norm = nn.LayerNorm(out_width, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


STEMS = {"conv4": SSMVisionStemConv4, "conv3x2": SSMVisionStemConv3x2}
DOWNSAMPLES = {"patch_merge": SSMVisionPatchMerge, "conv3": SSMVisionConvDownsample}


class SSMVisionMLP(nn.Module):
    """Two linear layers at every position."""

    def __init__(self, config: SSMVisionConfig, width: int):
        super().__init__()
        hidden = int(config.mlp_ratio * width)
        self.fc1 = nn.Linear(width, hidden)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class SSMVisionBlock(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x)) where the encoder has MLPs."""

    def __init__(self, config: SSMVisionConfig, stage: int, block: int, drop_path: float):
        super().__init__()
        width = config.hidden_sizes[stage]
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mixer = MIXERS[config.mixers[stage]](config, stage, block)
        self.drop_path = DropPath(drop_path)
        if config.mlp_ratio > 0:
            self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = SSMVisionMLP(config, width) if config.mlp_ratio > 0 else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        if self.mlp is None:
            return x
        if self.training:  # drop_path draws once for each picture
            return self._with_mlp(x)
        return in_strips(self, self._with_mlp, x)

    def _with_mlp(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mlp(self.norm2(x)))  # type: ignore[misc]  # called where there is one


class SSMVisionStage(nn.Module):
    """Downsampling (in every stage but the first) and blocks at one resolution."""

    def __init__(self, config: SSMVisionConfig, stage: int, drop_paths: list[float]):
        super().__init__()
        widths = config.hidden_sizes
        self.downsample = (
            DOWNSAMPLES[config.downsample](config, widths[stage - 1], widths[stage]) if stage > 0 else None
        )
        self.blocks = nn.ModuleList(SSMVisionBlock(config, stage, block, rate) for block, rate in enumerate(drop_paths))

    def forward(self, x: Tensor) -> Tensor:
        if self.downsample is not None:
            x = self.downsample(x)
        for block in self.blocks:
            x = block(x)
        return x


class SSMVisionPreTrainedModel(PreTrainedModel):
    """What the encoder's models share: flags and the initial distribution of every parameter."""

    config: SSMVisionConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["SSMVisionBlock"]
    # A tower must accept every implementation that the language model beside it is asked to use.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """VMamba's initialisation: Linear truncated normal, convolutions torch's default; mixers fill the rest."""
        super()._init_weights(module)  # norms
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif (init_parameters := getattr(module, "init_parameters", None)) is not None:
            init_parameters(self.config)


class SSMVisionTrunk(SSMVisionPreTrainedModel):
    """Stem and stages up to the tap, and the output norms: what Model and Backbone have in common."""

    output_norms: nn.ModuleDict

    def __init__(self, config: SSMVisionConfig):
        super().__init__(config)
        rates = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").tolist()
        first = [sum(config.depths[:stage]) for stage in range(len(config.depths) + 1)]
        self.stem = STEMS[config.stem](config)
        self.stages = nn.ModuleList(
            SSMVisionStage(config, stage, rates[first[stage] : first[stage + 1]]) for stage in range(config.tap_stage)
        )

    def _output_norms(self, names: list[str]) -> nn.ModuleDict:
        config = self.config
        if config.output_norm == "none":
            return nn.ModuleDict()
        widths = dict(zip(config.stage_names, [config.hidden_sizes[0], *config.hidden_sizes], strict=True))
        affine = config.output_norm == "layernorm"
        return nn.ModuleDict(
            {name: nn.LayerNorm(widths[name], eps=config.layer_norm_eps, elementwise_affine=affine) for name in names}
        )

    def stage_outputs(self, pixel_values: Tensor) -> list[Tensor]:
        """Un-normed maps [B, H, W, C] of the stem and of each stage up to the tap."""
        if pixel_values.dim() != 4 or pixel_values.shape[1] != self.config.num_channels or 0 in pixel_values.shape:
            raise ValueError(
                f"{type(self).__name__}: pixel_values must be [batch, {self.config.num_channels}, height, width], got "
                f"{list(pixel_values.shape)}."
            )
        outputs = [self.stem(pixel_values)]
        for stage in self.stages:
            outputs.append(stage(outputs[-1]))
        return outputs

    def normed(self, name: str, x: Tensor) -> Tensor:
        """The map of stage `name` after its output norm, if the encoder has one there."""
        return self.output_norms[name](x) if name in self.output_norms else x


class SSMVisionModel(SSMVisionTrunk):
    """The encoder as a sequence model: `last_hidden_state` [B, N, C] holds the tap's map row by row.

    `hidden_states` are the stem's and each stage's maps as sequences; they differ in N and C, and the last of them is
    `last_hidden_state`. Works as vision tower of the stock `LlavaForConditionalGeneration`
    (`vision_feature_layer=-1, vision_feature_select_strategy="full"`). Without `add_output_norm` the tap's map is as
    the last block leaves it, whatever the config says.
    """

    def __init__(self, config: SSMVisionConfig, add_output_norm: bool = True):
        super().__init__(config)
        self.patch_size = config.patch_size
        self.output_norms = self._output_norms(config.out_features[-1:] if add_output_norm else [])
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
        outputs = self.stage_outputs(pixel_values)
        outputs[-1] = self.normed(self.config.out_features[-1], outputs[-1])
        sequences = [output.flatten(1, 2) for output in outputs]  # [B, N, C]
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=sequences[-1],
            pooler_output=sequences[-1].mean(1),
            hidden_states=None if output_hidden_states is False else tuple(sequences),
        )


class SSMVisionBackbone(BackboneMixin, SSMVisionTrunk):
    """The encoder as a Transformers Backbone: feature maps [B, C, H, W] of the stages named in `out_features`."""

    has_attentions = False

    def __init__(self, config: SSMVisionConfig):
        super().__init__(config)
        self.num_features = [config.hidden_sizes[0], *config.hidden_sizes]
        self.output_norms = self._output_norms(config.out_features)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: Tensor, **kwargs) -> BackboneOutput:
        """Encode pictures [B, channels, height, width] of any size; maps are taken before the next downsampling."""
        outputs = self.stage_outputs(pixel_values)
        named = dict(zip(self.stage_names, outputs, strict=False))
        return BackboneOutput(
            feature_maps=tuple(  # type: ignore[arg-type]  # of any length
                self.normed(name, named[name]).permute(0, 3, 1, 2) for name in self.out_features
            ),
            hidden_states=tuple(output.permute(0, 3, 1, 2) for output in outputs),
        )


class SSMVisionForImageClassification(SSMVisionPreTrainedModel):
    """Norm, mean over positions and a linear layer on the tap (by default the last stage).

    The norm is trained with the classifier and stands in place of the config's `output_norm`.
    """

    accepts_loss_kwargs = False

    def __init__(self, config: SSMVisionConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = SSMVisionModel(config, add_output_norm=False)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]  # None before init only
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs
    ) -> ImageClassifierOutputWithNoAttention:
        """Logits [B, num_labels], and the loss where `labels` [B] are given."""
        outputs = self.model(pixel_values, **kwargs)
        logits = self.classifier(self.norm(outputs.last_hidden_state).mean(1))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


__all__ = ["SSMVisionBackbone", "SSMVisionForImageClassification", "SSMVisionModel", "SSMVisionPreTrainedModel"]
