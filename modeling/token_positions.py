"""Codes of where on the canvas an image token lies, without parameters."""

import math
from collections.abc import Callable

import torch

HIGHEST_FREQUENCY = 64  # half periods over the canvas: neighbours on a 64 x 64 grid still differ


def sincos_2d(height: int, width: int, channels: int) -> torch.Tensor:
    """Sines and cosines of the relative row and column of each cell of a grid.

    Frequencies are half a period to `HIGHEST_FREQUENCY` half periods over the canvas, in geometric steps, so that codes
    do not depend on the grid's resolution and the lowest ones read off linearly where a token lies.

    Returns:
        [height * width, channels], row by row: a quarter of the channels each sin(row), cos(row), sin(column),
        cos(column).
    """
    quarter = -(-channels // 4)
    frequencies = math.pi * HIGHEST_FREQUENCY ** torch.linspace(0, 1, quarter, dtype=torch.float64)
    rows, columns = ((torch.arange(cells, dtype=torch.float64) + 0.5) / cells for cells in (height, width))
    by_row, by_column = rows[:, None] * frequencies, columns[:, None] * frequencies  # [h, quarter], [w, quarter]
    of_row = torch.cat([by_row.sin(), by_row.cos()], 1)[:, None].expand(-1, width, -1)
    of_column = torch.cat([by_column.sin(), by_column.cos()], 1)[None].expand(height, -1, -1)
    return torch.cat([of_row, of_column], 2).flatten(0, 1)[:, :channels].float()


TOKEN_POSITIONS: dict[str, Callable[[int, int, int], torch.Tensor] | None] = {"none": None, "sincos2d": sincos_2d}
"""Name in `LlavaStyleConfig.token_positions` -> codes [h * w, C] of a grid, or None to add nothing."""
