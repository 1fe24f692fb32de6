"""The four-direction selective scan in plain torch operations, vectorised over the rows or columns of the map.

Rows (columns) are the chunks of a two-level recurrence: one pass steps through all rows at once and keeps only where
each row ends, a short loop carries states from row to row, and a second pass steps through all rows from their true
start. A map of L positions so takes about 3 sqrt(L) vectorised steps instead of L, and nothing is ever reordered or
transposed: a step reads one column (row) of the map in place, forwards or backwards.

Images, directions and channels are independent, so the work is cut into units whose temporaries stay in cache, and the
states are treated one at a time. The backward pass is written by hand: the adjoint of a linear recurrence is the
recurrence run backwards. It recomputes the states of a unit, so that only the inputs are kept between the passes.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

UNIT_ELEMENTS = 1 << 19
"""Elements of one temporary on a CPU. Accelerators take everything at once."""

MIN_CHANNELS = 32
"""Channels of a unit are contiguous in memory; fewer than this would waste the vector units."""

LOG2_E = math.log2(math.e)
"""Decays are computed as powers of 2, which torch's CPU code does nearly three times as fast as powers of e."""


def linear_recurrence_(
    steps: Sequence[Tensor], decays: Sequence[Tensor], entry: Tensor, through: Tensor, reverse: bool
) -> None:
    """In place, turn inputs u into states h_t = decay_t h_{t-1} + u_t along a sequence cut into M equal chunks.

    Args:
        steps: inputs, and afterwards states: at each place of a chunk, in the order of the sequence, [B, M, E].
        decays: from the place before to this one, [B, M, E] each; the first is not read.
        entry: decays from the last place of a chunk to the first of the chunk after it, [B, M - 1, E].
        through: product of all decays of a chunk, its entry included, [B, M, E].
        reverse: the chunks follow each other from the last index of dimension 1 to the first.
    """
    chunks = steps[0].shape[1]
    before, after = (slice(1, None), slice(None, -1)) if reverse else (slice(None, -1), slice(1, None))
    if chunks > 1:
        end = steps[0].clone() if len(steps) == 1 else steps[0]
        for step, decay in zip(steps[1:], decays[1:], strict=True):
            end = torch.addcmul(step, decay, end)
        ends, throughs = end.unbind(1), through.unbind(1)
        for earlier, later in pairwise(reversed(range(chunks)) if reverse else range(chunks)):
            ends[later].addcmul_(throughs[later], ends[earlier])
        steps[0][:, after].addcmul_(entry, end[:, before])
    for (previous, current), decay in zip(pairwise(steps), decays[1:], strict=True):
        current.addcmul_(decay, previous)


def scan_(inputs: Tensor, decay: Tensor, through: Tensor, along: int, reverse: bool) -> None:
    """Turn `inputs` [B, H, W, E] into states, in place; `through` is the product of `decay` over dimension `along`."""
    steps, decays = inputs.unbind(along), decay.unbind(along)
    if reverse:
        steps, decays = steps[::-1], decays[::-1]
    entry = decays[0][:, :-1] if reverse else decays[0][:, 1:]
    linear_recurrence_(steps, decays, entry, through, reverse)


def adjoint_scan_(inputs: Tensor, decay: Tensor, through: Tensor, along: int, reverse: bool) -> None:
    """The transpose of `scan_`: g_t = decay_{t+1} g_{t+1} + inputs_t, in place.

    `through` is the product over the decays that such a chunk meets: its own but the first, and the first of the next.
    """
    steps, decays = inputs.unbind(along), decay.unbind(along)
    if not reverse:
        steps, decays = steps[::-1], decays[::-1]
    first = decays[-1]  # of each chunk, in the direction of the scan
    entry = first[:, :-1] if reverse else first[:, 1:]
    linear_recurrence_(steps, (first, *decays[:-1]), entry, through, not reverse)


def _decayed_states(states: Tensor, decay: Tensor, along: int, reverse: bool, out: Tensor) -> None:
    """What of the state before each position is left at it, decay_t h_{t-1}, of states made by `scan_`."""
    size = states.shape[along]
    current, previous = (0, 1) if reverse else (1, 0)
    torch.mul(
        decay.narrow(along, current, size - 1),
        states.narrow(along, previous, size - 1),
        out=out.narrow(along, current, size - 1),
    )
    first, last = (-1, 0) if reverse else (0, -1)
    before, after = (slice(1, None), slice(None, -1)) if reverse else (slice(None, -1), slice(1, None))
    entries = out.select(along, first)  # of each chunk
    torch.mul(decay.select(along, first)[:, after], states.select(along, last)[:, before], out=entries[:, after])
    entries[:, first] = 0


def _units(
    batch: int, positions: int, channels: int, directions: int, on_cpu: bool
) -> Iterator[tuple[slice, int, slice]]:
    """Cut the work: (images, direction, channels)."""
    limit = UNIT_ELEMENTS if on_cpu else batch * positions * channels
    width = max(1, min(channels, max(MIN_CHANNELS, limit // positions)))
    images = max(1, min(batch, limit // (positions * width)))
    for image in range(0, batch, images):
        for channel in range(0, channels, width):
            for k in range(directions):
                yield slice(image, min(image + images, batch)), k, slice(channel, min(channel + width, channels))


class _Workspace:
    """Named scratch tensors that the units of one call share, so that memory is touched, not allocated, in each."""

    def __init__(self, like: Tensor):
        self.like = like
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: torch.Size) -> Tensor:
        size = shape.numel()
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self.buffers[name] = self.like.new_empty(size)
        return buffer[:size].view(shape)


def _folded(weight: Tensor, *maps: Tensor) -> list[Tensor]:
    """Maps to scan. A sequence, which is a map of one row and one direction, becomes a square whose rows are chunks.

    Row by row a square is the sequence itself. Zeros after its end fill the last row: nothing before depends on them.
    """
    height, length = maps[0].shape[1:3]
    if height > 1 or len(weight) > 1:
        return list(maps)
    columns = math.isqrt(length - 1) + 1
    rows = -(-length // columns)
    padding = rows * columns - length
    return [
        F.pad(values, (*[0, 0] * (values.dim() - 3), 0, padding)).squeeze(1).unflatten(1, (rows, columns))
        for values in maps
    ]


def _unfolded(values: Tensor, shape: torch.Size) -> Tensor:
    """What `_folded` folded, back in its `shape`; anything else as it is."""
    if values.shape == shape:
        return values
    return values.flatten(1, 2)[:, : shape[2]].unsqueeze(1)


def why_not(*tensors: Tensor, asked_for: bool) -> str | None:
    """Nothing speaks against it."""
    return None


def forward(
    x: Tensor, dt_low_rank: Tensor, b: Tensor, c: Tensor, dt_weight: Tensor, dt_bias: Tensor, a_log: Tensor, d: Tensor
) -> Tensor:
    """Equals `selective_scan_2d_naive`, on any device, for any map size and number of states.

    Parameters of the first K directions alone scan along those alone.
    """
    given = x.shape
    x, dt_low_rank, b, c = _folded(dt_weight, x, dt_low_rank, b, c)
    dtype = torch.promote_types(x.dtype, torch.float32)
    low_rank, b, c, weight, bias, a_log, d = (
        tensor.to(dtype) for tensor in (dt_low_rank, b, c, dt_weight, dt_bias, a_log, d)
    )
    batch, height, width, channels = x.shape
    rates_log2 = -LOG2_E * torch.exp(a_log).transpose(1, 2).contiguous()  # [4, N, E]
    out = x * d.sum(0)  # the skip of all four directions
    scratch = _Workspace(out)
    for images, k, cols in _units(batch, height * width, channels, len(d), x.device.type == "cpu"):
        along, reverse = 2 - k % 2, k >= 2
        map_x, map_out = x[images, ..., cols].to(dtype), out[images, ..., cols]
        map_b, map_c = b[images, :, :, k], c[images, :, :, k]
        shape = map_out.shape
        delta = scratch("delta", shape)
        _step_size_(delta, low_rank[images, :, :, k], weight[k, cols], bias[k, cols])
        torch.ops.aten.softplus.out(delta, out=delta)
        scaled = torch.mul(delta, map_x, out=scratch("scaled", shape))
        total = delta.sum(along)
        for n in range(b.shape[-1]):
            rate_log2 = rates_log2[k, n, cols]
            decay = torch.mul(delta, rate_log2, out=scratch("decay", shape)).exp2_()
            states = torch.mul(scaled, map_b[..., n, None], out=scratch("states", shape))
            scan_(states, decay, torch.exp2(total * rate_log2), along, reverse)
            map_out.addcmul_(states, map_c[..., n, None])
    return _unfolded(out, given).to(x.dtype)


def backward(grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Gradients of all eight inputs of `forward`."""
    weight = inputs[4]
    grad, x, *parameters = *_folded(weight, grad, *inputs[:4]), *inputs[4:]
    dtype = torch.promote_types(x.dtype, torch.float32)
    low_rank, b, c, weight, bias, a_log, d = (tensor.to(dtype) for tensor in parameters)
    batch, height, width, channels = x.shape
    rates = -torch.exp(a_log).transpose(1, 2).contiguous()  # [4, N, E]
    rates_log2 = LOG2_E * rates
    grad = grad.to(dtype)
    grad_x = grad * d.sum(0)
    grad_d = (grad * x).sum((0, 1, 2)).expand_as(d)
    grad_low_rank, grad_b, grad_c, grad_weight, grad_bias, grad_rates = (
        torch.zeros_like(tensor, memory_format=torch.contiguous_format)
        for tensor in (low_rank, b, c, weight.transpose(1, 2), bias, rates)
    )
    scratch = _Workspace(grad_x)
    for images, k, cols in _units(batch, height * width, channels, len(d), x.device.type == "cpu"):
        along, reverse = 2 - k % 2, k >= 2
        map_x, map_grad = x[images, ..., cols].to(dtype), grad[images, ..., cols]
        map_b, map_c = b[images, :, :, k], c[images, :, :, k]
        shape = map_x.shape
        raw, delta = scratch("raw", shape), scratch("delta", shape)
        _step_size_(raw, low_rank[images, :, :, k], weight[k, cols], bias[k, cols])
        torch.ops.aten.softplus.out(raw, out=delta)
        scaled = torch.mul(delta, map_x, out=scratch("scaled", shape))
        total = delta.sum(along)
        total_adjoint = _adjoint_total(total, delta.select(along, -1 if reverse else 0), reverse)
        grad_scaled, grad_delta = scratch("grad_scaled", shape).zero_(), scratch("grad_delta", shape).zero_()
        for n in range(b.shape[-1]):
            rate_log2, b_n, c_n = rates_log2[k, n, cols], map_b[..., n, None], map_c[..., n, None]
            decay = torch.mul(delta, rate_log2, out=scratch("decay", shape)).exp2_()
            states = torch.mul(scaled, b_n, out=scratch("states", shape))
            scan_(states, decay, torch.exp2(total * rate_log2), along, reverse)
            product = torch.mul(map_grad, states, out=scratch("product", shape))
            grad_c[images, :, :, k, n] += product.sum(-1)
            adjoint = torch.mul(map_grad, c_n, out=scratch("adjoint", shape))
            adjoint_scan_(adjoint, decay, torch.exp2(total_adjoint * rate_log2), along, reverse)
            torch.mul(adjoint, scaled, out=product)
            grad_b[images, :, :, k, n] += product.sum(-1)
            grad_scaled.addcmul_(adjoint, b_n)
            # The gradient with respect to delta_t rate is g_t decay_t h_{t-1}. Its other form, g_t (h_t - scaled_t
            # b_t), would lose all digits where states decay fast.
            _decayed_states(states, decay, along, reverse, out=product)
            product.mul_(adjoint)
            grad_delta.addcmul_(product, rates[k, n, cols])
            grad_rates[k, n, cols] += product.mul_(delta).sum((0, 1, 2))
        grad_delta.addcmul_(grad_scaled, map_x)
        grad_x[images, ..., cols].addcmul_(grad_scaled, delta)
        torch.ops.aten.softplus_backward.grad_input(grad_delta, raw, 1, 20, grad_input=grad_delta)
        flat = grad_delta.view(-1, shape[-1])
        grad_bias[k, cols] += flat.sum(0)
        # Both products are thin; with the short side first they run several times as fast. Autocast would take `@`
        # to half precision, and leaves products into given memory alone.
        grad_weight[k, :, cols].addmm_(low_rank[images, :, :, k].flatten(0, 2).t(), flat)
        thin = scratch("thin", torch.Size((weight.shape[-1], flat.shape[0])))
        torch.mm(weight[k, cols].t().contiguous(), flat.t(), out=thin)
        grad_low_rank[images, :, :, k] += thin.t().view(*shape[:-1], -1)
    # d rates / d a_log = rates
    grad_a_log = (grad_rates * rates).transpose(1, 2)
    grad_weight = grad_weight.transpose(1, 2)  # [4, E, R]
    grads = (grad_x, grad_low_rank, grad_b, grad_c, grad_weight, grad_bias, grad_a_log, grad_d)
    return tuple(
        _unfolded(gradient, tensor.shape).to(tensor.dtype) for gradient, tensor in zip(grads, inputs, strict=True)
    )


def _step_size_(out: Tensor, low_rank: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Step sizes before softplus: [B, H, W, R] and weight [E, R], bias [E] into `out` [B, H, W, E]."""
    torch.addmm(bias, low_rank.flatten(0, 2), weight.t(), out=out.view(-1, out.shape[-1]))


def _adjoint_total(total: Tensor, first: Tensor, reverse: bool) -> Tensor:
    """Sum of the step sizes that an adjoint chunk meets: all of its own but the first, and the next chunk's first."""
    total = total - first
    before, after = (slice(1, None), slice(None, -1)) if reverse else (slice(None, -1), slice(1, None))
    total[:, before] += first[:, after]
    return total


__all__ = ["backward", "forward", "why_not"]
