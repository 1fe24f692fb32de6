"""The selective scan of a sequence as a loop over positions: readable, slow, the oracle of every faster version."""

import torch
from torch import Tensor
from torch.nn import functional as F


def selective_scan_1d_naive(
    x: Tensor,
    dt_low_rank: Tensor,
    b: Tensor,
    c: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    a_log: Tensor,
    d: Tensor,
) -> Tensor:
    """The state space recurrence of Mamba (arXiv 2312.00752, equations 2a and 2b with the steps of algorithm 2).

    For each inner channel e, with t counting positions,

        delta_t = softplus(dt_weight[e] . dt_low_rank_t + dt_bias[e])
        h_t     = exp(-exp(a_log[e]) delta_t) h_{t-1} + delta_t b_t x_t          (N states, h before the first is 0)
        y_t     = c_t . h_t + d[e] x_t

    Shapes as in `selective_scan_1d`. Computes in float32, or float64 where `x` is float64.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    u, low_rank, b, c = (values.to(dtype) for values in (x, dt_low_rank, b, c))
    dt_weight, dt_bias, a_log, d = (parameter.to(dtype) for parameter in (dt_weight, dt_bias, a_log, d))
    delta = F.softplus(torch.einsum("blr,er->ble", low_rank, dt_weight) + dt_bias)  # [B, L, E]
    rate = -torch.exp(a_log)  # [E, N]

    state = u.new_zeros(u.shape[0], u.shape[2], b.shape[2])  # [B, E, N]
    outputs = []
    for t in range(u.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * rate)
        state = decay * state + (delta[:, t] * u[:, t])[..., None] * b[:, t, None]
        outputs.append((state * c[:, t, None]).sum(-1))
    return (torch.stack(outputs, dim=1) + d * u).to(x.dtype)
