"""The four-direction selective scan on CUDA devices: Triton kernels, cut into tiles that fill the chip at any size.

Forward, for each pair of opposite directions: where batch x channels alone fill the chip, a launch that walks the map;
otherwise three phases, summaries of chunks of the sequence, a scan over the summaries, and the walk of each chunk from
the state that enters it. Step sizes are computed twice rather than kept: a summary is 8 bytes per chunk, channel and
direction, where the step sizes of its positions would be 4 each.

Compulsory bytes per element of x: x in, y out, 4 (R + 2 N) / E projections: 4.3 in bfloat16 at E = 192, R = 6, N = 1.
The merge adds a float32 sum that each direction reads and writes in cache (in float32, y is the sum).
Arithmetic, counted in the machine code of the loops over tiles for sm_90 (Triton 3.6, bfloat16, N = 1), instructions
per element and direction, rows and columns:

    channels in a thread      4         2
    walk                      27, 31    34, 41
    summary                   23, 27    27, 35

of which 17 are the scan itself, 2 of them exponentials, 1 is the step size's product of tiles, and the rest belongs to
positions (addresses, loads and conversions) and is shared by a thread's channels. At 132 multiprocessors of 4
schedulers and 1.75 GHz four directions of a walk take at least 4 to 5 ps per element, and 4.3 bytes at 4 TB/s 1 ps: the
instructions, not the memory, are the floor of the bfloat16 scan.

The backward pass recomputes everything from the inputs. States and adjoint states enter at every tile (20 bytes per
tile of 16 positions, channel, direction and state), so that all tiles are independent. Gradients of parameters are
summed within a program over as many tiles as still fill the chip, then over programs by torch. No atomics anywhere:
results are the same to the bit from run to run. 103 (rows) to 118 (columns) instructions per element and direction,
where it still spills some registers, after summaries of 69 to 79. Counted by hand, not timed.
"""

import functools
import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 16
"""Positions of a tile, the least that a product of tiles takes. A thread holds them all, of one to four channels in
about five arrays at a time, or in the backward pass of one channel in a dozen: 190 to 255 registers, and so 8 to 10
warps on each multiprocessor. That is enough as elements are independent but for one chain of multiply-adds."""

MAX_VECTOR = 4
"""Neighbouring channels of a thread in the forward pass. What belongs to a position (its addresses, its b and c, which
every thread loads) then serves as many elements."""

MAX_WARPS = 4
"""Warps of a program of the backward pass. Wider programs write fewer partial sums of the projections' gradients."""

MAX_WEIGHTS = 2048
"""Of a program's tile of dt_weight, where it is not in half precision: products of float32 tiles take some 40 bytes of
shared memory for each in the backward pass, which at 24 ranks and 128 channels would be 142 KB."""

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


def plan(batch: int, length: int, channels: int, device: torch.device, backward: bool, most: int = 4) -> Plan:
    """How to cut a map [batch, length, channels], by the number of warps that the cut makes, into tiles of at most 32
    `most` channels."""
    tiles = -(-length // TILE)
    chip = multiprocessors(device)

    def warps(width: int, vector: int) -> int:
        """Of programs that walk a whole map."""
        return batch * -(-channels // width) * (width // (32 * vector))

    if backward:
        width, vector = _block(channels, min(most, MAX_WARPS)), 1
    else:
        width = _block(channels, min(most, MAX_VECTOR))
        # Half as wide costs a third more instructions, and summaries of chunks nearly twice as many.
        for narrower in (width, max(32, width // 2)):
            if warps(narrower, narrower // 32) >= WARPS_TO_FILL * chip:
                return Plan(TILE, narrower, narrower // 32, tiles)
        vector = width // 32
    chunks = max(1, -(-WARPS_OF_CHUNKS * chip // warps(width, vector)))
    return Plan(TILE, width, vector, -(-tiles // min(tiles, chunks)))


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
        self.maps = [x.contiguous(), *(_with_one_stride(values) for values in (low_rank, b, c))]
        self.parameters = [parameter.contiguous() for parameter in parameters]
        x, low_rank, b, c = self.maps
        strides = [stride for values in (low_rank, b, c) for stride in (values.stride(2), values.stride(3))]
        sizes = self.batch, self.length, self.height, self.width, self.channels, self.rank, self.states
        self.sizes = (*sizes, *strides)
        self.constants = {
            "DIRECTIONS": self.directions,
            "STATES": _power_of_two(self.states),
            "TILE": cut.tile,
            "CHANNELS": cut.channels,
            "VECTOR": cut.vector if self.channels % cut.vector == 0 else 1,
            "FULL": self.channels % cut.channels == 0,
            "TALL": self.height >= cut.tile,
            "WIDE": self.length * max(*strides, self.channels, self.directions * (self.rank + 2 * self.states))
            > MAX_OFFSET,
            "num_warps": cut.channels // (32 * cut.vector),
        }
        self.product = {
            "RANKS": _ranks(self.rank),
            "PRODUCT": _precision(x.device, low_rank.dtype, self.parameters[0].dtype),
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
                *self.sizes, tiles, chunks, PAIR=pair, ADJOINT=grad is not None,
                **self.product, **self.constants,
            )  # fmt: skip
        lines = kinds * self.directions * self.batch
        width = 32
        carry_states[lines * self.states * -(-self.channels // width),](
            totals, local_states, a_log, entering, self.batch, self.channels, self.states, chunks,
            DIRECTIONS=self.directions, TILE=32 if chunks > 32 else 16, CHANNELS=width, num_warps=1,
        )  # fmt: skip
        return entering


def _precision(device: torch.device, *dtypes: torch.dtype) -> str:
    """How two tiles are multiplied. On tensor cores, if there are any: factors of one half-precision dtype as they are,
    which is exact, others in three parts that keep float32's digits."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return "ieee"
    return "half" if dtypes in ((torch.bfloat16,) * 2, (torch.float16,) * 2) else "tf32x3"


def _ranks(rank: int) -> int:
    """As a product of tiles takes them: a power of 2 from 16 on."""
    return max(16, _power_of_two(rank))


def _power_of_two(number: int) -> int:
    """The least that is not below it."""
    return 1 << (number - 1).bit_length()


def _with_one_stride(values: Tensor) -> Tensor:
    """[B, H, W, ...] in which positions of all images follow each other at one distance, and values without gap: as it
    is where possible (slices of one projection are), else a copy. Directions are near enough for 32 bits."""
    batch, height, width = values.shape[:3]
    step = values.stride(2)
    follows = (height == 1 or values.stride(1) == width * step) and (
        batch == 1 or values.stride(0) == height * width * step
    )
    dense = values.shape[-1] == 1 or values.stride(-1) == 1
    near = values.dim() == 4 or values.stride(3) * (values.shape[3] - 1) <= MAX_OFFSET
    return values if follows and dense and near and (width > 1 or (batch == 1 and height == 1)) else values.contiguous()


def forward(*inputs: Tensor) -> Tensor:
    """`selective_scan_2d_naive`, in float32, of the first K = 1, 2 or 4 of its directions."""
    from .triton_kernels import apply_forward

    x = inputs[0]
    cut = plan(*_sizes(x), x.device, backward=False, most=_most(inputs))
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
                PAIR=pair, CHUNKED=chunks > 1, **launch.product, **launch.constants,
            )  # fmt: skip
    return out


def backward(grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Gradients of all eight inputs, each in its dtype."""
    from .triton_kernels import apply_backward

    x = inputs[0]
    cut = plan(*_sizes(x), x.device, backward=True, most=_most(inputs))
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
                PRECISION="tf32" if launch.product["PRODUCT"] == "half" else launch.product["PRODUCT"],
                **launch.product, **launch.constants,
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


def _most(inputs: tuple[Tensor, ...]) -> int:
    """Widest tile that shared memory allows, in 32 channels."""
    x, low_rank, weight = inputs[0], inputs[1], inputs[4]
    if _precision(x.device, low_rank.dtype, weight.dtype) == "half":
        return MAX_VECTOR
    return max(1, MAX_WEIGHTS // (32 * _ranks(weight.shape[-1])))


def _sizes(x: Tensor) -> tuple[int, int, int]:
    batch, height, width, channels = x.shape
    return batch, height * width, channels


__all__ = ["Plan", "backward", "forward", "plan", "why_not"]
