"""The scan as the reference composes it, written anew as a baseline: of the library only one core's 1-D scan runs here.

The map is laid out four times, once in each order (cross-scan); the position-dependent parameters are projected from
the four copies; each of the four sequences is scanned; and the results are brought back to map order and added
(cross-merge). arXiv 2401.10166, sections 4.2 and 5.1. Maps are channels-first, as in the reference.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_vlm.modeling.mixers import SelectiveScan2dMixer
from ssm_vlm.modeling.ops.selective_scan_1d import selective_scan_1d

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Core = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def cross_scan(x: Tensor) -> Tensor:
    """[B, E, H, W] -> [B, 4, E, L]: by rows, by columns, and both reversed, each a copy."""
    rows, columns = x.flatten(2), x.transpose(2, 3).flatten(2)
    forwards = torch.stack([rows, columns], dim=1)
    return torch.cat([forwards, forwards.flip(-1)], dim=1)


def cross_merge(y: Tensor, height: int, width: int) -> Tensor:
    """[B, 4, E, L] -> [B, E, H, W]: the sum of the four at each position."""
    both = y[:, :2] + y[:, 2:].flip(-1)
    return both[:, 0].unflatten(-1, (height, width)) + both[:, 1].unflatten(-1, (width, height)).transpose(2, 3)


def sequential_scan(
    u: Tensor, delta: Tensor, rate: Tensor, b: Tensor, c: Tensor, skip: Tensor, delta_bias: Tensor
) -> Tensor:
    """A selective scan one position after the other, in float32: u and delta [B, 4E, L], rate [4E, N], b and c
    [B, 4, N, L], skip and delta_bias [4E] -> [B, 4E, L]. Arguments and their order are those of Mamba's kernel, and
    the memory it takes is that of the reference's fallback: decays, inputs and projections of every channel at once."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    u, delta, b, c = (tensor.to(dtype) for tensor in (u, delta, b, c))
    delta = F.softplus(delta + delta_bias[:, None])
    b, c = (tensor.repeat_interleave(u.shape[1] // tensor.shape[1], dim=1) for tensor in (b, c))  # [B, 4E, N, L]
    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, rate))
    added = torch.einsum("bdl,bdnl,bdl->bdln", delta, b, u)
    state = torch.zeros_like(added[:, :, 0])  # [B, 4E, N]
    outputs = []
    for t in range(u.shape[-1]):
        state = decay[:, :, t] * state + added[:, :, t]
        outputs.append(torch.einsum("bdn,bdn->bd", state, c[..., t]))
    return torch.stack(outputs, dim=-1) + skip[:, None] * u


HUB_KERNEL = "kernels-community/mamba-ssm"


def _selective_scan_fn() -> Callable[..., Tensor] | None:
    """Mamba's compiled kernel: of `mamba_ssm` where it is installed, else of the Hub where `kernels` can load it."""
    with contextlib.suppress(ImportError):
        return importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    with contextlib.suppress(Exception):  # not installed, no network and not in the cache, none for this machine
        kernel = importlib.import_module("kernels").get_kernel(HUB_KERNEL)
        return importlib.import_module(f"{kernel.__name__}.ops.selective_scan_interface").selective_scan_fn
    return None


def prebuilt_scan() -> Scan | None:
    """Mamba's compiled kernel behind the arguments of `sequential_scan`, or None where there is none."""
    selective_scan_fn = _selective_scan_fn()
    if selective_scan_fn is None:
        return None

    def scan(u, delta, rate, b, c, skip, delta_bias):
        return selective_scan_fn(u, delta, rate, b, c, skip, None, delta_bias, delta_softplus=True)

    return scan


def copy_based_core(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    a_log: Tensor,
    d: Tensor,
    scan: Scan = sequential_scan,
) -> Tensor:
    """What stands between SS2D's convolution and its output norm.

    Args:
        x: [B, E, H, W].
        x_proj_weight: [4, R + 2N, E]; the other parameters are those of `selective_scan_2d`.
        scan: what scans the four sequences.

    Returns:
        [B, E, H, W].
    """
    batch, channels, height, width = x.shape
    rank, states = dt_weight.shape[-1], a_log.shape[-1]
    xs = cross_scan(x)  # [B, 4, E, L]
    projected = torch.einsum("bkel,kce->bkcl", xs, x_proj_weight)
    low_rank, b, c = projected.split([rank, states, states], dim=2)
    delta = torch.einsum("bkrl,ker->bkel", low_rank, dt_weight)
    ys = scan(
        xs.flatten(1, 2),
        delta.flatten(1, 2),
        -torch.exp(a_log.float()).flatten(0, 1),
        b.contiguous(),
        c.contiguous(),
        d.float().flatten(),
        dt_bias.float().flatten(),
    )
    return cross_merge(ys.unflatten(1, (4, channels)), height, width).to(x.dtype)


def own_scan_core(
    x: Tensor, x_proj_weight: Tensor, dt_weight: Tensor, dt_bias: Tensor, a_log: Tensor, d: Tensor
) -> Tensor:
    """`copy_based_core` with the library's fastest scan of sequences in the place of the reference's: what is left of
    the difference comes from the copies. They are channels-last, as that scan wants them, and step sizes stay of low
    rank, so that it is faster than the reference could be."""
    height, width = x.shape[2:]
    rank, states = dt_weight.shape[-1], a_log.shape[-1]
    x = x.permute(0, 2, 3, 1)
    forwards = torch.stack([x.flatten(1, 2), x.transpose(1, 2).flatten(1, 2)])  # [2, B, L, E]
    xs = torch.cat([forwards, forwards.flip(2)])
    projected = torch.einsum("kble,kce->kblc", xs, x_proj_weight)
    given = (values.contiguous() for values in projected.split([rank, states, states], dim=-1))
    ys = torch.stack(
        [selective_scan_1d(*of_one) for of_one in zip(xs, *given, dt_weight, dt_bias, a_log, d, strict=True)]
    )
    both = ys[:2] + ys[2:].flip(2)
    out = both[0].unflatten(1, (height, width)) + both[1].unflatten(1, (width, height)).transpose(1, 2)
    return out.permute(0, 3, 1, 2)


def _mixer_forward(mixer: SelectiveScan2dMixer, core: Core, x: Tensor) -> Tensor:
    x = mixer.in_proj(x)
    if mixer.gated:
        x, gate = x.chunk(2, dim=-1)
    x = F.silu(mixer.conv(x)).permute(0, 3, 1, 2).contiguous()
    x = core(x, mixer.x_proj_weight, mixer.dt_weight, mixer.dt_bias, mixer.a_log, mixer.d)
    x = mixer.out_norm(x.permute(0, 2, 3, 1))
    if mixer.gated:
        x = x * F.silu(gate)
    return mixer.out_proj(x)


@contextlib.contextmanager
def copy_based(encoder: nn.Module, core: Core = copy_based_core) -> Iterator[None]:
    """Within it, the scanning mixers of `encoder` run the copy-based composition."""
    mixers = [module for module in encoder.modules() if isinstance(module, SelectiveScan2dMixer)]
    for mixer in mixers:
        mixer.forward = lambda x, mixer=mixer: _mixer_forward(mixer, core, x)
    try:
        yield
    finally:
        for mixer in mixers:
            del mixer.forward
