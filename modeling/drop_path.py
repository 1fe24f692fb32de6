"""Stochastic depth, as the encoders of this library have it."""

from torch import Tensor, nn


class DropPath(nn.Module):
    """Stochastic depth per sample (arXiv 1603.09382); inert in eval mode."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        mask = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(keep)
        return x * mask / keep


__all__ = ["DropPath"]
