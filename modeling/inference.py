"""Inference with fewer launches and passes over memory: one option for every encoder."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def compile_for_inference(model: nn.Module, **options: Any) -> Callable[..., Any]:
    """The model compiled for repeated calls with inputs of one shape each, under `no_grad`.

    Each new shape costs a compilation (a minute or so for a whole encoder) at its first call.

    Args:
        model: an encoder or any other module in `eval()`. It is not changed; weights that change later are seen.
        options: for `torch.compile`.

    Returns:
        A function with the model's arguments and results.

    Raises:
        ValueError: the model is in training mode.
    """
    if model.training:
        raise ValueError("compile_for_inference needs a model in eval(): in training, stochastic depth would be kept.")
    on_cuda = next(model.parameters()).is_cuda
    settings = {"dynamic": False, "mode": "reduce-overhead" if on_cuda else "default"} | options
    compiled = torch.compile(model, **settings)

    def run(*inputs: Any, **keywords: Any) -> Any:
        with torch.no_grad():
            return compiled(*inputs, **keywords)

    return run


__all__ = ["compile_for_inference"]
