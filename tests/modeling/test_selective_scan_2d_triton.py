"""The Triton kernels of the two-dimensional selective scan against the loop over positions in float64.

On a CUDA device natively; elsewhere in Triton's interpreter, which must be chosen before Triton is imported:
`make test-triton`, or TRITON_INTERPRET=1.
"""

import importlib
import importlib.util
import os

import pytest
import torch
from test_selective_scan_2d import NAMES, errors, make_inputs, run

from ssm_vlm.modeling.ops.selective_scan_2d import BACKENDS, selective_scan_2d
from ssm_vlm.modeling.ops.selective_scan_2d.naive import selective_scan_2d_naive

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed here: make test-triton", allow_module_level=True)
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no CUDA device, and TRITON_INTERPRET=1 is not set: make test-triton", allow_module_level=True)

backend = importlib.import_module("ssm_vlm.modeling.ops.selective_scan_2d.triton")
kernels = importlib.import_module("ssm_vlm.modeling.ops.selective_scan_2d.triton_kernels")
ROW_BY_ROW = {name: getattr(kernels, name) for name in ("_row", "_adjoints")}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True, scope="module")
def scan_whole_slices():
    """The interpreter runs a scan's function once for each number; here once for each slice, 30 times as fast. And
    what the kernels do row by row is slow there, as each row costs several calls."""
    if not INTERPRETED:
        yield
        return
    import numpy as np
    from triton.runtime.interpreter import ScanOps

    def scan(self, inputs):
        values = [np.moveaxis(tensor.handle.data, self.axis, 0) for tensor in inputs]
        results = [value.copy() for value in values]
        for step in range(1, len(values[0])):
            slices = [[self.to_tensor(v[i], t.dtype) for v, t in zip(arrays, inputs, strict=True)]
                      for arrays, i in ((results, step - 1), (values, step))]  # fmt: skip
            for result, tensor in zip(results, self.combine_fn.fn(*slices[0], *slices[1]), strict=True):
                result[step] = tensor.handle.data
        return [self.to_tensor(np.moveaxis(r, 0, self.axis), t.dtype) for r, t in zip(results, inputs, strict=True)]

    def tensor(data, like):
        return kernels.tl.core.tensor(
            type(like.handle)(data, like.dtype), kernels.tl.core.block_type(like.dtype, list(data.shape))
        )

    def row(values, index, size):
        return tensor(values.handle.data[index], values)

    def adjoints(direct, decay, behind, size):
        result, carried = np.empty_like(direct.handle.data), behind.handle.data
        for step in reversed(range(size)):
            result[step] = direct.handle.data[step] + carried
            carried = decay.handle.data[step] * result[step]
        return tensor(result, direct)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScanOps, "generic_scan", scan)
        patch.setattr(kernels, "_row", row)
        patch.setattr(kernels, "_adjoints", adjoints)
        yield


def test_rows_of_a_tile(monkeypatch):
    """As the kernels take them, not as the fixture above does."""
    for name, function in ROW_BY_ROW.items():
        monkeypatch.setattr(kernels, name, function)
    cut_into(monkeypatch, 2)
    assert max(compare(triton, inputs_of(1, 5, 4, 3, 1, 2)).values()) < 1e-4


def cut_into(monkeypatch, tiles, tile=16, channels=32, vector=1):
    """Tiles smaller than the launch code chooses, so that small maps have several."""
    monkeypatch.setattr(backend, "plan", lambda *args, **kwargs: backend.Plan(tile, channels, vector, tiles))


def triton(*inputs):
    moved = [tensor.to(DEVICE) for tensor in inputs]
    return selective_scan_2d(*moved, backend="triton").to(inputs[0].device)


def inputs_of(batch, height, width, channels, states, rank, dtype=torch.float32):
    return make_inputs(batch, height, width, channels, states, rank, dtype)


def compare(function, inputs):
    weights = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = weights.to(inputs[0].dtype)
    reference = run(selective_scan_2d_naive, [tensor.double() for tensor in inputs], weights.double())
    found = errors(run(function, inputs, weights), reference)
    if inputs[0].shape[1] * inputs[0].shape[2] == 1:
        found.pop("a_log")  # exactly zero: a single position decays from nothing
    return found


walks = pytest.mark.parametrize("tiles", [1, 2, 9], ids=["tile per chunk", "two tiles per chunk", "one chunk"])


@pytest.mark.parametrize(
    "batch, height, width, channels, states, rank, tiles",
    [
        (1, 1, 1, 1, 1, 1, 1),
        (2, 1, 19, 3, 1, 2, 1),
        (1, 37, 1, 3, 2, 1, 2),
        (1, 5, 4, 6, 16, 3, 1),
        (1, 11, 5, 5, 1, 3, 1),
        (1, 11, 5, 5, 1, 3, 2),
        (1, 11, 5, 5, 1, 3, 9),
        (2, 5, 7, 33, 3, 2, 2),
        (1, 17, 3, 2, 1, 17, 1),
    ],
    ids=str,
)
def test_equals_the_loop(monkeypatch, batch, height, width, channels, states, rank, tiles):
    """Sequences shorter than a tile, cut into chunks of one tile, of two, and walked in one."""
    cut_into(monkeypatch, tiles)
    found = compare(triton, inputs_of(batch, height, width, channels, states, rank))
    assert found["out"] < 1e-5, found
    assert max(found.values()) < 1e-4, found


def test_neighbouring_channels_in_a_thread(monkeypatch):
    cut_into(monkeypatch, 2, tile=16, channels=64, vector=2)
    assert max(compare(triton, inputs_of(1, 5, 7, 66, 1, 2)).values()) < 1e-4


def test_with_the_cut_of_the_launch_code():
    found = compare(triton, inputs_of(1, 5, 9, 6, 2, 3))
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=["bf16", "fp16"])
@pytest.mark.parametrize("states", [1, 16])
def test_half_precision_inputs_lose_only_the_rounding_of_the_results(monkeypatch, dtype, tolerance, states):
    cut_into(monkeypatch, 2)
    inputs = inputs_of(1, 5, 4, 4, states, 2, dtype)
    assert max(compare(triton, inputs).values()) < tolerance
    assert triton(*inputs).dtype == dtype


def test_float32_parameters_with_half_precision_maps(monkeypatch):
    cut_into(monkeypatch, 1)
    inputs = [t.bfloat16() if index < 4 else t for index, t in enumerate(inputs_of(1, 5, 7, 4, 2, 2))]
    found = compare(triton, inputs)
    assert max(found[name] for name in NAMES[4:]) < 1e-4, found
    assert max(found.values()) < 1e-2, found


@pytest.mark.parametrize("directions, tiles", [(1, 2), (2, 1)])
def test_first_directions_alone(monkeypatch, directions, tiles):
    """As a scan of a sequence uses it: the others are given no weight."""
    cut_into(monkeypatch, tiles)
    inputs = inputs_of(1, 5, 9, 3, 2, 2)
    silent = [tensor.clone() for tensor in inputs]
    silent[3][:, :, :, directions:] = 0
    silent[7][directions:] = 0
    x, low_rank, b, c, *parameters = (tensor.to(DEVICE) for tensor in inputs)
    maps = [tensor[:, :, :, :directions] for tensor in (low_rank, b, c)]
    few = [x, *maps, *(parameter[:directions] for parameter in parameters)]
    grad = torch.ones_like(x)
    assert (backend.forward(*few).cpu() - selective_scan_2d_naive(*silent)).abs().max() < 1e-4
    leaves = [tensor.double().requires_grad_() for tensor in silent]
    selective_scan_2d_naive(*leaves).sum().backward()
    for name, ours, leaf in zip(NAMES, backend.backward(grad, *few), leaves, strict=True):
        theirs = leaf.grad if name == "x" else leaf.grad.narrow(3 if name in NAMES[1:4] else 0, 0, directions)
        assert (ours.cpu() - theirs).abs().max() < 1e-4 * theirs.abs().max().clamp(min=1), name


def test_strided_inputs_and_gradients(monkeypatch):
    """b, c and dt_low_rank are slices of one projection in the model, not copied; a gradient may be transposed."""
    cut_into(monkeypatch, 1)
    x, low_rank, b, c, *parameters = inputs_of(2, 5, 4, 3, 2, 2)
    joined = torch.cat([low_rank, b, c], dim=-1)
    slices = joined.split([2, 2, 2], dim=-1)
    assert all(backend._with_one_stride(values) is values for values in slices)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2), *slices, *parameters]
    weights = torch.randn(2, 3, 5, 4).permute(0, 2, 3, 1)
    reference = run(selective_scan_2d_naive, [t.double() for t in (x, low_rank, b, c, *parameters)], weights.double())
    assert max(errors(run(triton, strided, weights), reference).values()) < 1e-4


@walks
def test_no_memory_is_read_before_it_is_written(monkeypatch, tiles):
    """Every output and every scratch tensor starts as NaN."""
    cut_into(monkeypatch, tiles)
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *args, allocate=allocate, **kwargs: allocate(*args, **kwargs).fill_(torch.nan)
        )
    inputs = [tensor.to(DEVICE) for tensor in inputs_of(2, 7, 5, 3, 2, 2)]
    results = [backend.forward(*inputs), *backend.backward(torch.ones_like(inputs[0]), *inputs)]
    assert all(tensor.isfinite().all() for tensor in results)


@walks
def test_bit_equal_from_run_to_run(monkeypatch, tiles):
    cut_into(monkeypatch, tiles)
    inputs = [tensor.to(DEVICE) for tensor in inputs_of(2, 7, 9, 3, 1, 2)]
    first, second = (
        (backend.forward(*inputs), *backend.backward(torch.ones_like(inputs[0]), *inputs)) for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_states_beyond_half_precision_stay_finite(monkeypatch, dtype):
    """Sums of 35 values of 3e4 that hardly decay: a float16 state would be infinite; the outputs are not."""
    cut_into(monkeypatch, 1)
    inputs = inputs_of(1, 5, 7, 2, 1, 1, dtype)
    inputs[0] = torch.full_like(inputs[0], 3e4)
    inputs[2], inputs[3] = torch.ones_like(inputs[2]), torch.full_like(inputs[3], 1e-4)
    inputs[4], inputs[5] = inputs[4] * 0, torch.full_like(inputs[5], 2.0)
    inputs[6], inputs[7] = torch.full_like(inputs[6], -9.0), inputs[7] * 0
    results = run(triton, inputs, torch.full_like(inputs[0], 1e-3))
    assert all(tensor.isfinite().all() for tensor in results.values())
    reference = selective_scan_2d_naive(*(tensor.double() for tensor in inputs))
    assert reference.abs().max() > 100
    assert (results["out"] - reference).abs().max() < 1e-2 * reference.abs().max()


@pytest.mark.parametrize("shift", [-30.0, 30.0], ids=["steps of 1e-13", "steps of 30"])
def test_extreme_step_sizes(monkeypatch, shift):
    cut_into(monkeypatch, 1)
    inputs = inputs_of(1, 5, 7, 3, 2, 1)
    inputs[5] = inputs[5] + shift
    weights = torch.ones_like(inputs[0])
    ours = run(triton, inputs, weights)
    assert all(tensor.isfinite().all() for tensor in ours.values())
    reference = run(selective_scan_2d_naive, [tensor.double() for tensor in inputs], weights.double())
    found = errors(ours, reference)
    assert max(found["out"], found["x"], found["dt_bias"]) < 1e-4, found


def test_gradients_of_states_that_decay_fast(monkeypatch):
    """Where a state is gone after one step, what is left of the state before is no difference of larger numbers."""
    cut_into(monkeypatch, 1)
    inputs = inputs_of(1, 5, 7, 3, 2, 2)
    inputs[6] = inputs[6] + 4.5
    found = compare(triton, inputs)
    assert max(found.values()) < 2e-5, found


def test_the_comparison_catches_exchanged_directions(monkeypatch):
    cut_into(monkeypatch, 1)

    def exchanged(x, low_rank, b, c, *parameters):
        order = [2, 1, 0, 3]
        return triton(x, *(maps[:, :, :, order] for maps in (low_rank, b, c)), *(p[order] for p in parameters))

    found = compare(exchanged, inputs_of(1, 5, 7, 6, 1, 3))
    assert found["out"] > 0.05 and found["x"] > 0.05, found


@pytest.mark.parametrize("offset", [-1, 1])
def test_the_comparison_catches_a_chunk_that_enters_one_off(monkeypatch, offset):
    """States that enter chunks matter in these tests."""
    cut_into(monkeypatch, 1)
    entering = backend._Launch.entering_states
    monkeypatch.setattr(backend._Launch, "entering_states", lambda *args: entering(*args).roll(offset, 3).contiguous())
    found = compare(triton, inputs_of(1, 5, 9, 6, 1, 3))
    assert min(found["out"], found["x"], found["a_log"]) > 0.01, found


def test_offsets_of_64_bits(monkeypatch):
    """What maps of 2^31 elements take, on a small one."""
    cut_into(monkeypatch, 2)
    monkeypatch.setattr(backend, "MAX_OFFSET", 0)
    assert max(compare(triton, inputs_of(2, 5, 9, 3, 1, 2)).values()) < 1e-4


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [(64, 56 * 56, 192), (64, 14 * 14, 768), (1, 56 * 56, 192), (1, 200 * 334, 192), (1, 1, 1), (3, 49, 1535)],
    ids=str,
)
def test_the_cut_fills_the_chip(monkeypatch, sizes, backward):
    """With a warp for each scheduler, unless there are fewer tiles, on 132 multiprocessors."""
    monkeypatch.setattr(backend, "multiprocessors", lambda device: 132)
    cut = backend.plan(*sizes, torch.device("cpu"), backward=backward)
    batch, length, channels = sizes
    programs = batch * -(-channels // cut.channels) * -(-length // (cut.tile * cut.tiles))
    assert cut.tiles == 1 or programs * cut.channels // (32 * cut.vector) >= 132 * 4
    assert cut.vector == 1 if backward else cut.vector <= backend.MAX_VECTOR
    assert -channels % cut.channels <= max(31, channels / 8)


def test_refusals():
    x = torch.zeros(1, 1, 1, 1)
    assert "triton" in BACKENDS
    assert backend.why_not(x, asked_for=False) == "Triton has no compiler for cpu tensors"
    assert "float64" in backend.why_not(x.double().to(DEVICE), asked_for=True)
    assert backend.why_not(x.to(DEVICE), asked_for=True) is None
