"""The scan as an operator of torch, `torch.ops.ssm_vlm.selective_scan_2d`, with its gradient, shapes and FLOPs.

`torch.compile`, `torch.export`, activation checkpointing, autocast and `FlopCounterMode` see one operator, whatever
backend runs inside it. Where the library and the code of a saved model are in one process, the first to come registers.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..scan_backends import Backend, choose_backend
from .chunked import backward as chunked_backward
from .chunked import forward as chunked_forward
from .chunked import why_not as why_not_chunked
from .cpp import backward as cpp_backward
from .cpp import forward as cpp_forward
from .cpp import why_not as why_not_cpp
from .triton import backward as triton_backward
from .triton import forward as triton_forward
from .triton import why_not as why_not_triton

BACKENDS = {
    "triton": Backend(triton_forward, triton_backward, why_not_triton),
    "cpp": Backend(cpp_forward, cpp_backward, why_not_cpp),
    "chunked": Backend(chunked_forward, chunked_backward, why_not_chunked),
}
"""Name -> implementation, the fastest first. All agree with `selective_scan_2d_naive`."""

NAME = "selective_scan_2d"
_INPUTS = "Tensor x, Tensor dt_low_rank, Tensor b, Tensor c, Tensor dt_weight, Tensor dt_bias, Tensor a_log, Tensor d"
_SCHEMA = f"({_INPUTS}, str? backend) -> Tensor"
_BACKWARD_SCHEMA = f"(Tensor grad, {_INPUTS}, str? backend) -> ({', '.join(['Tensor'] * 8)})"


def selective_scan_flops(positions: int, channels: int, states: int, rank: int, directions: int = 4) -> int:
    """Operations of one scan: of a map in four directions, of a sequence in one.

    Per direction, position and channel: 9 per state and 2 for the skip (the convention of VMamba's own counter, after
    https://github.com/state-spaces/mamba/issues/110), and 2 per rank for the step size projection, a matrix product.
    """
    return directions * positions * channels * (9 * states + 2 + 2 * rank)


def _scan(*arguments: Any) -> Tensor:
    *tensors, backend = arguments
    with torch.autocast(tensors[0].device.type, enabled=False):  # states and their projections stay in float32
        return choose_backend(NAME, BACKENDS, tuple(tensors), backend).forward(*tensors).contiguous()


def _scan_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *tensors, backend = arguments
    with torch.autocast(tensors[0].device.type, enabled=False):
        grads = choose_backend(NAME, BACKENDS, tuple(tensors), backend).backward(grad, *tensors)
    return tuple(map(_alone, grads))


def _alone(gradient: Tensor) -> Tensor:
    """Contiguous and in memory of its own, as results of an operator have to be: of one channel or position, a slice
    of what all gradients were summed in is contiguous already."""
    gradient = gradient.contiguous()
    return gradient.clone() if gradient.untyped_storage().nbytes() > gradient.nbytes else gradient


def _fake(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in arguments[:8])


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.ssm_vlm.selective_scan_2d_backward(grad, *ctx.saved_tensors, ctx.backend), None


def _flops(x_shape, low_rank_shape, b_shape, *others, out_shape=None, **named) -> int:
    *positions, channels = x_shape
    directions, rank = low_rank_shape[3:]
    return selective_scan_flops(math.prod(positions), channels, b_shape[4], rank, directions)


def _backward_flops(grad_shape, *shapes, out_shape=None, **named) -> int:
    """By the counter's convention for products: as much again for each of the two factors."""
    return 2 * _flops(*shapes)


def register() -> None:
    """Registers the operator, its gradient and their FLOPs, if no other copy of this file has."""
    if hasattr(torch.ops.ssm_vlm, NAME):
        return
    define = torch.library.custom_op
    scan = define(f"ssm_vlm::{NAME}", _scan, mutates_args=(), schema=_SCHEMA)
    scan.register_fake(_fake)
    scan.register_autograd(_gradient, setup_context=_save)
    define(f"ssm_vlm::{NAME}_backward", _scan_backward, mutates_args=(), schema=_BACKWARD_SCHEMA).register_fake(
        _fake_backward
    )
    register_flop_formula(torch.ops.ssm_vlm.selective_scan_2d)(_flops)
    register_flop_formula(torch.ops.ssm_vlm.selective_scan_2d_backward)(_backward_flops)


register()

__all__ = ["BACKENDS", "NAME", "selective_scan_flops"]
