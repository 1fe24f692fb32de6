"""Each mixer on its own: the shapes it takes, what its output may depend on, its numbers against plain arithmetic."""

import math

import pytest
import torch
from torch.nn import functional as F

from ssm_vlm import SSMVisionConfig
from ssm_vlm.configuration.configuration_ssm_vision import MIXER_NAMES
from ssm_vlm.modeling.mixers import MIXERS, axial_rotary

WIDTH = 16


def make(name, block=0, **fields):
    torch.manual_seed(0)
    config = SSMVisionConfig(hidden_sizes=[WIDTH], depths=[2], mixer=name, head_dim=8, window_size=3, **fields)
    mixer = MIXERS[name](config, 0, block).eval()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return mixer


def reached(mixer, height, width, row, column):
    """Positions whose output changes when the input at (row, column) does."""
    x = torch.randn(1, height, width, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[0, row, column] += 1.0
    mixer = mixer.double()
    with torch.no_grad():
        difference = (mixer(changed) - mixer(x)).abs().amax(-1)[0]
    return {(i, j) for i in range(height) for j in range(width) if difference[i, j] > 1e-12}


def test_table_and_configuration_name_the_same_mixers():
    assert sorted(MIXERS) == sorted(MIXER_NAMES)


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("height, width", [(1, 1), (1, 5), (4, 1), (3, 3), (7, 5), (6, 9)])
@pytest.mark.parametrize("name", MIXERS)
def test_keeps_the_shape_of_any_map(name, height, width, block):
    x = torch.randn(2, height, width, WIDTH, requires_grad=True)
    mixer = make(name, block)
    output = mixer(x)
    assert output.shape == x.shape and output.isfinite().all()
    output.square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in mixer.parameters())


@pytest.mark.parametrize("name", MIXERS)
def test_samples_of_a_batch_do_not_see_each_other(name):
    mixer = make(name, block=1)
    x = torch.randn(3, 5, 4, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x)[1:2], mixer(x[1:2]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"gated": True, "d_state": 3, "conv_bias": True}], ids=["v2", "v0"])
def test_ss2d_and_global_attention_reach_every_position(fields):
    everywhere = {(i, j) for i in range(6) for j in range(7)}
    assert reached(make("ss2d", **fields), 6, 7, 2, 5) == everywhere
    assert reached(make("global_attention"), 6, 7, 2, 5) == everywhere


def test_identity_reaches_only_itself():
    assert reached(make("identity"), 4, 4, 1, 2) == {(1, 2)}


def test_dwconv_reaches_its_kernel():
    assert reached(make("dwconv", dwconv_kernel=3), 6, 6, 2, 3) == {(i, j) for i in (1, 2, 3) for j in (2, 3, 4)}


@pytest.mark.parametrize(
    "block, row, column, rows, columns",
    [
        (0, 4, 1, (3, 4, 5), (0, 1, 2)),
        (0, 7, 7, (6, 7), (6, 7)),  # the windows at the far border are cut
        (1, 0, 0, (0, 1), (0, 1)),  # shifted by one: the windows at the near border are cut
        (1, 4, 1, (2, 3, 4), (0, 1)),
    ],
)
def test_window_attention_reaches_its_window(block, row, column, rows, columns):
    window = {(i, j) for i in rows for j in columns}
    assert reached(make("window_attention", block), 8, 8, row, column) == window


def test_a_map_that_fits_one_window_is_global_attention():
    for block in (0, 1):
        window, attention = make("window_attention", block), make("global_attention")
        attention.load_state_dict(window.state_dict())
        x = torch.randn(2, 3, 2, WIDTH)
        with torch.no_grad():
            torch.testing.assert_close(window(x), attention(x), atol=1e-5, rtol=1e-5)


def test_global_attention_by_plain_arithmetic():
    mixer = make("global_attention").double()
    x = torch.randn(1, 2, 3, WIDTH, dtype=torch.float64)
    query, key, value = (tensor.reshape(6, 2, 8) for tensor in mixer.project(x))
    expected = torch.empty(6, 2, 8, dtype=torch.float64)
    for head in range(2):
        scores = query[:, head] @ key[:, head].T / math.sqrt(8)
        expected[:, head] = scores.softmax(-1) @ value[:, head]
    expected = F.linear(expected.reshape(1, 2, 3, WIDTH), mixer.out_proj.weight, mixer.out_proj.bias)
    torch.testing.assert_close(mixer(x), expected)


def test_rotary_scores_depend_on_offsets_only():
    """q at (1, 2) against k at (3, 5) scores like q at (0, 0) against k at (2, 3), unlike k one row or column on."""
    like = torch.empty(0, dtype=torch.float64)
    cos, sin = axial_rotary(6, 6, 8, 100.0, like)
    query, key = torch.randn(2, 8, dtype=torch.float64)

    def rotated(vector, row, column):
        first, second = vector.chunk(2)
        c, s = cos[row, column], sin[row, column]
        return torch.cat([first * c - second * s, second * c + first * s])

    def score(at, to):
        return (rotated(query, *at) @ rotated(key, *to)).item()

    assert score((1, 2), (3, 5)) == pytest.approx(score((0, 0), (2, 3)))
    for elsewhere in ((3, 3), (2, 4), (3, 2)):
        assert score((0, 0), (2, 3)) != pytest.approx(score((0, 0), elsewhere), rel=1e-3)


@pytest.mark.parametrize("fields, rank", [({}, math.ceil(WIDTH / 16)), ({"dt_rank": 5}, 5)])
def test_ss2d_sizes(fields, rank):
    mixer = make("ss2d", ssm_ratio=3.0, d_state=2, **fields)
    assert mixer.dt_weight.shape == (4, 3 * WIDTH, rank)
    assert mixer.x_proj_weight.shape == (4, rank + 4, 3 * WIDTH)


def test_ss2d_step_rank_follows_the_width_of_its_stage():
    config = SSMVisionConfig()
    with torch.device("meta"):
        assert [MIXERS["ss2d"](config, stage, 0).rank for stage in range(4)] == [6, 12, 24, 48]
