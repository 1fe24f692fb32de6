"""The scan as an operator of torch: what compilers, exporters, checkpointing, autocast and the FLOP counter see."""

import importlib.util
import sys

import pytest
import torch
from test_selective_scan_2d import compare, make_inputs
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ssm_vlm import SSMVisionConfig, SSMVisionModel
from ssm_vlm.modeling.ops.selective_scan_2d import custom_op, selective_scan_2d

SHAPE = (2, 3, 5, 4, 2, 3)
backends = pytest.mark.parametrize("backend", list(custom_op.BACKENDS), indirect=True)


class Scan(nn.Module):
    def __init__(self, backend=None):
        super().__init__()
        self.backend = backend

    def forward(self, *tensors):
        return selective_scan_2d(*tensors, backend=self.backend)


def toy_encoder():
    torch.manual_seed(0)
    config = SSMVisionConfig(hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"], drop_path_rate=0.0)
    return SSMVisionModel(config).eval()


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(backend, dtype):
    inputs = make_inputs(*SHAPE, dtype)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    torch.library.opcheck(torch.ops.ssm_vlm.selective_scan_2d.default, (*leaves, backend))
    grad = torch.randn_like(inputs[0])
    torch.library.opcheck(torch.ops.ssm_vlm.selective_scan_2d_backward.default, (grad, *inputs, backend))


@backends
def test_sequences_are_maps_of_one_row_and_one_direction(backend):
    inputs = [tensor.clone() for tensor in make_inputs(2, 1, 11, 4, 2, 3)]
    inputs = [inputs[0], *(t[:, :, :, :1] for t in inputs[1:4]), *(t[:1] for t in inputs[4:])]
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    torch.library.opcheck(torch.ops.ssm_vlm.selective_scan_2d.default, (*leaves, backend))


@backends
def test_compiled_whole_with_gradients(backend):
    """The graph is traced for inductor and run without it, which takes a second where inductor takes forty."""
    torch._dynamo.reset()
    compiled = torch.compile(Scan(backend), fullgraph=True, backend="aot_eager")
    assert max(compare(compiled, make_inputs(*SHAPE)).values()) < 1e-12


def test_encoder_compiled_whole():
    torch._dynamo.reset()
    model, pixels = toy_encoder(), torch.randn(1, 3, 33, 40)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        ours, expected = compiled(pixels).last_hidden_state, model(pixels).last_hidden_state
    assert torch.allclose(ours, expected, atol=1e-5)


@pytest.mark.slow
def test_encoder_compiled_whole_by_inductor():
    torch._dynamo.reset()
    model, pixels = toy_encoder(), torch.randn(1, 3, 33, 40)
    compiled = torch.compile(model, fullgraph=True)
    ours, expected = compiled(pixels).last_hidden_state, model(pixels).last_hidden_state
    assert torch.allclose(ours, expected, atol=1e-5)
    gradients = [torch.autograd.grad(out.square().sum(), model.stem.conv1.weight)[0] for out in (ours, expected)]
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-5)


def test_exported_with_a_dynamic_batch():
    inputs = make_inputs(*SHAPE)
    batch = torch.export.Dim("batch", min=2, max=8)
    shapes = {"tensors": tuple({0: batch} if index < 4 else None for index in range(8))}
    program = torch.export.export(Scan(), tuple(inputs), dynamic_shapes=shapes)
    assert torch.ops.ssm_vlm.selective_scan_2d.default in [node.target for node in program.graph.nodes]
    other = make_inputs(3, *SHAPE[1:])
    assert torch.equal(program.module()(*other), selective_scan_2d(*other))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant):
    def scan(*tensors):
        return checkpoint(selective_scan_2d, *tensors, use_reentrant=reentrant)

    assert max(compare(scan, make_inputs(*SHAPE)).values()) < 1e-12


@backends
def test_autocast_leaves_the_scan_in_float32(backend):
    """Under autocast the same inputs give the same bits as without."""
    inputs = make_inputs(*SHAPE, torch.float32)
    expected = selective_scan_2d(*inputs, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = selective_scan_2d(*inputs, backend=backend)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_encoder_under_autocast_stays_near_float32():
    model, pixels = toy_encoder(), torch.randn(1, 3, 32, 40)
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model(pixels).last_hidden_state
    assert (found.float() - expected).abs().max() < 2e-2 * expected.abs().max()


def test_flops_are_counted():
    leaves = [tensor.requires_grad_() for tensor in make_inputs(*SHAPE)]
    with FlopCounterMode(display=False) as counter:
        selective_scan_2d(*leaves).sum().backward()
    forward = custom_op.selective_scan_flops(positions=2 * 3 * 5, channels=4, states=2, rank=3)
    assert counter.get_flop_counts()["Global"] == {
        torch.ops.ssm_vlm.selective_scan_2d: forward,
        torch.ops.ssm_vlm.selective_scan_2d_backward: 2 * forward,
    }


def test_a_second_copy_of_the_code_registers_nothing(monkeypatch):
    """As when a model that brings its own code is loaded beside the library."""
    operator = torch.ops.ssm_vlm.selective_scan_2d
    name = f"{custom_op.__name__}_of_a_saved_model"
    spec = importlib.util.spec_from_file_location(name, custom_op.__file__)
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, copy)
    spec.loader.exec_module(copy)
    assert copy.BACKENDS is not custom_op.BACKENDS and torch.ops.ssm_vlm.selective_scan_2d is operator
    monkeypatch.setattr(copy, "BACKENDS", {})
    assert selective_scan_2d(*make_inputs(*SHAPE)).isfinite().all()


def test_a_second_derivative_is_refused():
    inputs = [tensor.requires_grad_() for tensor in make_inputs(*SHAPE)]
    (gradient,) = torch.autograd.grad(selective_scan_2d(*inputs).sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()
