"""Every backend of the two-dimensional selective scan against the loop over positions in float64."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_vlm.modeling.ops import scan_backends
from ssm_vlm.modeling.ops.scan_backends import Backend
from ssm_vlm.modeling.ops.selective_scan_2d import BACKENDS, chunked, custom_op, selective_scan_2d
from ssm_vlm.modeling.ops.selective_scan_2d.naive import scan_orders, selective_scan_2d_naive

NAMES = ("x", "dt_low_rank", "b", "c", "dt_weight", "dt_bias", "a_log", "d")
fast_backends = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "naive"], indirect=True)
shapes = pytest.mark.parametrize(
    "batch, height, width, channels, states, rank",
    [
        (1, 1, 1, 1, 1, 1),
        (2, 1, 17, 3, 1, 2),
        (2, 17, 1, 3, 16, 1),
        (1, 7, 5, 6, 16, 3),
        (3, 2, 3, 5, 2, 2),
        (2, 13, 11, 4, 1, 3),
        (1, 23, 29, 2, 1, 1),
        (1, 5, 13, 115, 3, 17),
    ],
)


def make_inputs(batch, height, width, channels, states, rank, dtype=torch.float64, seed=0):
    """Inputs for which the scan matters: step sizes near 1 and decay rates near 1, so that h remembers some steps."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0, shift=0.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + shift).to(dtype)

    grid = (batch, height, width)
    return [
        normal(*grid, channels),
        normal(*grid, 4, rank),
        normal(*grid, 4, states),
        normal(*grid, 4, states),
        normal(4, channels, rank, scale=0.5),
        normal(4, channels, scale=0.5),
        normal(4, channels, states, scale=0.5, shift=-0.5),
        normal(4, channels),
    ]


def run(function, inputs, weights):
    """Output, and gradients of its sum weighted with `weights`, by name."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    (output * weights).sum().backward()
    return {"out": output.detach()} | {name: leaf.grad for name, leaf in zip(NAMES, leaves, strict=True)}


def errors(ours, reference):
    """Relative to the largest value of each tensor."""
    assert ours.keys() == reference.keys()
    return {
        name: ((ours[name].double() - reference[name]).abs().max() / reference[name].abs().max().clamp(min=1e-9)).item()
        for name in reference
    }


def compare(function, inputs, seed=1):
    """Errors of `function` against the float64 loop on the same (rounded) inputs."""
    weights = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights = weights.to(inputs[0].dtype)
    reference = run(selective_scan_2d_naive, [tensor.double() for tensor in inputs], weights.double())
    return errors(run(function, inputs, weights), reference)


@pytest.fixture(params=["default units", "tiny units"])
def units(request, monkeypatch):
    """The chunked backend must not depend on how it cuts its work."""
    if request.param == "tiny units":
        monkeypatch.setattr(chunked, "UNIT_ELEMENTS", 40)
        monkeypatch.setattr(chunked, "MIN_CHANNELS", 2)


@fast_backends
@shapes
def test_float64_equals_the_loop(backend, batch, height, width, channels, states, rank, units):
    inputs = make_inputs(batch, height, width, channels, states, rank)
    found = compare(lambda *tensors: selective_scan_2d(*tensors, backend=backend), inputs)
    if height * width == 1:
        found.pop("a_log")  # exactly zero: a single position decays from nothing
    assert max(found.values()) < 1e-12, found


@fast_backends
@shapes
def test_float32_equals_the_float64_loop(backend, batch, height, width, channels, states, rank):
    inputs = make_inputs(batch, height, width, channels, states, rank, torch.float32)
    found = compare(lambda *tensors: selective_scan_2d(*tensors, backend=backend), inputs)
    if height * width == 1:
        found.pop("a_log")
    assert max(found.values()) < 2e-5, found


@fast_backends
@settings(max_examples=25)
@given(
    batch=st.integers(1, 3), height=st.integers(1, 12), width=st.integers(1, 12), channels=st.integers(1, 5),
    states=st.sampled_from([1, 2, 16]), rank=st.integers(1, 3), seed=st.integers(0, 999), unit=st.integers(1, 500),
)  # fmt: skip
def test_any_shape_and_any_cut(backend, batch, height, width, channels, states, rank, seed, unit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "UNIT_ELEMENTS", unit)
        patch.setattr(chunked, "MIN_CHANNELS", 1 + seed % 3)
        inputs = make_inputs(batch, height, width, channels, states, rank, seed=seed)
        found = compare(lambda *tensors: selective_scan_2d(*tensors, backend=backend), inputs)
    if height * width == 1:
        found.pop("a_log")
    assert max(found.values()) < 1e-10, found


@fast_backends
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("states", [1, 16])
def test_half_precision_inputs_lose_only_the_rounding_of_the_results(backend, dtype, tolerance, states):
    """The state is float32: against the loop on the same rounded inputs only outputs and gradients are rounded."""
    inputs = make_inputs(2, 9, 7, 4, states, 2, dtype)
    found = compare(lambda *tensors: selective_scan_2d(*tensors, backend=backend), inputs)
    assert max(found.values()) < tolerance, found
    assert selective_scan_2d(*inputs, backend=backend).dtype == dtype


@fast_backends
def test_float32_parameters_with_half_precision_maps(backend):
    """What autocast makes: maps in bfloat16, parameters in float32."""
    inputs = make_inputs(2, 9, 7, 4, 2, 2, torch.float32)
    inputs = [tensor.bfloat16() if index < 4 else tensor for index, tensor in enumerate(inputs)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = compare(lambda *tensors: selective_scan_2d(*tensors, backend=backend), inputs)
    assert max(found[name] for name in NAMES[4:]) < 1e-4, found  # a bfloat16 product in between would give 1e-2
    assert max(found.values()) < 1e-2, found


@fast_backends
def test_first_derivative_by_finite_differences(backend):
    """Independent of the oracle's own gradient."""
    inputs = [tensor.requires_grad_() for tensor in make_inputs(1, 3, 2, 2, 2, 1)]
    assert torch.autograd.gradcheck(lambda *tensors: selective_scan_2d(*tensors, backend=backend), inputs)


@fast_backends
def test_strided_inputs_and_gradients(backend):
    """b, c and dt_low_rank are slices of one projection in the model; a gradient may come transposed."""
    x, dt_low_rank, b, c, *parameters = make_inputs(2, 5, 4, 3, 2, 2)
    joined = torch.cat([dt_low_rank, b, c], dim=-1)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2), *joined.split([2, 2, 2], dim=-1), *parameters]
    weights = torch.randn(2, 3, 5, 4, dtype=torch.float64).permute(0, 2, 3, 1)
    reference = run(selective_scan_2d_naive, [x, dt_low_rank, b, c, *parameters], weights)
    ours = run(lambda *tensors: selective_scan_2d(*tensors, backend=backend), strided, weights)
    assert max(errors(ours, reference).values()) < 1e-12


@fast_backends
@pytest.mark.parametrize("shift", [-30.0, 30.0], ids=["steps of 1e-13", "steps of 30"])
def test_extreme_step_sizes_stay_finite(backend, shift):
    """Decays of exactly 0 and of 1: no logarithm, quotient or product of decays may turn into NaN."""
    inputs = make_inputs(1, 9, 31, 3, 2, 1, torch.float32)
    inputs[5] = inputs[5] + shift
    weights = torch.ones_like(inputs[0])
    ours = run(lambda *tensors: selective_scan_2d(*tensors, backend=backend), inputs, weights)
    assert all(tensor.isfinite().all() for tensor in ours.values())
    reference = run(selective_scan_2d_naive, [tensor.double() for tensor in inputs], weights.double())
    found = errors({"out": ours["out"], "x": ours["x"]}, {"out": reference["out"], "x": reference["x"]})
    assert max(found.values()) < 1e-5, found


@fast_backends
def test_gradients_of_states_that_decay_fast(backend):
    """Where a state is gone after one step, what is left of the state before is no difference of larger numbers."""
    inputs = make_inputs(1, 9, 11, 3, 4, 2, torch.float32)
    inputs[6] = inputs[6] + 4.5
    found = compare(lambda *tensors: selective_scan_2d(*tensors, backend=backend), inputs)
    assert max(found.values()) < 5e-6, found


@fast_backends
def test_no_memory_is_read_before_it_is_written(backend, monkeypatch):
    """Scratch memory filled with NaN must not reach the results."""
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *size, **kwargs: empty(self, *size, **kwargs).fill_(torch.nan)
    )
    inputs = make_inputs(2, 5, 3, 4, 2, 2)
    found = compare(lambda *tensors: selective_scan_2d(*tensors, backend=backend), inputs)
    assert max(found.values()) < 1e-12, found


@fast_backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_states_beyond_half_precision_stay_finite(backend, dtype):
    """The state climbs to about 10⁶ before it is read out through a small c: past what float16 holds."""
    inputs = make_inputs(1, 9, 11, 5, 1, 2, dtype)
    x, dt_low_rank, b, c, *parameters = inputs
    inputs = [x.abs() * 100, dt_low_rank, b.abs() * 1000, c * 1e-5, *parameters]
    output = selective_scan_2d(*inputs, backend=backend)
    expected = selective_scan_2d_naive(*(tensor.double() for tensor in inputs))
    assert output.isfinite().all() and errors({"out": output}, {"out": expected})["out"] < 2e-2
    unit_c = [*(tensor.float() for tensor in inputs[:3]), torch.ones_like(c).float(), *(p.float() for p in parameters)]
    assert selective_scan_2d(*unit_c, backend="chunked").abs().max() > 65504


@fast_backends
def test_runs_are_equal_to_the_bit(backend):
    inputs = make_inputs(2, 7, 9, 70, 3, 2, torch.float32)
    weights = torch.randn_like(inputs[0])
    first, second = (run(lambda *t: selective_scan_2d(*t, backend=backend), inputs, weights) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@fast_backends
@pytest.mark.parametrize("batch, channels", [(1, 192), (3, 40)])
def test_threads_change_no_output_and_gradients_by_rounding_only(backend, batch, channels):
    """More threads get narrower blocks of channels, so that sums over channels are taken in another order."""
    inputs = make_inputs(batch, 7, 9, channels, 2, 2, torch.float32)
    weights, threads, found = torch.randn_like(inputs[0]), torch.get_num_threads(), []
    try:
        for number in (1, 2, 5, 64):
            torch.set_num_threads(number)
            found.append(run(lambda *t: selective_scan_2d(*t, backend=backend), inputs, weights))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        exact = {name: tensor.double() for name, tensor in found[0].items()}
        differences = errors(other, exact)
        assert differences["x"] < 1e-6 and max(differences.values()) < 5e-6, differences
        assert backend != "cpp" or differences["out"] == 0.0


def drop_scan(x, *rest):
    return selective_scan_2d_naive(x, *rest) * 0 + x * rest[-1].sum(0)


def drop_skip(*inputs):
    return selective_scan_2d_naive(*inputs[:-1], inputs[-1] * 0)


def exchange_orders(*inputs):
    x, dt_low_rank, b, c, dt_weight, dt_bias, a_log, d = inputs
    order = [1, 0, 2, 3]
    maps = (tensor[:, :, :, order] for tensor in (dt_low_rank, b, c))
    return selective_scan_2d_naive(x, *maps, dt_weight[order], dt_bias[order], a_log[order], d)


@pytest.mark.parametrize("broken", [drop_scan, drop_skip, exchange_orders])
def test_the_comparison_catches_a_broken_scan(broken):
    """The inputs of these tests are ones for which the scan, the skip and the orders matter, far above tolerance."""
    found = compare(broken, make_inputs(1, 7, 5, 6, 16, 3))
    assert found["out"] > 0.05, found
    assert max(found["x"], found["b"], found["a_log"]) > 0.05, found


def test_orders_of_a_two_by_three_map():
    assert scan_orders(2, 3).tolist() == [
        [0, 1, 2, 3, 4, 5],
        [0, 3, 1, 4, 2, 5],
        [5, 4, 3, 2, 1, 0],
        [5, 2, 4, 1, 3, 0],
    ]


def test_state_reaches_only_later_positions_of_each_order():
    """With one direction switched on, an impulse shows up exactly at the positions that its order visits later."""
    for k, order in enumerate(scan_orders(3, 4).tolist()):
        x, dt_low_rank, b, c, dt_weight, dt_bias, a_log, d = make_inputs(1, 3, 4, 1, 1, 1)
        only = torch.zeros(4, dtype=x.dtype)
        only[k] = 1
        x.zero_()
        x[0, 1, 2] = 1.0
        output = selective_scan_2d(
            x, dt_low_rank, b, torch.ones_like(c) * only[:, None], dt_weight, dt_bias, a_log, d * 0, backend="chunked"
        )
        reached = set(output.flatten().nonzero().flatten().tolist())
        assert reached == set(order[order.index(1 * 4 + 2) :])


def test_argument_beats_variable_beats_default(monkeypatch):
    called = []

    def noting(name):
        return lambda *inputs: called.append(name) or inputs[0].clone()

    noting_backends = {name: Backend(noting(name), noting(name), lambda *_, asked_for: None) for name in ("b1", "b2")}
    monkeypatch.setattr(custom_op, "BACKENDS", noting_backends)
    inputs = make_inputs(1, 2, 2, 1, 1, 1)
    monkeypatch.delenv("SSM_VLM_SCAN_BACKEND", raising=False)
    selective_scan_2d(*inputs)
    monkeypatch.setenv("SSM_VLM_SCAN_BACKEND", "b2")
    selective_scan_2d(*inputs)
    selective_scan_2d(*inputs, backend="b1")
    assert called == ["b1", "b2", "b1"]


def test_choice_is_logged_once_with_its_reason(caplog):
    scan_backends.log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger=scan_backends.logger.name):
        for _ in range(3):
            selective_scan_2d(*make_inputs(1, 2, 2, 1, 1, 1), backend="naive")
    assert caplog.messages == ["selective_scan_2d: backend naive, because the backend argument asks for it."]


def test_unknown_backend_is_refused(monkeypatch):
    inputs = make_inputs(1, 2, 2, 1, 1, 1)
    with pytest.raises(
        ValueError, match=r"unknown backend 'fast' \(the backend argument asks for it\); there are naive, "
    ):
        selective_scan_2d(*inputs, backend="fast")
    monkeypatch.setenv("SSM_VLM_SCAN_BACKEND", "typo")
    with pytest.raises(ValueError, match=r"unknown backend 'typo' \(SSM_VLM_SCAN_BACKEND asks for it\)"):
        selective_scan_2d(*inputs)


@pytest.mark.parametrize("index", range(1, 8))
def test_wrong_shape_is_named(index):
    inputs = make_inputs(1, 3, 2, 5, 2, 4)
    inputs[index] = inputs[index][..., None]
    name = {4: "dt_low_rank", 6: "b"}.get(index, NAMES[index])  # rank and states are read off dt_weight and a_log
    with pytest.raises(ValueError, match=rf"selective_scan_2d: {name} must be \["):
        selective_scan_2d(*inputs)


def test_empty_map_is_refused():
    inputs = make_inputs(1, 3, 2, 5, 2, 4)
    with pytest.raises(ValueError, match=r"x must be \[B, H, W, E\] with no empty side, got \[1, 0, 2, 5\]"):
        selective_scan_2d(inputs[0][:, :0], *inputs[1:])
