"""The four-direction selective scan as a loop over positions: readable, slow, the oracle of every faster version."""

import torch
from torch import Tensor
from torch.nn import functional as F


def scan_orders(height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """Row-major index of the position visited at each step, [4, L]: by rows, by columns, and both reversed."""
    rows = torch.arange(height * width, device=device)
    columns = rows.view(height, width).t().reshape(-1)
    return torch.stack([rows, columns, rows.flip(0), columns.flip(0)])


def selective_scan_2d_naive(
    x: Tensor,
    dt_low_rank: Tensor,
    b: Tensor,
    c: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    a_log: Tensor,
    d: Tensor,
) -> Tensor:
    """Scan a map along four orders and sum the four results (VMamba, arXiv 2401.10166, section 4.2).

    For each order k and inner channel e, with t counting positions in that order,

        delta_t = softplus(dt_weight[k, e] . dt_low_rank_t + dt_bias[k, e])
        h_t     = exp(-exp(a_log[k, e]) delta_t) h_{t-1} + delta_t b_t x_t          (N states, h before the first is 0)
        y_t     = c_t . h_t + d[k, e] x_t

    Shapes as in `selective_scan_2d`. Computes in float32, or float64 where `x` is float64.
    """
    batch, height, width, channels = x.shape
    length = height * width
    dtype = torch.promote_types(x.dtype, torch.float32)
    dt_weight, dt_bias, a_log, d = (parameter.to(dtype) for parameter in (dt_weight, dt_bias, a_log, d))
    orders = scan_orders(height, width, x.device)  # [4, L]

    def along_orders(values: Tensor) -> Tensor:
        """[B, H, W, 4, M] -> [B, L, 4, M], where entry [:, t, k] is the t-th position of order k."""
        flat = values.to(dtype).flatten(1, 2)
        return torch.stack([flat[:, order, k] for k, order in enumerate(orders)], dim=2)

    u = along_orders(x[:, :, :, None].expand(-1, -1, -1, 4, -1))  # [B, L, 4, E]
    b, c = along_orders(b), along_orders(c)  # [B, L, 4, N]
    delta = torch.einsum("blkr,ker->blke", along_orders(dt_low_rank), dt_weight) + dt_bias
    delta = F.softplus(delta)  # [B, L, 4, E]
    rate = -torch.exp(a_log)  # [4, E, N]

    state = u.new_zeros(batch, 4, channels, b.shape[-1])  # [B, 4, E, N]
    outputs = []
    for t in range(length):
        decay = torch.exp(delta[:, t, :, :, None] * rate)
        state = decay * state + (delta[:, t] * u[:, t])[..., None] * b[:, t, :, None]
        outputs.append((state * c[:, t, :, None]).sum(-1))
    y = torch.stack(outputs, dim=1) + d * u  # [B, L, 4, E]

    merged = torch.stack([y[:, order.argsort(), k] for k, order in enumerate(orders)]).sum(0)  # [B, L, E]
    return merged.view(batch, height, width, channels).to(x.dtype)
