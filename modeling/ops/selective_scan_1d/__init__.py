"""Selective scan of a sequence: a readable oracle, and the scan of a map of one row in one of its directions."""

import torch
from torch import Tensor

from ..scan_backends import asked_for, log_once
from ..selective_scan_2d import BACKENDS
from .naive import selective_scan_1d_naive


def selective_scan_1d(
    x: Tensor,
    dt_low_rank: Tensor,
    b: Tensor,
    c: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    a_log: Tensor,
    d: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Scan each sequence from its first position to its last (Mamba, arXiv 2312.00752).

    The state is kept in float32 (float64 where `x` is float64) whatever the dtype of the inputs.

    Args:
        x: input sequences, [B, L, E].
        dt_low_rank: low-rank step sizes, [B, L, R].
        b: input projections, [B, L, N].
        c: output projections, [B, L, N].
        dt_weight: [E, R], and `dt_bias` [E]: step size = softplus(dt_weight dt_low_rank + dt_bias).
        a_log: logarithm of the decay rates, [E, N].
        d: weight of the skip, [E].
        backend: name in `BACKENDS`; by default the environment variable `SSM_VLM_SCAN_BACKEND`, else the fastest one
            that fits.

    Returns:
        [B, L, E] in the dtype of `x`.

    Raises:
        ValueError: for shapes that do not fit together, an empty sequence, or an unknown backend.
        RuntimeError: the backend that is asked for cannot run on these tensors or on this machine.
    """
    _check_shapes(x, dt_low_rank, b, c, dt_weight, dt_bias, a_log, d)
    name, reason = asked_for(backend)
    if name == "naive" and not x.is_meta:  # no loop where there is nothing to compute
        log_once("selective_scan_1d", name, reason)
        return selective_scan_1d_naive(x, dt_low_rank, b, c, dt_weight, dt_bias, a_log, d)
    directed = (values[:, None, :, None] for values in (dt_low_rank, b, c))  # [B, 1, L, 1, *]
    parameters = (parameter.unsqueeze(0) for parameter in (dt_weight, dt_bias, a_log, d))
    return torch.ops.ssm_vlm.selective_scan_2d(x.unsqueeze(1), *directed, *parameters, backend).squeeze(1)


def _check_shapes(
    x: Tensor, dt_low_rank: Tensor, b: Tensor, c: Tensor, dt_weight: Tensor, dt_bias: Tensor, a_log: Tensor, d: Tensor
) -> None:
    if x.dim() != 3 or 0 in x.shape:
        raise ValueError(f"selective_scan_1d: x must be [B, L, E] with no empty side, got {list(x.shape)}.")
    *positions, channels = x.shape
    rank, states = dt_weight.shape[-1], a_log.shape[-1]
    expected = {
        "dt_low_rank": (dt_low_rank, [*positions, rank]),
        "b": (b, [*positions, states]),
        "c": (c, [*positions, states]),
        "dt_weight": (dt_weight, [channels, rank]),
        "dt_bias": (dt_bias, [channels]),
        "a_log": (a_log, [channels, states]),
        "d": (d, [channels]),
    }
    for name, (tensor, shape) in expected.items():
        if list(tensor.shape) != shape:
            raise ValueError(
                f"selective_scan_1d: {name} must be {shape} for x {list(x.shape)}, rank {rank} and {states} states, "
                f"got {list(tensor.shape)}."
            )


__all__ = ["BACKENDS", "selective_scan_1d"]
