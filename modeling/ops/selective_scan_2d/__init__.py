"""Two-dimensional selective scan: one public function, a readable oracle and faster backends behind it."""

from torch import Tensor

from ..scan_backends import choose_backend
from .chunked import selective_scan_2d_chunked
from .naive import selective_scan_2d_naive

BACKENDS = {"naive": selective_scan_2d_naive, "chunked": selective_scan_2d_chunked}
"""Name -> implementation. All take the tensors of `selective_scan_2d` in its order and agree with `naive`."""


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

    The state is kept in float32 (float64 where `x` is float64) whatever the dtype of the inputs. Projections that
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
            that fits.

    Returns:
        [B, H, W, E] in the dtype of `x`.

    Raises:
        ValueError: for shapes that do not fit together, an empty map, or an unknown backend.
    """
    _check_shapes(x, dt_low_rank, b, c, dt_weight, dt_bias, a_log, d)
    return choose_backend("selective_scan_2d", BACKENDS, x, backend)(x, dt_low_rank, b, c, dt_weight, dt_bias, a_log, d)


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
