"""Two-dimensional selective scan: one public function, a readable oracle and faster backends behind it."""

import torch
from torch import Tensor

from ..scan_backends import asked_for, log_once
from .custom_op import BACKENDS as FAST_BACKENDS
from .custom_op import NAME
from .naive import selective_scan_2d_naive

BACKENDS = ("naive", *FAST_BACKENDS)
"""Names of all implementations; `naive` is plain torch code, the others run inside one registered operator."""


def selective_scan_2d(
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
    """Scan a map by rows, by columns and along both reversed orders, and sum the four results at each position.

    The state is kept in float32 (float64 where `x` is float64) whatever the dtype of the inputs. Differentiable once
    (`naive`: any number of times). Projections that
    depend on the position stay in map order: the op does the reordering.

    Args:
        x: input map, [B, H, W, E].
        dt_low_rank: low-rank step sizes of each direction, [B, H, W, 4, R].
        b: input projections, [B, H, W, 4, N].
        c: output projections, [B, H, W, 4, N].
        dt_weight: [4, E, R], and `dt_bias` [4, E]: step size = softplus(dt_weight dt_low_rank + dt_bias).
        a_log: logarithm of the decay rates, [4, E, N].
        d: weight of the skip, [4, E].
        backend: name in `BACKENDS`; by default the environment variable `SSM_VLM_SCAN_BACKEND`, else the fastest one
            that fits. On a CPU that is `cpp` for all but small maps where there is a C++ compiler, else `chunked`.

    Returns:
        [B, H, W, E] in the dtype of `x`.

    Raises:
        ValueError: for shapes that do not fit together, an empty map, or an unknown backend.
        RuntimeError: the backend that is asked for cannot run on these tensors or on this machine.
    """
    _check_shapes(x, dt_low_rank, b, c, dt_weight, dt_bias, a_log, d)
    tensors = (x, dt_low_rank, b, c, dt_weight, dt_bias, a_log, d)
    name, reason = asked_for(backend)
    if name == "naive" and not x.is_meta:  # no loop where there is nothing to compute
        log_once(NAME, name, reason)
        return selective_scan_2d_naive(*tensors)
    return torch.ops.ssm_vlm.selective_scan_2d(*tensors, backend)


def _check_shapes(
    x: Tensor, dt_low_rank: Tensor, b: Tensor, c: Tensor, dt_weight: Tensor, dt_bias: Tensor, a_log: Tensor, d: Tensor
) -> None:
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"selective_scan_2d: x must be [B, H, W, E] with no empty side, got {list(x.shape)}.")
    *positions, channels = x.shape
    rank, states = dt_weight.shape[-1], a_log.shape[-1]
    expected = {
        "dt_low_rank": (dt_low_rank, [*positions, 4, rank]),
        "b": (b, [*positions, 4, states]),
        "c": (c, [*positions, 4, states]),
        "dt_weight": (dt_weight, [4, channels, rank]),
        "dt_bias": (dt_bias, [4, channels]),
        "a_log": (a_log, [4, channels, states]),
        "d": (d, [4, channels]),
    }
    for name, (tensor, shape) in expected.items():
        if list(tensor.shape) != shape:
            raise ValueError(
                f"selective_scan_2d: {name} must be {shape} for x {list(x.shape)}, rank {rank} and {states} states, "
                f"got {list(tensor.shape)}."
            )


__all__ = ["BACKENDS", "selective_scan_2d"]
