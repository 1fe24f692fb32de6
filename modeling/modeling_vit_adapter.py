"""ViT-Adapter (arXiv 2205.08534): a plain vision transformer and a convolutional pyramid that exchange features.

Written from the paper (sections 3.2 to 3.4), with the arithmetic of the published checkpoints. The ViT's tokens are
[B, N, C], row by row over a map of stride 16. The pyramid's three lower levels, at strides 8, 16 and 32, are one
sequence [B, M, C]; the level at stride 4 only joins at the end.

A picture is padded with zeros at the right and bottom to a multiple of 32 pixels, which the pyramid needs, and maps are
cut to the cells that hold picture. The reference takes multiples of 32 only, for which nothing is padded or cut.
"""

import math
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPoolingAndNoAttention
from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention
from transformers.utils.generic import can_return_tuple

from ..configuration.configuration_vit_adapter import VitAdapterConfig
from .drop_path import DropPath

PATCH = 16
CANVAS = 32
"""Canvas sides are multiples of the deepest level's stride."""

Grid = tuple[int, int]
"""Rows and columns of a map."""


class VitAdapterAttention(nn.Module):
    """Softmax attention of the ViT between all tokens, or inside windows."""

    def __init__(self, config: VitAdapterConfig, window_size: int):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.window_size = window_size
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        qkv = self.qkv(x)  # [B, N, 3 * C]
        if self.window_size:
            return self.out_proj(self._in_windows(qkv, grid))
        return self.out_proj(self._mixed(qkv))

    def _mixed(self, qkv: Tensor) -> Tensor:
        """[B, N, 3 * C] -> [B, N, C]"""
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, N, D]
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)

    def _in_windows(self, qkv: Tensor, grid: Grid) -> Tensor:
        """The same in each window of a grid from the top left. Cells past the edge are zero queries, keys and values.

        They are not masked: the published weights were trained so.
        """
        side = self.window_size
        bottom, right = -grid[0] % side, -grid[1] % side
        rows, columns = (grid[0] + bottom) // side, (grid[1] + right) // side
        cells = F.pad(qkv.unflatten(1, grid), (0, 0, 0, right, 0, bottom))
        windows = cells.unflatten(2, (columns, side)).unflatten(1, (rows, side)).transpose(2, 3)
        mixed = self._mixed(windows.reshape(-1, side * side, qkv.shape[-1]))
        mixed = mixed.reshape(-1, rows, columns, side, side, mixed.shape[-1]).transpose(2, 3)
        return mixed.flatten(3, 4).flatten(1, 2)[:, : grid[0], : grid[1]].flatten(1, 2)


class VitAdapterMLP(nn.Module):
    """Two linear layers at every position."""

    def __init__(self, config: VitAdapterConfig):
        super().__init__()
        width = round(config.hidden_size * config.mlp_ratio)
        self.fc1 = nn.Linear(config.hidden_size, width)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(width, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class VitAdapterBlock(GradientCheckpointingLayer):
    """One block of the ViT."""

    def __init__(self, config: VitAdapterConfig, window_size: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = VitAdapterAttention(config, window_size)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VitAdapterMLP(config)
        self.drop_path = DropPath(drop_path)
        self.scale1, self.scale2 = (
            nn.Parameter(torch.ones(config.hidden_size)) if config.layer_scale else None for _ in range(2)
        )

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        update = self.attention(self.norm1(x), grid)
        x = x + self.drop_path(update if self.scale1 is None else self.scale1 * update)
        update = self.mlp(self.norm2(x))
        return x + self.drop_path(update if self.scale2 is None else self.scale2 * update)


class VitAdapterConvLayer(nn.Module):
    """3x3 convolution, BatchNorm (where the reference synchronises its statistics) and ReLU."""

    def __init__(self, in_width: int, out_width: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(in_width, out_width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


class VitAdapterSpatialPrior(nn.Module):
    """The pyramid's beginning (section 3.3): a map [B, C, H, W] of the picture per level, at strides 4, 8, 16, 32."""

    def __init__(self, config: VitAdapterConfig):
        super().__init__()
        width = config.conv_inner_size
        widths = {"stage1": width, "stage2": 2 * width, "stage3": 4 * width, "stage4": 4 * width}
        self.stem = nn.Sequential(
            VitAdapterConvLayer(config.num_channels, width, stride=2),
            VitAdapterConvLayer(width, width, stride=1),
            VitAdapterConvLayer(width, width, stride=1),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        self.stage2 = VitAdapterConvLayer(widths["stage1"], widths["stage2"], stride=2)
        self.stage3 = VitAdapterConvLayer(widths["stage2"], widths["stage3"], stride=2)
        self.stage4 = VitAdapterConvLayer(widths["stage3"], widths["stage4"], stride=2)
        self.projections = nn.ModuleDict(
            {
                name: nn.Conv2d(width, config.hidden_size, kernel_size=1)
                for name, width in widths.items()
                if name != "stage1" or name in config.out_features
            }
        )

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        maps = {"stage1": self.stem(pixel_values)}
        for above, name in (("stage1", "stage2"), ("stage2", "stage3"), ("stage3", "stage4")):
            maps[name] = getattr(self, name)(maps[above])
        return {name: projection(maps[name]) for name, projection in self.projections.items()}


def cell_centres(grids: Iterable[Grid], device: torch.device) -> Tensor:
    """[N, 2]: x and y of the cells of maps, one map after the other, row by row, as fractions of width and height."""
    centres = []
    for rows, columns in grids:
        y = (torch.arange(rows, device=device, dtype=torch.float32) + 0.5) / rows
        x = (torch.arange(columns, device=device, dtype=torch.float32) + 0.5) / columns
        centres.append(torch.stack([x.repeat(rows), y.repeat_interleave(columns)], dim=-1))
    return torch.cat(centres)


class VitAdapterDeformableAttention(nn.Module):
    """Deformable attention (arXiv 2010.04159): each query reads a few points of each map, around its own place.

    Points and sums are computed in float32 at least: a map's cells are closer to each other than bfloat16's numbers.
    """

    def __init__(self, config: VitAdapterConfig, num_levels: int):
        super().__init__()
        self.num_heads, self.num_levels, self.num_points = (
            config.deform_num_heads,
            num_levels,
            config.deform_num_points,
        )
        reads = self.num_heads * num_levels * self.num_points
        self.sampling_offsets = nn.Linear(config.hidden_size, 2 * reads)
        self.attention_weights = nn.Linear(config.hidden_size, reads)
        self.value_proj = nn.Linear(config.hidden_size, config.value_size)
        self.output_proj = nn.Linear(config.value_size, config.hidden_size)
        self.sampler = MultiScaleDeformableAttention()

    def forward(self, query: Tensor, centres: Tensor, source: Tensor, grids: list[Grid]) -> Tensor:
        """
        Args:
            query: [B, Q, C].
            centres: [Q, 2], where each query is, as x and y in [0, 1].
            source: [B, S, C], the cells of all maps that are read.
            grids: rows and columns of those maps, one per level.
        """
        exact = torch.promote_types(query.dtype, torch.float32)
        shape = (self.num_heads, self.num_levels, self.num_points)
        weights = self.attention_weights(query).to(exact).unflatten(-1, (self.num_heads, -1)).softmax(-1)
        # Offsets are in cells of the map that is read.
        cells = torch.tensor([(columns, rows) for rows, columns in grids], dtype=exact, device=query.device)
        offsets = self.sampling_offsets(query).to(exact).unflatten(-1, (*shape, 2)) / cells[:, None]
        sizes = [rows * columns for rows, columns in grids]
        values = self.value_proj(source).to(exact).unflatten(-1, (self.num_heads, -1))  # [B, S, heads, D]
        read = self.sampler(
            values,
            torch.tensor(grids, device=query.device),
            grids,
            torch.tensor([sum(sizes[:level]) for level in range(len(sizes))], device=query.device),
            centres.to(exact)[:, None, None, None] + offsets,  # [B, Q, heads, levels, points, 2]
            weights.unflatten(-1, shape[1:]),
            64,
        )
        return self.output_proj(read.to(query.dtype))

    @torch.no_grad()
    def init_parameters(self) -> None:
        """Head k of n looks into direction 2 * pi * k / n, its points at 1, 2, 3, ... cells; all weigh the same."""
        for layer in (self.sampling_offsets, self.attention_weights):
            init.zeros_(layer.weight)
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1)
        offsets = directions[:, None, None] * steps[:, None]  # [heads, 1, points, 2]
        init.copy_(self.sampling_offsets.bias, offsets.expand(-1, self.num_levels, -1, -1).flatten())
        for layer in (self.value_proj, self.output_proj):
            init.xavier_uniform_(layer.weight)
        for layer in (self.attention_weights, self.value_proj, self.output_proj):
            init.zeros_(layer.bias)


class VitAdapterInjector(GradientCheckpointingLayer):
    """The ViT takes from the pyramid (equation 1)."""

    def __init__(self, config: VitAdapterConfig):
        super().__init__()
        self.query_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.source_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = VitAdapterDeformableAttention(config, num_levels=3)
        self.scale = nn.Parameter(torch.full((config.hidden_size,), float(config.injector_init_value)))

    def forward(self, x: Tensor, pyramid: Tensor, centres: Tensor, grids: list[Grid]) -> Tensor:
        read = self.attention(self.query_norm(x), centres, self.source_norm(pyramid), grids)
        return x + self.scale * read


class VitAdapterConvFFN(nn.Module):
    """Two linear layers at every cell with a depthwise convolution inside each level between them."""

    def __init__(self, config: VitAdapterConfig):
        super().__init__()
        width = round(config.hidden_size * config.conv_ffn_ratio)
        self.fc1 = nn.Linear(config.hidden_size, width)
        self.conv = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(width, config.hidden_size)

    def forward(self, x: Tensor, grids: list[Grid]) -> Tensor:
        levels = self.fc1(x).split([rows * columns for rows, columns in grids], dim=1)
        maps = [self.conv(as_map(level, grid)) for level, grid in zip(levels, grids, strict=True)]
        return self.fc2(self.act(torch.cat([as_tokens(level) for level in maps], dim=1)))


class VitAdapterExtractor(GradientCheckpointingLayer):
    """The pyramid takes from the ViT (equations 2 and 3)."""

    def __init__(self, config: VitAdapterConfig):
        super().__init__()
        self.query_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.source_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = VitAdapterDeformableAttention(config, num_levels=1)
        self.ffn = VitAdapterConvFFN(config) if config.conv_ffn_ratio > 0 else None
        if self.ffn is not None:
            self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.drop_path = DropPath(config.drop_path_rate)

    def forward(self, pyramid: Tensor, x: Tensor, centres: Tensor, grids: list[Grid], source_grid: Grid) -> Tensor:
        pyramid = pyramid + self.attention(self.query_norm(pyramid), centres, self.source_norm(x), [source_grid])
        if self.ffn is not None:
            pyramid = pyramid + self.drop_path(self.ffn(self.ffn_norm(pyramid), grids))
        return pyramid


class VitAdapterInteraction(nn.Module):
    """What surrounds a group of the ViT's blocks: an injector before it, extractors after it."""

    def __init__(self, config: VitAdapterConfig, num_extra_extractors: int):
        super().__init__()
        self.injector = VitAdapterInjector(config)
        self.extractor = VitAdapterExtractor(config)
        self.extra_extractors = nn.ModuleList(VitAdapterExtractor(config) for _ in range(num_extra_extractors))


def as_map(tokens: Tensor, grid: Grid) -> Tensor:
    """[B, H * W, C] -> [B, C, H, W]

    Contiguous, since torch 2.13's BatchNorm gives wrong gradients on the CPU for one picture in another order.
    """
    return tokens.transpose(1, 2).unflatten(2, grid).contiguous()


def as_tokens(feature_map: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H * W, C]"""
    return feature_map.flatten(2).transpose(1, 2)


def levels_of(sequence: Tensor, grids: dict[str, Grid], kept: list[str]) -> Tensor:
    """[..., M, C], all levels one after the other -> the same of those that are kept."""
    levels = sequence.split([math.prod(grid) for grid in grids.values()], dim=-2)
    return torch.cat([level for name, level in zip(grids, levels, strict=True) if name in kept], dim=-2)


class VitAdapterPreTrainedModel(PreTrainedModel):
    """What the models share: flags and the initial distribution of every parameter."""

    config: VitAdapterConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["VitAdapterBlock", "VitAdapterInjector", "VitAdapterExtractor"]
    # A tower must accept every implementation that the language model beside it is asked to use.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # norms
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            init.normal_(module.weight, std=(2.0 / fan_out) ** 0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, VitAdapterDeformableAttention):
            module.init_parameters()
        elif isinstance(module, VitAdapterInjector):
            init.constant_(module.scale, self.config.injector_init_value)
        elif isinstance(module, VitAdapterBlock):
            for scale in (module.scale1, module.scale2):
                if scale is not None:
                    init.ones_(scale)
        elif isinstance(module, VitAdapterTrunk):
            init.trunc_normal_(module.position_embeddings, std=self.config.initializer_range)
            init.normal_(module.level_embeddings)


class VitAdapterTrunk(VitAdapterPreTrainedModel):
    """Everything up to the pyramid: what Model and Backbone have in common."""

    def __init__(self, config: VitAdapterConfig):
        super().__init__(config)
        width, depth = config.hidden_size, config.num_hidden_layers
        group = depth // config.num_interactions
        rates = torch.linspace(0, config.drop_path_rate, depth, device="cpu").tolist()
        self.patch_embedding = nn.Conv2d(config.num_channels, width, kernel_size=PATCH, stride=PATCH)
        positions = (config.pretrain_image_size // PATCH) ** 2
        self.position_embeddings = nn.Parameter(torch.zeros(1, positions, width))
        self.level_embeddings = nn.Parameter(torch.zeros(3, width))
        self.spatial_prior = VitAdapterSpatialPrior(config)
        self.blocks = nn.ModuleList(
            VitAdapterBlock(config, 0 if block % group == group - 1 else config.window_size, rate)
            for block, rate in enumerate(rates)
        )
        extra = [0] * (config.num_interactions - 1) + [config.num_extra_extractors]
        self.interactions = nn.ModuleList(VitAdapterInteraction(config, number) for number in extra)
        if "stage1" in config.out_features:
            self.upsample = nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)
        self.norms = nn.ModuleDict({name: nn.BatchNorm2d(width) for name in config.out_features})

    def pyramid_and_tokens(self, pixel_values: Tensor) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """Encodes pictures [B, channels, height, width].

        Returns:
            level -> its normed map [B, C, ceil(height / stride), ceil(width / stride)], those of `out_features`; and
            the ViT's maps [B, C, H, W] after each interaction, at stride 16 of the padded canvas.
        """
        if pixel_values.dim() != 4 or pixel_values.shape[1] != self.config.num_channels or 0 in pixel_values.shape:
            raise ValueError(
                f"{type(self).__name__}: pixel_values must be [batch, {self.config.num_channels}, height, width], got "
                f"{list(pixel_values.shape)}."
            )
        height, width = pixel_values.shape[-2:]
        canvas = F.pad(pixel_values, (0, -width % CANVAS, 0, -height % CANVAS))
        grids = {
            name: (canvas.shape[-2] // stride, canvas.shape[-1] // stride)
            for name, stride in (("stage2", 8), ("stage3", 16), ("stage4", 32))
        }
        priors = self.spatial_prior(canvas)
        tokens, pyramid = self._interact(self._embed(canvas), self._sequence(priors, grids), grids)
        maps = self._levels(priors, pyramid, tokens, grids)
        normed = {}
        for name, stride in (("stage1", 4), ("stage2", 8), ("stage3", 16), ("stage4", 32)):
            if name in self.norms:
                # Cells that hold nothing but padding are cut away.
                normed[name] = self.norms[name](maps[name])[..., : -(-height // stride), : -(-width // stride)]
        return normed, tuple(tokens)

    def _embed(self, canvas: Tensor) -> Tensor:
        """The ViT's tokens [B, N, C], with their place."""
        patches = self.patch_embedding(canvas)
        side = math.isqrt(self.position_embeddings.shape[1])
        positions = as_map(self.position_embeddings, (side, side))
        positions = F.interpolate(positions, size=patches.shape[-2:], mode="bicubic", align_corners=False)
        return as_tokens(patches + positions)

    def _sequence(self, priors: dict[str, Tensor], grids: dict[str, Grid]) -> Tensor:
        """The three lower levels as one sequence, with their level."""
        levels = zip(grids, self.level_embeddings, strict=True)
        return torch.cat([as_tokens(priors[name]) + embedding for name, embedding in levels], dim=1)

    def _interact(self, x: Tensor, pyramid: Tensor, grids: dict[str, Grid]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The ViT's maps after each interaction, and the pyramid's maps after the last: of levels that are needed."""
        here, everywhere = cell_centres([grids["stage3"]], x.device), cell_centres(grids.values(), x.device)
        group = len(self.blocks) // len(self.interactions)
        tokens, kept = [], list(grids)
        for index, interaction in enumerate(cast(Iterable[VitAdapterInteraction], self.interactions)):
            x = interaction.injector(x, pyramid, here, list(grids.values()))
            for block in self.blocks[index * group : (index + 1) * group]:
                x = block(x, grids["stage3"])
            tokens.append(as_map(x, grids["stage3"]))
            if index == len(self.interactions) - 1:  # nothing reads the pyramid any more: each level is on its own
                kept = [name for name in grids if self._is_needed(name)]
                pyramid, everywhere = (levels_of(sequence, grids, kept) for sequence in (pyramid, everywhere))
            for extractor in (interaction.extractor, *interaction.extra_extractors):
                pyramid = extractor(pyramid, x, everywhere, [grids[name] for name in kept], grids["stage3"])
        levels = pyramid.split([math.prod(grids[name]) for name in kept], dim=1)
        return tokens, {name: as_map(level, grids[name]) for name, level in zip(kept, levels, strict=True)}

    def _is_needed(self, name: str) -> bool:
        """Whether a level is returned, or is what "stage1" is made of."""
        return name in self.norms or (name == "stage2" and "stage1" in self.norms)

    def _levels(
        self, priors: dict[str, Tensor], pyramid: dict[str, Tensor], tokens: list[Tensor], grids: dict[str, Grid]
    ) -> dict[str, Tensor]:
        """The maps before their norms: the pyramid's and, added to them, the ViT's."""
        maps = dict(pyramid)
        if "stage1" in self.norms:
            maps["stage1"] = self.upsample(pyramid["stage2"]) + priors["stage1"]
        if self.config.added_vit_features == "none":
            return maps
        scales = {"stage1": 4.0, "stage2": 2.0, "stage3": 1.0, "stage4": 0.5}
        for index, (name, scale) in enumerate(scales.items()):
            if name in self.norms:
                added = tokens[index if self.config.added_vit_features == "each" else -1]
                if scale != 1.0:
                    added = F.interpolate(added, scale_factor=scale, mode="bilinear", align_corners=False)
                maps[name] = maps[name] + added
        return maps


class VitAdapterModel(VitAdapterTrunk):
    """The encoder as a sequence model: `last_hidden_state` [B, N, C] holds the tap's map row by row.

    The tap is the last of `out_features`; the parameters are those of the Backbone.
    """

    def __init__(self, config: VitAdapterConfig):
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | int | list[int] | None = None, **kwargs
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        """Encode pictures.

        Args:
            pixel_values: [B, channels, height, width] of any size.
            output_hidden_states: whether to return `hidden_states`, the ViT's tokens after each interaction and the
                tap's. Indices (what stock VLMs pass) return them all.
        """
        levels, tokens = self.pyramid_and_tokens(pixel_values)
        last = as_tokens(levels[self.config.out_features[-1]])
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=last,
            pooler_output=last.mean(1),
            hidden_states=None if output_hidden_states is False else (*(as_tokens(x) for x in tokens), last),
        )


class VitAdapterBackbone(BackboneMixin, VitAdapterTrunk):
    """The encoder as a Transformers Backbone: the maps [B, C, H, W] of the levels named in `out_features`.

    `hidden_states` are the ViT's maps after each interaction.
    """

    has_attentions = False

    def __init__(self, config: VitAdapterConfig):
        super().__init__(config)
        self.num_features = [config.hidden_size] * len(config.stage_names)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: Tensor, **kwargs) -> BackboneOutput:
        """Encode pictures [B, channels, height, width] of any size."""
        levels, tokens = self.pyramid_and_tokens(pixel_values)
        return BackboneOutput(
            feature_maps=tuple(levels[name] for name in self.out_features),  # type: ignore[arg-type]  # of any length
            hidden_states=tokens,
        )


__all__ = ["VitAdapterBackbone", "VitAdapterModel", "VitAdapterPreTrainedModel"]
