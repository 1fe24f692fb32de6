"""The encoder's configuration: derived sizes, round trip, and one clear sentence for every mistake."""

import pytest
from transformers import AutoConfig

from ssm_vlm import SSMVisionConfig


def test_defaults_are_vmamba_small():
    config = SSMVisionConfig()
    assert (config.hidden_sizes, config.depths) == ([96, 192, 384, 768], [2, 2, 15, 2])
    assert (config.d_state, config.ssm_ratio, config.gated, config.mlp_ratio) == (1, 2.0, False, 4.0)
    assert config.stage_names == ["stem", "stage1", "stage2", "stage3", "stage4"]
    assert config.out_features == ["stage4"]


@pytest.mark.parametrize(
    "tap, hidden_size, patch_size, layers",
    [("stem", 96, 4, 0), ("stage1", 96, 4, 1), ("stage2", 192, 8, 2), ("stage3", 384, 16, 3), ("stage4", 768, 32, 4)],
)
def test_sizes_at_the_tap(tap, hidden_size, patch_size, layers):
    config = SSMVisionConfig(out_features=[tap])
    assert (config.hidden_size, config.patch_size, config.num_hidden_layers) == (hidden_size, patch_size, layers)


def test_tap_is_the_last_output():
    assert SSMVisionConfig(out_features=["stage1", "stage3"]).hidden_size == 384
    assert SSMVisionConfig(out_indices=[1, 2]).hidden_size == 192
    assert SSMVisionConfig(out_indices=[-2]).hidden_size == 384


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_one_to_four_stages(stages):
    config = SSMVisionConfig(hidden_sizes=[8] * stages, depths=[1] * stages)
    assert config.out_features == [f"stage{stages}"]


def test_round_trip(tmp_path):
    config = SSMVisionConfig(
        hidden_sizes=(8, 16),
        depths=(1, 2),
        mixer=["ss2d", "window_attention"],
        head_dim=8,
        out_features=["stem", "stage1"],
        output_norm="layernorm",
        d_state=16,
        gated=True,
        dt_rank=3,
        stem="conv4",
        downsample="patch_merge",
        num_labels=7,
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is SSMVisionConfig
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert (loaded.out_features, loaded.mixers, loaded.num_labels) == (
        ["stem", "stage1"],
        ["ss2d", "window_attention"],
        7,
    )


def test_every_field_is_documented():
    documented = SSMVisionConfig.__doc__
    fields = [name for name in SSMVisionConfig.__annotations__ if not name.startswith("_")]
    assert len(fields) > 20
    assert [name for name in fields if f"{name}:" not in documented and f"{name}," not in documented] == []


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"mixer": "mamba"}, r"mixer must be one of ss2d, dwconv, .* got 'mamba'"),
        ({"mixer": ["ss2d", "ss2d"]}, r"a list of 4 of them \(one per stage\), got \['ss2d', 'ss2d'\]"),
        ({"depths": [1, 1]}, r"hidden_sizes and depths must be lists of 1 to 4 positive integers of equal length"),
        ({"depths": [1] * 5, "hidden_sizes": [8] * 5}, r"lists of 1 to 4 positive integers"),
        ({"depths": [], "hidden_sizes": []}, r"lists of 1 to 4 positive integers"),
        ({"depths": [1, 1, 0, 1]}, r"positive integers"),
        ({"hidden_sizes": [9, 16, 32, 64]}, r"conv3x2 stem needs an even hidden_sizes\[0\], got 9"),
        ({"dwconv_kernel": 4}, r"dwconv_kernel must be odd, got 4"),
        ({"mixer": "global_attention", "head_dim": 64}, r"divides the stage width, got head_dim=64 for width 96"),
        ({"mixer": "window_attention", "head_dim": 6}, r"multiple of 4 and divides the stage width, got head_dim=6"),
        ({"mixer": "window_attention", "window_size": 0}, r"window_size must be at least 1, got 0"),
        ({"mlp_ratio": -1.0}, r"mlp_ratio must be at least 0, got -1.0"),
        ({"hidden_act": "gleu"}, r"no activation 'gleu' for hidden_act"),
        ({"ssm_ratio": 0.0}, r"ssm_ratio=0.0 leaves a mixer no inner channel"),
        ({"out_features": ["stage5"]}, r"out_features must be a subset of stage_names"),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        SSMVisionConfig(**fields)


@pytest.mark.parametrize(
    "field, value", [("stem", "conv8"), ("downsample", "pool"), ("output_norm", "rms"), ("d_state", 1.5)]
)
def test_wrong_type_or_choice_names_the_field(field, value):
    with pytest.raises(Exception, match=f"field '{field}'"):
        SSMVisionConfig(**{field: value})
