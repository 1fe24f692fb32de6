"""Every backend of the selective scan of a sequence against the loop over positions in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_vlm.modeling.ops.selective_scan_1d import selective_scan_1d
from ssm_vlm.modeling.ops.selective_scan_1d.naive import selective_scan_1d_naive
from ssm_vlm.modeling.ops.selective_scan_2d import BACKENDS, chunked, selective_scan_2d

NAMES = ("x", "dt_low_rank", "b", "c", "dt_weight", "dt_bias", "a_log", "d")
fast_backends = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "naive"], indirect=True)
every_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
LENGTHS = [1, 2, 3, 4, 5, 9, 16, 17, 49, 196]


def make_inputs(batch, length, channels, states, rank, dtype=torch.float64, seed=0):
    """Inputs for which the scan matters: step sizes near 1 and decay rates near 1, so that h remembers some steps."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0, shift=0.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + shift).to(dtype)

    return [
        normal(batch, length, channels),
        normal(batch, length, rank),
        normal(batch, length, states),
        normal(batch, length, states),
        normal(channels, rank, scale=0.5),
        normal(channels, scale=0.5),
        normal(channels, states, scale=0.5, shift=-0.5),
        normal(channels),
    ]


def run(function, inputs, weights):
    """Output, and gradients of its sum weighted with `weights`, by name."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    (output * weights).sum().backward()
    return {"out": output.detach()} | {name: leaf.grad for name, leaf in zip(NAMES, leaves, strict=True)}


def compare(backend, inputs, seed=1):
    """Largest error of a backend against the float64 loop on the same (rounded) inputs, each relative to its own
    largest value."""
    weights = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights = weights.to(inputs[0].dtype)
    reference = run(selective_scan_1d_naive, [tensor.double() for tensor in inputs], weights.double())
    ours = run(lambda *tensors: selective_scan_1d(*tensors, backend=backend), inputs, weights)
    if inputs[0].shape[1] == 1:
        ours.pop("a_log")  # zero: a single position decays from nothing
    return max(
        ((ours[name].double() - reference[name]).abs().max() / reference[name].abs().max().clamp(min=1e-9)).item()
        for name in ours
    )


@fast_backends
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 1e-2)])
def test_equals_the_float64_loop(backend, length, dtype, tolerance):
    assert compare(backend, make_inputs(2, length, 6, 8, 3, dtype)) < tolerance


@fast_backends
@settings(max_examples=25)
@given(
    batch=st.integers(1, 3), length=st.integers(1, 70), channels=st.integers(1, 5), seed=st.integers(0, 999),
    states=st.sampled_from([1, 2, 16]), rank=st.integers(1, 3), unit=st.integers(1, 500),
)  # fmt: skip
def test_any_shape_and_any_cut(backend, batch, length, channels, seed, states, rank, unit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "UNIT_ELEMENTS", unit)
        patch.setattr(chunked, "MIN_CHANNELS", 1 + seed % 3)
        assert compare(backend, make_inputs(batch, length, channels, states, rank, seed=seed)) < 1e-10


@every_backend
def test_first_derivative_by_finite_differences(backend):
    """Independent of the oracle's own gradient."""
    inputs = [tensor.requires_grad_() for tensor in make_inputs(1, 5, 2, 2, 1)]
    assert torch.autograd.gradcheck(lambda *tensors: selective_scan_1d(*tensors, backend=backend), inputs)


@every_backend
def test_one_step_by_hand(backend):
    """softplus(0) = log 2 and a decay rate of 1 halve the state: 1, then 1/2 + 1, then 3/4 + 1, in units of log 2."""
    one, zero = torch.ones(1, 3, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    output = selective_scan_1d(
        one, one * 0, one, one, zero, zero[0], zero, torch.tensor([2.0]).double(), backend=backend
    )
    expected = torch.tensor([1.0, 1.5, 1.75]).double() * torch.log(torch.tensor(2.0).double()) + 2.0
    assert torch.allclose(output.flatten(), expected, atol=1e-15)


@every_backend
def test_the_first_direction_of_a_map_is_the_sequence_of_its_rows(backend):
    """The two scans are written separately as loops; silenced in three directions, the map's is the sequence's."""
    inputs = make_inputs(2, 12, 3, 2, 2)
    maps = [tensor.unflatten(1, (3, 4)) for tensor in inputs[:4]]
    parameters = [torch.stack([parameter] * 4) for parameter in inputs[4:]]
    first = torch.tensor([1.0, 0, 0, 0]).double()
    of_map = selective_scan_2d(
        maps[0],
        *(tensor[:, :, :, None].expand(-1, -1, -1, 4, -1) for tensor in maps[1:3]),
        maps[3][:, :, :, None] * first[:, None],
        *parameters[:3],
        parameters[3] * first[:, None],
        backend=backend,
    )
    assert torch.allclose(of_map.flatten(1, 2), selective_scan_1d(*inputs, backend=backend), atol=1e-12)


@every_backend
def test_later_positions_do_not_reach_earlier_ones(backend):
    inputs = make_inputs(1, 11, 3, 2, 2)
    before = selective_scan_1d(*inputs, backend=backend)
    inputs[0][:, 7:] += 1.0
    after = selective_scan_1d(*inputs, backend=backend)
    assert torch.equal(before[:, :7], after[:, :7]) and not torch.isclose(before[:, 7:], after[:, 7:]).any()


@fast_backends
def test_float32_parameters_with_half_precision_sequences(backend):
    """What autocast makes: sequences in bfloat16, parameters in float32."""
    inputs = make_inputs(2, 21, 4, 2, 2, torch.float32)
    inputs = [tensor.bfloat16() if index < 4 else tensor for index, tensor in enumerate(inputs)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compare(backend, inputs) < 1e-2


@fast_backends
@pytest.mark.parametrize("shift", [-30.0, 30.0], ids=["steps of 1e-13", "steps of 30"])
def test_extreme_step_sizes_stay_finite(backend, shift):
    inputs = make_inputs(1, 60, 3, 2, 1, torch.float32)
    inputs[5] = inputs[5] + shift
    found = run(lambda *tensors: selective_scan_1d(*tensors, backend=backend), inputs, torch.ones_like(inputs[0]))
    assert all(tensor.isfinite().all() for tensor in found.values())


@fast_backends
def test_gradients_of_states_that_decay_fast(backend):
    """Where a state is gone after one step, what is left of the state before is no difference of larger numbers."""
    inputs = make_inputs(1, 99, 3, 4, 2, torch.float32)
    inputs[6] = inputs[6] + 4.5
    assert compare(backend, inputs) < 5e-6


def test_environment_chooses(monkeypatch):
    monkeypatch.setenv("SSM_VLM_SCAN_BACKEND", "typo")
    with pytest.raises(ValueError, match=r"unknown backend 'typo' \(SSM_VLM_SCAN_BACKEND asks"):
        selective_scan_1d(*make_inputs(1, 2, 1, 1, 1))


@pytest.mark.parametrize("index", range(1, 8))
def test_wrong_shape_is_named(index):
    inputs = make_inputs(1, 6, 5, 2, 4)
    inputs[index] = inputs[index][..., None]
    name = {4: "dt_low_rank", 6: "b"}.get(index, NAMES[index])  # rank and states are read off dt_weight and a_log
    with pytest.raises(ValueError, match=rf"selective_scan_1d: {name} must be \["):
        selective_scan_1d(*inputs)


def test_empty_sequence_is_refused():
    inputs = make_inputs(1, 6, 5, 2, 4)
    with pytest.raises(ValueError, match=r"x must be \[B, L, E\] with no empty side, got \[1, 0, 5\]"):
        selective_scan_1d(inputs[0][:, :0], *inputs[1:])
