"""Faster repeated inference of an encoder, behind one option and without a compiler: `compile_for_inference`.

On CUDA a pass is captured as one CUDA graph for each size of input, since small batches are bound by launching kernels.
On CPUs the weights of matrix products are laid out once as oneDNN wants them, and GELU is applied within the product.
"""

import copy
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

ACTIVATION_AFTER = {"fc1": ("act", "activation_fn"), "pwconv1": ("act",)}
"""Name of a linear layer in an MLP -> names beside it of the activation that alone reads its output."""


class PackedLinear(nn.Module):
    """A linear layer on a CPU whose weight is laid out for oneDNN, with exact GELU after it if asked for."""

    def __init__(self, linear: nn.Linear, gelu: bool):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.after: tuple[str, list, str] = ("gelu", [], "none") if gelu else ("none", [], "")

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *self.after)


def _is_packable(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether this is a linear layer in a dtype that oneDNN multiplies on this CPU; where it could only emulate
    bfloat16, torch does better."""
    if type(module) is not nn.Linear or not torch.backends.mkldnn.is_available():
        return False
    weight = module.weight
    if weight.device.type != "cpu":
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


def _is_exact_gelu(activation: nn.Module) -> bool:
    probe = torch.linspace(-4, 4, 9)
    return type(activation).__name__ in ("GELU", "GELUActivation") and torch.equal(activation(probe), F.gelu(probe))


def _pack(parent: nn.Module) -> None:
    """Replace the linear layers below `parent`, and the activations that they take in."""
    for name, child in list(parent.named_children()):
        if not _is_packable(child):
            _pack(child)
            continue
        after = [other for other in ACTIVATION_AFTER.get(name, ()) if hasattr(parent, other)]
        gelu = bool(after) and _is_exact_gelu(getattr(parent, after[0]))
        if gelu:
            setattr(parent, after[0], nn.Identity())
        setattr(parent, name, PackedLinear(child, gelu))


class CapturedEncoder:
    """Runs a model on CUDA from graphs, one for each size of input, captured at its first call."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.captured: dict[tuple, tuple[torch.cuda.CUDAGraph, Tensor, Any]] = {}

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor) -> Any:
        key = (pixel_values.shape, pixel_values.dtype, pixel_values.device)
        if key not in self.captured:
            self.captured[key] = self._capture(pixel_values)
        graph, given, outputs = self.captured[key]
        given.copy_(pixel_values)
        graph.replay()
        return tree_map_only(Tensor, Tensor.clone, outputs)  # the graph writes over its own

    def _capture(self, pixel_values: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Any]:
        given = pixel_values.clone()
        stream = torch.cuda.Stream(pixel_values.device)
        stream.wait_stream(torch.cuda.current_stream(pixel_values.device))
        with torch.cuda.stream(stream):  # kernels are chosen and compiled, and libraries take their memory, before
            for _ in range(3):
                self.model(given)
        torch.cuda.current_stream(pixel_values.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self.model(given)
        return graph, given, outputs


def compile_for_inference(encoder: nn.Module) -> Callable[[Tensor], Any]:
    """An encoder made ready for repeated calls without gradients, with the weights that it has now.

    On CUDA each size of input costs the memory of one pass. On CPUs the matrices exist a second time; float32, and
    bfloat16 where the processor multiplies it (there it is the faster by far); any other dtype runs as it is.

    `torch.compile(encoder)` works too; on a CPU it compiles for long and gains less than this. For large pictures and
    batches glibc hands memory back and fetches it anew for each tensor: `MALLOC_MMAP_THRESHOLD_=4294967296
    MALLOC_TRIM_THRESHOLD_=4294967296` in the environment of the process keeps it, which saves some more.

    Args:
        encoder: a Backbone or other vision model in `eval()`. It is not changed.

    Returns:
        pixel_values [B, C, H, W] -> what the encoder returns.

    Raises:
        ValueError: the encoder is in training mode.
    """
    if encoder.training:
        raise ValueError("compile_for_inference needs an encoder in eval(): what it does in training is random.")
    if next(encoder.parameters()).is_cuda:
        return CapturedEncoder(encoder)
    ready = encoder
    if any(map(_is_packable, encoder.modules())):
        ready = copy.deepcopy(encoder)
        _pack(ready)
    return torch.no_grad()(ready.forward)


__all__ = ["compile_for_inference"]
