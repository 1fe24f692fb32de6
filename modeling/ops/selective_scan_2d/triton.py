"""The four-direction selective scan on CUDA devices: Triton kernels, cut into tiles that fill the chip at any size.

Forward, for each pair of opposite directions: where batch x channels alone fill the chip, a launch that walks the map;
otherwise three phases, summaries of chunks of the sequence, a scan over the summaries, and the walk of each chunk from
the state that enters it. Step sizes are computed twice rather than kept: a summary is 8 bytes per chunk, channel and
direction, where the step sizes of its positions would be 4 each.

Compulsory bytes per element of x: x in, y out, 4 (R + 2 N) / E projections: 4.3 in bfloat16 at E = 192, R = 6, N = 1.
The merge adds a float32 sum that each direction reads and writes in cache (in float32, y is the sum).
Arithmetic, counted in the machine code for sm_90 (Triton 3.6 and 3.7, bfloat16, N = 1; the loop over ranks once):
45 instructions per element and direction (rows, 4 channels in a thread) to 68 (columns, 2 channels), 2 of them
exponentials. At 132 multiprocessors of 128 lanes and 1.7 GHz four directions take at least 6 to 9 ps, and 4.3 bytes at
4 TB/s 1 ps: the instructions, not the memory, are the floor of the bfloat16 scan.

The backward pass recomputes everything from the inputs. States and adjoint states enter at every tile (20 bytes per
tile of 16 positions, channel, direction and state), so that all tiles are independent. Gradients of parameters are
summed within a program over as many tiles as still fill the chip, then over programs by torch. No atomics anywhere:
results are the same to the bit from run to run. Its adjoint scan runs against the order of the registers, which Triton
does with shuffles, and it spills some: 270 to 290 instructions per element and direction, so it has the most
left to gain. None of this was timed yet.
"""

import functools
import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

PER_THREAD = 32
"""Elements of a tile that a thread holds in the forward pass, in about five arrays at a time: 168 to 255 registers and
so 8 to 12 warps on each multiprocessor, enough as elements are independent but for one chain of multiply-adds."""

PER_THREAD_BACKWARD = 16
"""With twice as many arrays. Also the least number of positions that a product of tiles takes."""

MAX_VECTOR = 4
"""Neighbouring channels of a thread in the forward pass. What belongs to a position (its address, its b, c and low-rank
step size, which every thread loads) then serves as many elements."""

MAX_WARPS = 4
"""Warps of a program of the backward pass. Wider programs write fewer partial sums of the projections' gradients."""

WARPS_TO_FILL = 4
"""Warps per multiprocessor, one per scheduler, from which walking the whole map (no summaries) wins over chunks."""

WARPS_OF_CHUNKS = 12
"""Warps per multiprocessor to cut the work into where it is cut."""

MAX_OFFSET = (1 << 31) - 1
"""Within an image; those of larger images take 64 bits, and twice the registers for addresses."""


class Plan(NamedTuple):
    """How a map is cut."""

    tile: int
    """Positions of a tile."""
    channels: int
    """Channels of a tile."""
    vector: int
    """Neighbouring channels of a thread."""
    tiles: int
    """Tiles that one program walks: of the forward pass a chunk, of the backward pass those it sums gradients over."""


def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; the interpreter has one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _block(channels: int, most: int) -> int:
    """The widest of 32, 64, ..., 32 `most` channels that leaves at most an eighth of its lanes idle, else 32."""
    while most > 1 and 8 * (-channels % (32 * most)) > channels:
        most //= 2
    return 32 * most


def plan(batch: int, length: int, channels: int, device: torch.device, backward: bool) -> Plan:
    """How to cut a map [batch, length, channels], by the number of warps that the cut makes."""
    width = _block(channels, MAX_WARPS if backward else MAX_VECTOR)
    vector = 1 if backward else width // 32
    tile = PER_THREAD_BACKWARD if backward else PER_THREAD // vector
    tiles = -(-length // tile)
    warps = batch * -(-channels // width) * (width // (32 * vector))  # of programs that walk a whole map
    chip = multiprocessors(device)
    if backward or warps < WARPS_TO_FILL * chip:
        chunks = max(1, -(-WARPS_OF_CHUNKS * chip // warps))
        return Plan(tile, width, vector, -(-tiles // min(tiles, chunks)))
    return Plan(tile, width, vector, tiles)


@functools.cache
def _interpreted() -> bool:
    from .triton_kernels import apply_forward

    # By name: an import of Triton's class here would make saved models ask for Triton wherever they are loaded.
    return type(apply_forward).__name__ == "InterpretedFunction"


def why_not(x: Tensor, *others: Tensor, asked_for: bool) -> str | None:
    """In words why these kernels do not run on such tensors here, or None."""
    if x.device.type != "cuda" and not asked_for:
        return f"Triton has no compiler for {x.device.type} tensors"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if x.dtype == torch.float64:
        return "its states are float32, and float64 maps want float64"
    if x.device.type != "cuda" and not _interpreted():
        return f"Triton has no compiler for {x.device.type} tensors (its interpreter: TRITON_INTERPRET=1)"
    return None


class _Launch:
    """The tensors of one call as the kernels take them, and the arguments that all launches share."""

    def __init__(self, inputs: tuple[Tensor, ...], cut: Plan):
        x, low_rank, b, c, *parameters = inputs
        self.cut = cut
        self.batch, self.height, self.width, self.channels = x.shape
        self.length = self.height * self.width
        self.directions, self.rank = low_rank.shape[3:]
        self.states = b.shape[-1]
        self.device = x.device
        self.tiles_of_map = -(-self.length // cut.tile)
        self.blocks = -(-self.channels // cut.channels)
        self.maps = [_with_one_stride(values) for values in (x, low_rank, b, c)]
        self.parameters = [parameter.contiguous() for parameter in parameters]
        x, low_rank, b, c = self.maps
        strides = (
            x.stride(2),
            *(stride for values in (low_rank, b, c) for stride in (values.stride(2), values.stride(3))),
        )
        sizes = self.batch, self.length, self.height, self.width, self.channels, self.rank, self.states
        self.sizes = (*sizes, *strides)
        self.constants = {
            "DIRECTIONS": self.directions,
            "STATES": _power_of_two(self.states),
            "TILE": cut.tile,
            "CHANNELS": cut.channels,
            "VECTOR": cut.vector if self.channels % cut.vector == 0 and x.stride(2) % cut.vector == 0 else 1,
            "TALL": self.height >= cut.tile,
            "WIDE": self.length * max(*strides, self.channels, self.directions * (self.rank + 2 * self.states))
            > MAX_OFFSET,
            "num_warps": cut.channels // (32 * cut.vector),
        }
        self.pairs = range(min(2, self.directions))

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def entering_states(self, tiles: int, grad: Tensor | None) -> Tensor:
        """States that enter chunks of `tiles` tiles, with `grad` adjoint states too: [kinds, K, B, chunks, N, E]."""
        from .triton_kernels import carry_states, summarise_chunks

        chunks = -(-self.tiles_of_map // tiles)
        weight, bias, a_log, _ = self.parameters
        kinds = 1 if grad is None else 2
        totals = self.new(self.directions, self.batch, chunks, self.channels)
        local_states = self.new(kinds, self.directions, self.batch, chunks, self.states, self.channels)
        entering = torch.empty_like(local_states)
        for pair in self.pairs:
            summarise_chunks[self.batch * chunks * self.blocks,](
                *self.maps, weight, bias, a_log, self.maps[0] if grad is None else grad, totals, local_states,
                *self.sizes, tiles, chunks, PAIR=pair, ADJOINT=grad is not None, **self.constants,
            )  # fmt: skip
        lines = kinds * self.directions * self.batch
        width = 32
        carry_states[lines * self.states * -(-self.channels // width),](
            totals, local_states, a_log, entering, self.batch, self.channels, self.states, chunks,
            DIRECTIONS=self.directions, TILE=self.cut.tile, CHANNELS=width, num_warps=1,
        )  # fmt: skip
        return entering


def _precision(device: torch.device) -> str:
    """Of products of float32 tiles: on tensor cores, if there are any, in three parts that keep float32's digits."""
    tensor_cores = device.type == "cuda" and torch.version.hip is None
    return "tf32x3" if tensor_cores and torch.cuda.get_device_capability(device) >= (8, 0) else "ieee"


def _power_of_two(number: int) -> int:
    """The least that is not below it."""
    return 1 << (number - 1).bit_length()


def _with_one_stride(values: Tensor) -> Tensor:
    """[B, H, W, ...] in which positions of all images follow each other at one distance, and values without gap: as it
    is where possible (slices of one projection are), else a copy."""
    batch, height, width = values.shape[:3]
    step = values.stride(2)
    follows = (height == 1 or values.stride(1) == width * step) and (
        batch == 1 or values.stride(0) == height * width * step
    )
    dense = values.shape[-1] == 1 or values.stride(-1) == 1
    return values if follows and dense and (width > 1 or (batch == 1 and height == 1)) else values.contiguous()


def forward(*inputs: Tensor) -> Tensor:
    """`selective_scan_2d_naive`, in float32, of the first K = 1, 2 or 4 of its directions."""
    from .triton_kernels import apply_forward

    x = inputs[0]
    cut = plan(*_sizes(x), x.device, backward=False)
    launch = _Launch(inputs, cut)
    chunks = -(-launch.tiles_of_map // cut.tiles)
    weight, bias, a_log, d = launch.parameters
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        entering = launch.entering_states(cut.tiles, None) if chunks > 1 else out
        total = launch.new(*x.shape) if x.dtype != torch.float32 else out
        for pair in launch.pairs:
            apply_forward[launch.batch * chunks * launch.blocks,](
                *launch.maps, weight, bias, a_log, d, entering, total, out, *launch.sizes, cut.tiles, chunks,
                PAIR=pair, CHUNKED=chunks > 1, **launch.constants,
            )  # fmt: skip
    return out


def backward(grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Gradients of all eight inputs, each in its dtype."""
    from .triton_kernels import apply_backward

    x = inputs[0]
    cut = plan(*_sizes(x), x.device, backward=True)
    launch = _Launch(inputs, cut)
    programs = -(-launch.tiles_of_map // cut.tiles)
    weight, bias, a_log, d = launch.parameters
    directions, rank, states = launch.directions, launch.rank, launch.states
    grad = grad.contiguous()
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_maps = launch.new(launch.blocks, *x.shape[:3], directions, rank + 2 * states)
    grad_parameters = launch.new(launch.batch * programs, directions, rank + states + 2, launch.channels)
    with torch.cuda.device_of(x):
        entering = launch.entering_states(1, grad) if launch.tiles_of_map > 1 else grad
        total = launch.new(*x.shape) if x.dtype != torch.float32 else grad_x
        for pair in launch.pairs:
            apply_backward[launch.batch * programs * launch.blocks,](
                *launch.maps, weight, bias, a_log, d, grad, entering, total, grad_x, grad_maps, grad_parameters,
                *launch.sizes, cut.tiles, launch.tiles_of_map, programs,
                PAIR=pair, CHUNKED=launch.tiles_of_map > 1,
                RANK=max(16, _power_of_two(rank)),  # the least that a product of tiles takes
                PRECISION=_precision(x.device), **launch.constants,
            )  # fmt: skip
    grad_low_rank, grad_b, grad_c = grad_maps.sum(0).split([rank, states, states], dim=-1)
    of_parameters = grad_parameters.sum(0).transpose(1, 2)  # [K, E, R + N + 2]
    grad_weight, grad_bias, grad_rates, grad_skip = of_parameters.split([rank, 1, states, 1], dim=-1)
    grads = (
        grad_x, grad_low_rank, grad_b, grad_c, grad_weight, grad_bias.squeeze(-1),
        -grad_rates * torch.exp(a_log.float()),  # rate = -exp(a_log), its own derivative
        grad_skip[0].squeeze(-1).expand(directions, -1),  # the same for every direction; written by the first
    )  # fmt: skip
    return tuple(gradient.to(tensor.dtype) for gradient, tensor in zip(grads, inputs, strict=True))


def _sizes(x: Tensor) -> tuple[int, int, int]:
    batch, height, width, channels = x.shape
    return batch, height * width, channels


__all__ = ["Plan", "backward", "forward", "plan", "why_not"]
