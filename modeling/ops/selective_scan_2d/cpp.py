"""The four-direction selective scan compiled for this machine's CPU, where a C++ compiler is present.

The source is built the first time that a scan needs it, in seconds, into torch's folder of extensions
(`TORCH_EXTENSIONS_DIR`), under a name that holds a hash of all that the result depends on; later processes load it from
there. It uses no header of torch or Python and no build system, only the compiler, and is called through `ctypes`.
"""

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import logging

from .cpp_source import SOURCE

logger = logging.get_logger(__name__)

MIN_WORK = 1 << 17
"""Positions times channels, directions and states from which on compiled code runs where nothing else is asked for.
Less takes a millisecond or two in any way and is not worth a build. Nothing but the shapes decides, so that a result
does not depend on what ran before it."""

BUILD_SECONDS = 300

INSTRUCTIONS = {"AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"], "AVX2": ["-mavx2", "-mfma"]}
"""Flags for what torch finds the CPU capable of. A folder that unlike machines share holds a library for each."""


def _compiler() -> list[str]:
    from torch.utils.cpp_extension import get_cxx_compiler

    return shlex.split(get_cxx_compiler()) or ["c++"]


def _compile_commands(source: str, built: str) -> list[list[str]]:
    """To be tried in turn: with the threads of torch's own OpenMP runtime, where torch brings one, whatever its name;
    with those of the compiler's; with one thread. A second runtime beside torch's costs: its idle threads compete with
    torch's for the processor (an encoder's pass took 20 % longer with another libgomp, twice as long with libomp)."""
    instructions = INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), [])
    flags = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fPIC", "-shared"]
    command = [*_compiler(), *flags, *instructions, source, "-o", built]
    package = Path(torch.__file__).parent
    folders = package / "lib", package.parent / "torch.libs"  # wheels of either kind
    runtimes = sorted(str(path) for folder in folders for path in folder.glob("libgomp*.so*"))
    threaded = [[*command, "-DWITH_THREADS", *link] for link in (runtimes, ["-fopenmp"]) if link]
    return [*threaded, command]


def _library_path() -> Path:
    from torch.utils.cpp_extension import get_default_build_root

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    commands = [word for command in _compile_commands("", "") for word in command]
    parts = [SOURCE, platform.system(), platform.machine(), *commands]
    return Path(root) / f"ssm_vlm_scan_{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:16]}.so"


def _build(path: Path) -> None:
    """Builds in a folder beside `path` and moves the result there in one step: processes that build at the same time,
    or are ended while they build, leave neither a lock nor half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source, built = Path(folder) / "scan.cpp", Path(folder) / path.name
        source.write_text(SOURCE, encoding="utf-8")
        for command in _compile_commands(str(source), str(built)):
            done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS)
            if done.returncode == 0:
                built.replace(path)
                return
    raise RuntimeError(f"{shlex.join(command)} failed: {done.stderr.strip()[-2000:]}")


@functools.cache
def library() -> ctypes.CDLL | str:
    """The compiled functions, built if they are not there yet, or in words why there are none."""
    try:
        path, functions = _library_path(), None
        if path.exists():
            with contextlib.suppress(OSError):  # cut short, or built against what is no longer there
                functions = ctypes.CDLL(str(path))
        if functions is None:
            compiler = _compiler()[0]
            if shutil.which(compiler) is None:
                return f"there is no C++ compiler ({compiler})"
            logger.info("selective_scan_2d: compiling for this CPU, once, into %s.", path)
            _build(path)
            functions = ctypes.CDLL(str(path))
        functions.ssm_vlm_scan_blocks.restype = ctypes.c_int64
        return functions
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        logger.warning(
            "selective_scan_2d: the compiled backend cannot be used, a slower one runs. %s (The variable CXX names the "
            "compiler, TORCH_EXTENSIONS_DIR the folder of what is built.)",
            error,
        )
        return f"building or loading it raised {type(error).__name__}"


def _functions() -> ctypes.CDLL:
    functions = library()
    assert isinstance(functions, ctypes.CDLL)  # `why_not` was asked before
    return functions


def why_not(x: Tensor, dt_low_rank: Tensor, b: Tensor, *parameters: Tensor, asked_for: bool) -> str | None:
    """In words, why the compiled code does not run on these tensors, or None where it does."""
    if x.device.type != "cpu":
        return f"it is for CPU tensors, these are on {x.device.type}"
    if not asked_for and x.numel() * math.prod(b.shape[3:]) < MIN_WORK:
        return "this is too little work"
    found = library()
    return found if isinstance(found, str) else None


def _as_map(values: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype`, with its last dimension contiguous; the others may be strided."""
    values = values.to(dtype)
    return values if values.stride(-1) == 1 else values.contiguous()


def _call(maps: list[Tensor], parameters: list[Tensor], grad: Tensor | None, outputs: list[Tensor]) -> None:
    x, low_rank, b, c = maps
    tensors = [*maps, *parameters, grad, *outputs]
    pointers = (ctypes.c_void_p * 13)(*(None if tensor is None else tensor.data_ptr() for tensor in tensors))
    numbers = [torch.get_num_threads(), *x.shape, low_rank.shape[3], low_rank.shape[4], b.shape[4]]
    numbers += [*x.stride()[:3], *((0, 0, 0) if grad is None else grad.stride()[:3])]
    numbers += [*low_rank.stride()[:4], *b.stride()[:4], *c.stride()[:4]]
    functions = _functions()
    function = functions.ssm_vlm_scan_float64 if x.dtype == torch.float64 else functions.ssm_vlm_scan_float32
    function(pointers, (ctypes.c_int64 * len(numbers))(*numbers))


def forward(
    x: Tensor, dt_low_rank: Tensor, b: Tensor, c: Tensor, dt_weight: Tensor, dt_bias: Tensor, a_log: Tensor, d: Tensor
) -> Tensor:
    """Equals `selective_scan_2d_naive`, on the CPU."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    maps = [_as_map(values, dtype) for values in (x, dt_low_rank, b, c)]
    out = maps[0].new_empty(x.shape)
    _call(maps, [values.to(dtype).contiguous() for values in (dt_weight, dt_bias, a_log, d)], None, [out])
    return out.to(x.dtype)


def backward(
    grad: Tensor,
    x: Tensor,
    dt_low_rank: Tensor,
    b: Tensor,
    c: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    a_log: Tensor,
    d: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of all eight inputs."""
    inputs = (x, dt_low_rank, b, c, dt_weight, dt_bias, a_log, d)
    dtype = torch.promote_types(x.dtype, torch.float32)
    grad, *maps = (_as_map(values, dtype) for values in (grad, *inputs[:4]))
    parameters = [values.to(dtype).contiguous() for values in inputs[4:]]
    batch, height, width, channels = x.shape
    directions, rank, states = (*dt_low_rank.shape[3:], b.shape[4])
    blocks = _functions().ssm_vlm_scan_blocks(
        *(ctypes.c_int64(size) for size in (grad.element_size(), channels, batch, torch.get_num_threads()))
    )
    grad_x = grad.new_empty(x.shape)
    grad_maps = grad.new_empty(blocks, batch, height, width, directions, rank + 2 * states)
    grad_parameters = grad.new_empty(batch, directions, rank + 1 + states, channels)
    grad_skip = grad.new_empty(batch, channels)
    _call(maps, parameters, grad, [grad_x, grad_maps, grad_parameters, grad_skip])
    of_weight, of_bias, of_a_log = grad_parameters.sum(0).split([rank, 1, states], dim=1)
    of_maps = [part.sum(0) for part in grad_maps.split([rank, states, states], dim=-1)]
    grads = (
        grad_x,
        *of_maps,
        of_weight.transpose(1, 2).contiguous(),
        of_bias[:, 0].clone(),
        of_a_log.transpose(1, 2).contiguous(),
        grad_skip.sum(0).repeat(directions, 1),
    )
    return tuple(gradient.to(tensor.dtype) for gradient, tensor in zip(grads, inputs, strict=True))


__all__ = ["MIN_WORK", "backward", "forward", "library", "why_not"]
