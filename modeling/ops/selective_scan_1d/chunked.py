"""The selective scan of a sequence, laid out as a square map whose rows are the chunks of a two-level recurrence."""

import math

from torch import Tensor
from torch.nn import functional as F

from ..selective_scan_2d.chunked import selective_scan_2d_chunked


def selective_scan_1d_chunked(
    x: Tensor,
    dt_low_rank: Tensor,
    b: Tensor,
    c: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    a_log: Tensor,
    d: Tensor,
) -> Tensor:
    """Equals `selective_scan_1d_naive`, on any device, for any length and number of states; not twice differentiable.

    The first of the four directions of a map, row by row, is the sequence itself. Zeros after its end fill the last
    row: nothing before them depends on them.
    """
    length = x.shape[1]
    columns = math.isqrt(length - 1) + 1
    rows = -(-length // columns)

    def as_map(values: Tensor) -> Tensor:
        """[B, L, M] -> [B, rows, columns, M]"""
        if rows * columns > length:
            values = F.pad(values, (0, 0, 0, rows * columns - length))
        return values.unflatten(1, (rows, columns))

    directed = (as_map(values).unsqueeze(3) for values in (dt_low_rank, b, c))  # one direction
    parameters = (parameter.unsqueeze(0) for parameter in (dt_weight, dt_bias, a_log, d))
    return selective_scan_2d_chunked(as_map(x), *directed, *parameters).flatten(1, 2)[:, :length]
