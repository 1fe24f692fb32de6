"""Costs: exact on models small enough to count by hand, close to the published ones, and those of the whole table."""

import json

import pytest
from transformers import ConvNextConfig, SwinConfig, ViTConfig

from ssm_vlm.configuration.configuration_hidden_state_backbone import HiddenStateBackboneConfig
from ssm_vlm.configuration.configuration_ssm_vision import SSMVisionConfig
from ssm_vlm.configuration.named_encoders import ENCODERS
from ssm_vlm.eval.encoder_cost import EncoderCost, encoder_cost, main
from ssm_vlm.modeling.ops.selective_scan_2d.custom_op import selective_scan_flops

ONE_OF_EACH_FAMILY = [
    *(name for name in ENCODERS if name.startswith("digit_")),
    "vmamba_tiny_s1l8.in1k_224",
    "mambavision_tiny.in1k_224",
    "deit_tiny_patch16.fb_in1k_224",
    "swin_tiny.in1k_224",
    "convnext_tiny.in1k_224",
]


def check_entry(name):
    encoder = ENCODERS[name]
    counted = encoder_cost(encoder.config(), encoder.preprocessing.height, encoder.preprocessing.width)
    written = EncoderCost(encoder.parameters, encoder.flops)
    assert written == counted, f"{name}: write parameters={counted.parameters:_}, flops={counted.flops:_}"


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_the_table_holds_what_is_counted(name):
    check_entry(name)


def needs_timm(name):
    """The name as a parameter of a test that is skipped where a model of timm's cannot be built."""
    return pytest.param(name, marks=[pytest.mark.timm] if ENCODERS[name].config().model_type == "tapped_timm" else [])


@pytest.mark.slow
@pytest.mark.parametrize("name", [needs_timm(name) for name in ENCODERS if name not in ONE_OF_EACH_FAMILY])
def test_the_whole_table_holds_what_is_counted(name):
    check_entry(name)


def test_a_vit_by_hand():
    width, mlp, patches = 8, 32, 4
    config = HiddenStateBackboneConfig(
        vision_config=ViTConfig(
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=mlp,
            image_size=16,
            patch_size=8,
        )
    )
    tokens = patches + 1
    norm, block_weights = 2 * width, 4 * (width * width + width) + 2 * width * mlp + mlp + width
    embedding = width * 3 * 64 + width + width + tokens * width  # patches, CLS, positions
    products = 4 * tokens * width * width + 2 * tokens * tokens * width + 2 * tokens * width * mlp
    assert encoder_cost(config, 16, 16) == (
        embedding + block_weights + 2 * norm,
        2 * (patches * width * 3 * 64 + products),
    )


def test_blocks_and_stages_after_the_tap_cost_nothing():
    def vit(depth, tap):
        stock = ViTConfig(
            hidden_size=8,
            num_hidden_layers=depth,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=32,
            patch_size=8,
        )
        return encoder_cost(HiddenStateBackboneConfig(vision_config=stock, tap_layer=tap), 32, 32)

    def vmamba(stages, tap):
        config = SSMVisionConfig(
            hidden_sizes=[8, 16, 32, 64][:stages], depths=[1, 1, 1, 1][:stages], out_features=[tap]
        )
        return encoder_cost(config, 32, 32)

    assert vit(5, 1) == vit(2, -1) < vit(5, -2)
    assert vmamba(4, "stage2") == vmamba(2, "stage2") < vmamba(4, "stage3")


def test_a_norm_that_the_tap_does_not_use_is_not_counted():
    """Transformers' Swin allocates a norm for classification that no feature map passes through."""
    config = SwinConfig(embed_dim=8, depths=[1], num_heads=[1], window_size=2, out_features=["stage1"])
    from transformers import SwinBackbone

    backbone = SwinBackbone(config)
    unused = sum(p.numel() for p in backbone.swin.layernorm.parameters())
    total = sum(p.numel() for p in backbone.parameters())
    assert unused == 16 and encoder_cost(config, 16, 16).parameters == total - unused


@pytest.mark.parametrize(
    ("variant", "parameters", "multiply_adds"),
    [("tiny_s1l8", 29_478_528, 4.9056), ("small_s2l15", 49_377_216, 8.7158), ("small_v0", 43_646_880, 11.2315)],
)
def test_whole_vmambas_cost_what_their_authors_publish(variant, parameters, multiply_adds):
    """Their counter takes a multiply-add as one, a scan as 9 per state and 1 for the skip, and counts norms (0.6 %)."""
    fields = ENCODERS[f"vmamba_{variant}.in1k_224"].config().to_dict()
    config = SSMVisionConfig(**(fields | {"out_features": ["stage4"], "out_indices": None}))
    cost = encoder_cost(config, 224, 224)
    assert cost.parameters == parameters
    scanned = sum(
        depth * (56 >> stage) ** 2 * int(config.ssm_ratio * width)
        for stage, (depth, width) in enumerate(zip(config.depths, config.hidden_sizes, strict=True))
    )
    ours, theirs = (4 * scanned * (9 * config.d_state + skip) for skip in (2, 1))
    assert ((cost.flops - ours) / 2 + theirs) / 1e9 == pytest.approx(multiply_adds, rel=0.008)


def test_scan_formula_grows_with_everything():
    assert selective_scan_flops(positions=10, channels=4, states=1, rank=2) == 4 * 10 * 4 * (9 + 2 + 4)
    assert selective_scan_flops(10, 4, 16, 2) - selective_scan_flops(10, 4, 1, 2) == 4 * 10 * 4 * 9 * 15


def test_larger_pictures_cost_more_but_hold_no_more_parameters():
    config = ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, out_features=["stage2"])
    small, large = encoder_cost(config, 32, 32), encoder_cost(config, 64, 32)
    assert large.flops == 2 * small.flops and large.parameters == small.parameters


def test_the_count_depends_on_no_backend_and_leaves_the_config(monkeypatch):
    config = ENCODERS["digit_vmamba.digitscenes_64"].config()
    fields, cost = config.to_dict(), encoder_cost(config, 64, 64)
    monkeypatch.setenv("SSM_VLM_SCAN_BACKEND", "naive")
    assert encoder_cost(config, 64, 64) == cost and config.to_dict() == fields


def test_command(capsys):
    main(["digit_vit.digitscenes_64"])
    assert json.loads(capsys.readouterr().out) == {
        "name": "digit_vit.digitscenes_64",
        "size": [64, 64],
        "parameters": ENCODERS["digit_vit.digitscenes_64"].parameters,
        "flops": ENCODERS["digit_vit.digitscenes_64"].flops,
    }
