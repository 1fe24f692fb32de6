"""Token arithmetic: exact numbers, rounding rules, and the answers to bad input."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import BitConfig, ConvNextConfig, SwinConfig, TimmBackboneConfig, ViTConfig

from ssm_vlm.configuration.configuration_hidden_state_backbone import HiddenStateBackboneConfig
from ssm_vlm.modeling.token_grid import encoder_downsampling, grid_size, num_image_tokens

VMAMBA = [[2, "ceil"]] * 4
VIT = [[16, "floor"]]


@pytest.mark.parametrize(
    ("height", "width", "steps", "grid"),
    [
        (224, 224, VMAMBA, (14, 14)),
        (800, 1333, VMAMBA, (50, 84)),  # the reference says 50x83 = 4150
        (512, 512, VMAMBA, (32, 32)),
        (1, 1, VMAMBA, (1, 1)),
        (17, 16, VMAMBA, (2, 1)),
        (224, 224, VIT, (14, 14)),
        (239, 240, VIT, (14, 15)),
        (27, 33, [[4, "floor"], [2, "ceil"]], (3, 4)),
        (64, 64, [], (64, 64)),
        (800, 1333, [*VMAMBA, [2, "ceil"]], (25, 42)),
        (800, 1333, [*VMAMBA, [[30, 100], "at_most"]], (30, 84)),
    ],
)
def test_known_grids(height, width, steps, grid):
    assert grid_size(height, width, steps) == grid
    assert num_image_tokens(height, width, steps) == grid[0] * grid[1]


@given(st.integers(1, 5000), st.lists(st.integers(1, 8), max_size=5))
def test_steps_of_one_rounding_equal_one_step_of_their_product(size, strides):
    product = 1
    for stride in strides:
        product *= stride
    assert grid_size(size, size, [[s, "ceil"] for s in strides]) == grid_size(size, size, [[product, "ceil"]])
    if size >= product:
        assert grid_size(size, size, [[s, "floor"] for s in strides]) == grid_size(size, size, [[product, "floor"]])


def test_a_canvas_without_a_token_is_refused():
    with pytest.raises(ValueError, match=r"8x40 pixel canvas gives a 0x2 grid.*\[\[16, 'floor'\]\] needs a larger"):
        grid_size(8, 40, VIT)


@pytest.mark.parametrize(
    "step",
    [
        [0, "ceil"],
        [2, "round"],
        [2],
        4,
        ["a", "ceil"],
        [1.5, "floor"],
        [[2], "at_most"],
        [[0, 2], "at_most"],
        [2, "at_most"],
        [[2, 2], "ceil"],
    ],
)
def test_bad_steps_are_named(step):
    with pytest.raises(ValueError, match="must be .positive int, .ceil"):
        grid_size(8, 8, [step])


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        (
            SwinConfig(depths=[1, 1, 1], num_heads=[1, 2, 4], out_features=["stage3"]),
            [[4, "ceil"], [2, "ceil"], [2, "ceil"]],
        ),
        (SwinConfig(out_features=["stage1"]), [[4, "ceil"]]),
        (ConvNextConfig(out_features=["stage2"]), [[4, "floor"], [2, "floor"]]),
        (HiddenStateBackboneConfig(vision_config=ViTConfig(patch_size=14)), [[14, "floor"]]),
    ],
)
def test_steps_stop_at_the_tap(config, steps):
    assert encoder_downsampling(config) == steps


@pytest.mark.parametrize(
    ("model", "out_indices", "steps"),
    [
        ("resnet18", [3], [[16, "ceil"]]),
        ("convnext_atto", [1], [[8, "floor"]]),
        ("swin_tiny_patch4_window7_224", [2], [[16, "floor"]]),  # takes 224x224 only
    ],
)
@pytest.mark.timm
def test_timm_backbones_are_measured(model, out_indices, steps):
    config = TimmBackboneConfig(backbone=model, out_indices=out_indices)
    assert encoder_downsampling(config) == steps


def test_an_unknown_encoder_type_is_named():
    with pytest.raises(ValueError, match="encoder type 'bit' is not known.*DOWNSAMPLING"):
        encoder_downsampling(BitConfig())
