"""The mixer slot of the hierarchical encoder: modules that let positions of a map exchange information.

A mixer is built as `Mixer(config, stage, block)`, maps [B, H, W, C] to [B, H, W, C] for any H and W, and owns the
configuration fields it reads. Linear layers, convolutions and norms in it are initialised like all others of the
encoder; a mixer with parameters of its own fills them in `init_parameters(config)`. Attention mixers run torch's scaled
dot product attention, which picks its own kernel.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from ..configuration.configuration_ssm_vision import SSMVisionConfig
from .ops.selective_scan_2d import selective_scan_2d
from .strips import in_strips


class ChannelsLastConv2d(nn.Conv2d):
    """Convolution of a channels-last map: [B, H, W, C] -> [B, H', W', C']. No copy: the layout is torch's own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class SelectiveScan2dMixer(nn.Module):
    """VMamba's SS2D: projection, depthwise convolution, selective scan in four directions, norm, projection.

    arXiv 2401.10166, section 4. `gated=True` is v0's form, `gated=False` the released v2 form without gate.
    """

    def __init__(self, config: SSMVisionConfig, stage: int, block: int):
        super().__init__()
        width = config.hidden_sizes[stage]
        inner = int(config.ssm_ratio * width)
        rank = math.ceil(width / 16) if config.dt_rank == "auto" else config.dt_rank
        states = config.d_state
        self.inner, self.rank, self.states, self.gated = inner, rank, states, config.gated
        self.in_proj = nn.Linear(width, 2 * inner if config.gated else inner, bias=False)
        self.conv = ChannelsLastConv2d(inner, inner, 3, padding=1, groups=inner, bias=config.conv_bias)
        self.x_proj_weight = nn.Parameter(torch.empty(4, rank + 2 * states, inner))
        self.dt_weight = nn.Parameter(torch.empty(4, inner, rank))
        self.dt_bias = nn.Parameter(torch.empty(4, inner))
        self.a_log = nn.Parameter(torch.empty(4, inner, states))
        self.d = nn.Parameter(torch.empty(4, inner))
        self.out_norm = nn.LayerNorm(inner, eps=config.layer_norm_eps)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def init_parameters(self, config: SSMVisionConfig) -> None:
        """Step sizes log-uniform in [dt_min, dt_max], decay rates 1..N, skip 1 (Mamba, arXiv 2312.00752, 3.6)."""
        inner, rank = self.inner, self.rank  # a sharded parameter has no shape here
        init.uniform_(self.x_proj_weight, -(inner**-0.5), inner**-0.5)
        init.uniform_(self.dt_weight, -(rank**-0.5), rank**-0.5)
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        dt = torch.exp(torch.rand(4, inner, device=self.dt_bias.device) * (high - low) + low).clamp(min=1e-4)
        init.copy_(self.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # softplus of this is dt
        states = torch.arange(1, self.states + 1, device=self.a_log.device, dtype=torch.float32)
        init.copy_(self.a_log, states.log().expand(4, inner, -1))
        init.ones_(self.d)

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_proj(x)  # [B, H, W, E], gated: [B, H, W, 2E]
        if self.gated:
            x, gate = x.chunk(2, dim=-1)
        is_ours = not torch.is_grad_enabled() and not self.conv._forward_hooks  # what the convolution gives
        x = F.silu(self.conv(x), inplace=is_ours)
        projected = F.linear(x, self.x_proj_weight.flatten(0, 1)).unflatten(-1, (4, -1))  # [B, H, W, 4, R + 2N]
        dt_low_rank, b, c = projected.split([self.rank, self.states, self.states], dim=-1)
        x = selective_scan_2d(x, dt_low_rank, b, c, self.dt_weight, self.dt_bias, self.a_log, self.d)
        return in_strips(self, self._output, *((x, gate) if self.gated else (x,)))

    def _output(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        x = self.out_norm(x)
        if gate is not None:
            x = x * F.silu(gate)
        return self.out_proj(x)


class DepthwiseConvMixer(nn.Module):
    """SS2D's frame with the scan replaced by a wider depthwise convolution: what a local mixer gets to."""

    def __init__(self, config: SSMVisionConfig, stage: int, block: int):
        super().__init__()
        width = config.hidden_sizes[stage]
        inner = int(config.dwconv_ratio * width)
        kernel = config.dwconv_kernel
        self.in_proj = nn.Linear(width, inner, bias=False)
        self.conv = ChannelsLastConv2d(inner, inner, kernel, padding=kernel // 2, groups=inner)
        self.out_norm = nn.LayerNorm(inner, eps=config.layer_norm_eps)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(self.out_norm(F.silu(self.conv(self.in_proj(x)))))


def axial_rotary(height: int, width: int, head_dim: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine, [H, W, head_dim / 2], of the rotary angles: rows turn the first half of the pairs, columns the
    second, so that a score depends on the two offsets only."""
    pairs = head_dim // 4
    frequency = theta ** (-torch.arange(pairs, device=like.device, dtype=torch.float32) / pairs)
    rows = torch.arange(height, device=like.device, dtype=torch.float32)[:, None, None] * frequency  # [H, 1, P]
    columns = torch.arange(width, device=like.device, dtype=torch.float32)[None, :, None] * frequency  # [1, W, P]
    angles = torch.cat([rows.expand(-1, width, -1), columns.expand(height, -1, -1)], dim=-1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


class GlobalAttentionMixer(nn.Module):
    """Softmax attention between all positions, with two-dimensional rotary position encoding (any map size)."""

    def __init__(self, config: SSMVisionConfig, stage: int, block: int):
        super().__init__()
        width = config.hidden_sizes[stage]
        self.head_dim = config.head_dim
        self.rope_theta = config.rope_theta
        self.qkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries, rotated keys, and values, each [B, H, W, heads, head_dim]."""
        query, key, value = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).unbind(3)
        cos, sin = axial_rotary(x.shape[1], x.shape[2], self.head_dim, self.rope_theta, query)
        cos, sin = cos[:, :, None], sin[:, :, None]  # [H, W, 1, head_dim / 2]

        def rotate(vectors: Tensor) -> Tensor:
            first, second = vectors.chunk(2, dim=-1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

        return rotate(query), rotate(key), value

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (tensor.flatten(1, 2).transpose(1, 2) for tensor in self.project(x))  # [B, heads, N, D]
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.out_proj(mixed.transpose(1, 2).reshape(x.shape))


class WindowAttentionMixer(GlobalAttentionMixer):
    """Attention inside square windows; every second block moves the windows by half their side (arXiv 2103.14030).

    Maps that the windows do not divide are padded, and padding is masked out, so that border windows are smaller.
    """

    def __init__(self, config: SSMVisionConfig, stage: int, block: int):
        super().__init__(config, stage, block)
        self.window_size = config.window_size
        self.shifted = block % 2 == 1

    def _padding(self, size: int) -> tuple[int, int]:
        """Positions to add before and after one side of the map. A side that fits one window is not shifted."""
        before = self.window_size // 2 if self.shifted and size > self.window_size else 0
        return before, -(size + before) % self.window_size

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        side = self.window_size
        (top, bottom), (left, right) = self._padding(height), self._padding(width)
        pad = (left, right, top, bottom)
        rows, columns = (height + top + bottom) // side, (width + left + right) // side

        def windows(tensor: Tensor) -> Tensor:
            """[B, H, W, M] -> [B * windows, side * side, M]"""
            tensor = F.pad(tensor, (0, 0, *pad)).view(tensor.shape[0], rows, side, columns, side, -1)
            return tensor.transpose(2, 3).reshape(-1, side * side, tensor.shape[-1])

        query, key, value = (
            windows(tensor.flatten(3)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for tensor in self.project(x)
        )  # [B * windows, heads, side * side, D]
        mask = None
        if any(pad):
            inside = windows(torch.ones(1, height, width, 1, dtype=torch.bool, device=x.device))  # [windows, side², 1]
            mask = inside.repeat(batch, 1, 1)[:, None, None, :, 0]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        mixed = mixed.transpose(1, 2).reshape(batch, rows, columns, side, side, channels).transpose(2, 3)
        mixed = mixed.reshape(batch, rows * side, columns * side, channels)
        return self.out_proj(mixed[:, top : top + height, left : left + width])


class IdentityMixer(nn.Identity):
    """No mixing: what stem, downsampling and MLP reach alone."""

    def __init__(self, config: SSMVisionConfig, stage: int, block: int):
        super().__init__()


MIXERS = {
    "ss2d": SelectiveScan2dMixer,
    "dwconv": DepthwiseConvMixer,
    "window_attention": WindowAttentionMixer,
    "global_attention": GlobalAttentionMixer,
    "identity": IdentityMixer,
}
"""Name in `SSMVisionConfig.mixer` -> module class."""


__all__ = ["MIXERS", "ChannelsLastConv2d", "SelectiveScan2dMixer"]
