"""The scan alone and with its projections, in time, memory and bytes per second, on each backend."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..modeling.ops.selective_scan_2d import selective_scan_2d
from .benchmark_contenders import COPY_BASED, copy_based_core
from .benchmark_settings import BOTH, FORWARD, Row, Settings, describe
from .benchmark_timing import Call


@dataclass(frozen=True)
class OpShape:
    """One map that SS2D scans: [B, height, width, channels], with `states` states and step sizes of rank `rank`."""

    height: int
    width: int
    channels: int
    rank: int
    states: int = 1

    @classmethod
    def parse(cls, text: str) -> "OpShape":
        """From "56x56x192" or, with states, "56x56x192x16"; the rank is VMamba's, a thirty-second of the channels."""
        try:
            height, width, channels, *states = map(int, text.split("x"))
            if min(height, width, channels, *states) < 1 or len(states) > 1:
                raise ValueError
        except ValueError:
            raise ValueError(f"{text!r} is no shape of a map: give HEIGHTxWIDTHxCHANNELS or ...xSTATES.") from None
        return cls(height, width, channels, max(1, channels // 32), *states)


def op_inputs(shape: OpShape, batch: int, settings: Settings) -> dict[str, Tensor]:
    """A map [B, H, W, E] and the parameters of SS2D, with step sizes and decay rates as a new model has them."""
    generator = torch.Generator().manual_seed(0)
    inner, rank, states = shape.channels, shape.rank, shape.states

    def uniform(bound: float, *sizes: int) -> Tensor:
        return (2 * torch.rand(sizes, generator=generator) - 1) * bound

    tensors = {
        "x": torch.randn(batch, shape.height, shape.width, inner, generator=generator),
        "x_proj_weight": uniform(inner**-0.5, 4, rank + 2 * states, inner),
        "dt_weight": uniform(rank**-0.5, 4, inner, rank),
        "dt_bias": uniform(1.5, 4, inner) - 4,
        "a_log": torch.arange(1, states + 1).float().log().expand(4, inner, -1).contiguous(),
        "d": torch.ones(4, inner),
    }
    return {
        name: tensor.to(settings.device, settings.dtype if name in ("x", "x_proj_weight") else torch.float32)
        for name, tensor in tensors.items()
    }


def compulsory_bytes(shape: OpShape, batch: int, dtype: torch.dtype, passes: str) -> int:
    """What the scan alone must move: every map once in, every map once out; backward likewise."""
    per_direction = shape.rank + 2 * shape.states
    inputs, output = shape.channels + 4 * per_direction, shape.channels
    values = inputs + output
    if passes == BOTH:
        values += (inputs + output) + inputs  # inputs and the gradient of the output in, gradients of the inputs out
    return batch * shape.height * shape.width * values * dtype.itemsize


def op_rows(
    shapes: Sequence[OpShape], batches: Sequence[int], backends: Sequence[str], settings: Settings
) -> Iterator[list[Row]]:
    """The scan with its projections, forward and with backward, and the scan alone, on each backend.

    The copy-based composition projects from its copies, so that it is compared with scan and projections.
    """
    for shape, batch, passes in itertools.product(shapes, batches, (FORWARD, BOTH)):
        setting = _op_setting(shape, batch, settings, passes)
        with settings.or_skip(describe(setting)):
            rows = settings.run(setting, _op_contenders(shape, batch, backends, settings, passes))
            moved = compulsory_bytes(shape, batch, settings.dtype, passes)
            yield [row | {"compulsory_bytes": moved, "bytes_per_second": moved / row["median"]} for row in rows]


def _op_setting(shape: OpShape, batch: int, settings: Settings, passes: str) -> Row:
    return {
        "part": "op", "name": f"{shape.channels} channels, {shape.states} states", "height": shape.height,
        "width": shape.width, "batch": batch, "dtype": settings.dtype_name, "passes": passes,
    }  # fmt: skip


def _op_contenders(
    shape: OpShape, batch: int, backends: Sequence[str], settings: Settings, passes: str
) -> dict[str, Call]:
    tensors = op_inputs(shape, batch, settings)
    x, weight, *parameters = tensors.values()
    states = shape.states

    def project(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        projected = F.linear(x, weight.flatten(0, 1)).unflatten(-1, (4, -1))
        return projected.split([shape.rank, states, states], dim=-1)

    def of(function: Callable[..., Tensor], inputs: list[Tensor]) -> Call:
        inputs = [tensor.detach().clone().requires_grad_(passes == BOTH) for tensor in inputs]

        def call() -> None:
            with torch.set_grad_enabled(passes == BOTH):
                out = function(*inputs)
                if passes == BOTH:
                    torch.autograd.grad(out, inputs, torch.ones_like(out))

        return call

    contenders = {}
    for backend in backends:
        if backend in COPY_BASED:
            core = copy_based_core(backend)
            if isinstance(core, str):
                settings.skip(f"op, {backend}", core)
                continue
            contenders[backend] = of(core, [x.permute(0, 3, 1, 2).contiguous(), weight, *parameters])
            continue

        def whole(x, weight, *parameters, backend=backend):
            return selective_scan_2d(x, *project(x, weight), *parameters, backend=backend)

        def alone(*inputs, backend=backend):
            return selective_scan_2d(*inputs, backend=backend)

        reason = _cannot_run(backend, [x, *project(x, weight), *parameters])
        if reason is not None:
            settings.skip(f"op, {backend}", reason)
            continue
        contenders[backend] = of(whole, [x, weight, *parameters])
        if backend != "naive":  # an oracle's bytes per second tell nothing
            contenders[f"{backend} alone"] = of(alone, [x, *project(x, weight), *parameters])
    return contenders


def _cannot_run(backend: str, inputs: list[Tensor]) -> str | None:
    """In words why a backend does not run on these tensors, tried on a corner of the maps."""
    corner = [tensor[:, :1, :1] if position < 4 else tensor for position, tensor in enumerate(inputs)]
    try:
        with torch.no_grad():
            selective_scan_2d(*corner, backend=backend)
    except Exception as error:  # a compiler's, too
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None
