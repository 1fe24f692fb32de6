"""The baseline that benchmarks compare with computes the same as the library's oracle."""

import sys
import types

import pytest
import torch

from ssm_vlm.eval.benchmark_contenders import build_encoder, copy_based_baseline
from ssm_vlm.modeling.ops.selective_scan_2d.naive import selective_scan_2d_naive

copy_based_scan = copy_based_baseline()


def inputs(height: int, width: int, states: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Random parameters with decays for which the scan matters."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (2, 6, height, width),
        "x_proj_weight": (4, 3 + 2 * states, 6),
        "dt_weight": (4, 6, 3),
        "dt_bias": (4, 6),
        "a_log": (4, 6, states),
        "d": (4, 6),
    }
    made = {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}
    return made | {"dt_bias": made["dt_bias"] - 1}


def oracle(x, x_proj_weight, dt_weight, dt_bias, a_log, d):
    """The naive loop over projections made on the unpermuted map."""
    x = x.permute(0, 2, 3, 1)
    states = a_log.shape[-1]
    projected = torch.einsum("bhwe,kce->bhwkc", x, x_proj_weight)
    low_rank, b, c = projected.split([dt_weight.shape[-1], states, states], dim=-1)
    return selective_scan_2d_naive(x, low_rank, b, c, dt_weight, dt_bias, a_log, d).permute(0, 3, 1, 2)


@pytest.mark.parametrize("core", [copy_based_scan.copy_based_core, copy_based_scan.own_scan_core])
@pytest.mark.parametrize("states", [1, 4])
@pytest.mark.parametrize("height, width", [(1, 1), (1, 7), (5, 3)])
def test_equals_the_naive_loop_forward_and_backward(height, width, states, core):
    tensors = {name: tensor.requires_grad_() for name, tensor in inputs(height, width, states).items()}
    weights = torch.randn_like(tensors["x"])
    found = []
    for function in (core, oracle):
        out = function(**tensors)
        found.append([out, *torch.autograd.grad((out * weights).sum(), list(tensors.values()))])
    for ours, expected in zip(*found, strict=True):
        # A rate is float32 in Mamba's kernel, and so it is here.
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-9


def test_a_wrong_order_is_noticed(monkeypatch):
    tensors = inputs(5, 3, 2)
    right = copy_based_scan.cross_scan
    monkeypatch.setattr(copy_based_scan, "cross_scan", lambda x: right(x)[:, [0, 1, 3, 2]])
    wrong = copy_based_scan.copy_based_core(**tensors)
    assert (wrong - oracle(**tensors)).abs().max() > 1e-2 * wrong.abs().max()


@pytest.mark.parametrize("core", [copy_based_scan.copy_based_core, copy_based_scan.own_scan_core])
def test_whole_encoder_gives_the_same_map_and_is_left_as_it_was(core):
    encoder = build_encoder("digit_vmamba.digitscenes_64")
    pixels = torch.randn(1, 3, 24, 40)
    with torch.no_grad():
        expected = encoder(pixels).feature_maps[-1]
        with copy_based_scan.copy_based(encoder, core):
            found = encoder(pixels).feature_maps[-1]
        again = encoder(pixels).feature_maps[-1]
    assert not torch.equal(found, expected)  # it did run
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert torch.equal(again, expected)


def mamba_kernel(u, delta, rate, b, c, skip, z, delta_bias, *, delta_softplus):
    """In the place of the compiled kernel, with its arguments."""
    assert z is None and delta_softplus
    return copy_based_scan.sequential_scan(u, delta, rate, b, c, skip, delta_bias)


@pytest.mark.parametrize("package", ["mamba_ssm", "kernels"])
def test_prebuilt_kernel_is_taken_from_where_it_is(package, monkeypatch):
    found = types.ModuleType("found")
    found.selective_scan_fn = mamba_kernel
    hub = types.ModuleType("kernels")
    hub.get_kernel = {copy_based_scan.HUB_KERNEL: types.ModuleType("from_hub")}.__getitem__
    there = {
        "mamba_ssm": {"mamba_ssm.ops.selective_scan_interface": found},
        "kernels": {"mamba_ssm": None, "kernels": hub, "from_hub.ops.selective_scan_interface": found},
    }[package]
    for name, module in there.items():
        monkeypatch.setitem(sys.modules, name, module)
    if package == "kernels":
        monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", None)
    tensors = inputs(3, 4, 2)
    out = copy_based_scan.copy_based_core(**tensors, scan=copy_based_scan.prebuilt_scan())
    assert torch.equal(out, copy_based_scan.copy_based_core(**tensors))


def test_without_a_prebuilt_kernel_there_is_none(monkeypatch):
    for name in ("mamba_ssm", "mamba_ssm.ops.selective_scan_interface", "kernels"):
        monkeypatch.setitem(sys.modules, name, None)
    assert copy_based_scan.prebuilt_scan() is None
