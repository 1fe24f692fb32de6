"""How sure a share is that was counted on so many items."""

import math

_Z = 1.959963984540054  # 97.5 % of a normal distribution lie below it


def wilson_interval(share: float, items: int) -> tuple[float, float]:
    """95 % interval of a share, as if items were independent and each right or wrong (Wilson, 1927).

    Scores between right and wrong spread less, so that of them it is on the wide side. Items that share a picture are
    not independent, which it does not know.

    Args:
        share: from 0 to 1.
        items: at least 1.
    """
    scale = 1 + _Z**2 / items
    middle = (share + _Z**2 / (2 * items)) / scale
    half = _Z * math.sqrt(share * (1 - share) / items + _Z**2 / (4 * items**2)) / scale
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


__all__ = ["wilson_interval"]
