"""The encoder's Transformers models: taps, sizes, saving, initialisation under meta loading, training behaviour."""

import math

import pytest
import torch
from torch import nn
from transformers import AutoBackbone, AutoModel, AutoModelForImageClassification

from ssm_vlm import (
    SSMVisionBackbone,
    SSMVisionConfig,
    SSMVisionForImageClassification,
    SSMVisionModel,
    encoder_downsampling,
    grid_size,
)
from ssm_vlm.modeling.mixers import MIXERS, SelectiveScan2dMixer

V2 = {}
V0 = {"stem": "conv4", "downsample": "patch_merge", "mlp_ratio": 0.0, "d_state": 4, "gated": True, "conv_bias": True}
VARIANTS = {"v2": V2, "v0": V0} | {name: {"mixer": name} for name in MIXERS if name != "ss2d"}
variants = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
STAGES = ["stem", "stage1", "stage2", "stage3", "stage4"]


def tiny_config(**fields):
    return SSMVisionConfig(
        **{"hidden_sizes": [8, 16, 16, 24], "depths": [1, 2, 1, 1], "head_dim": 8, "window_size": 3} | fields
    )


def picture(height=37, width=50, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@variants
@pytest.mark.parametrize("size", [(32, 32), (64, 96), (37, 50), (33, 65), (4, 4), (5, 127)])
def test_maps_of_every_stage_have_the_size_that_the_processor_counts(fields, size):
    backbone = SSMVisionBackbone(tiny_config(out_features=STAGES, **fields)).eval()
    with torch.no_grad():
        maps = backbone(picture(*size)).feature_maps
    assert backbone.channels == [8, 8, 16, 16, 24]
    for stage, feature_map in zip(STAGES, maps, strict=True):
        downsampling = encoder_downsampling(tiny_config(out_features=[stage], **fields))
        channels = backbone.out_feature_channels[stage]
        assert feature_map.shape == (2, channels, *grid_size(*size, downsampling))
        assert feature_map.isfinite().all()


@variants
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 2)])
def test_pictures_smaller_than_a_patch(fields, size):
    with torch.no_grad():
        feature_map = SSMVisionBackbone(tiny_config(**fields)).eval()(picture(*size)).feature_maps[-1]
    assert feature_map.shape == (2, 24, 1, 1) and feature_map.isfinite().all()


def test_patch_merge_pads_odd_maps_with_zeros_at_the_end():
    """VMamba v0 cannot take this size; ours equals the reference's merge of the padded map."""
    model = SSMVisionBackbone(tiny_config(**V0)).eval()
    merge = model.stages[1].downsample
    x = torch.randn(1, 3, 5, 8)
    padded = torch.zeros(1, 4, 6, 8)
    padded[:, :3, :5] = x
    quarters = [padded[:, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
    with torch.no_grad():
        torch.testing.assert_close(merge(x), merge.reduction(merge.norm(torch.cat(quarters, dim=-1))))


@pytest.mark.parametrize("tap", STAGES)
def test_tap_equals_the_full_encoder_cut_there(tap):
    full = SSMVisionBackbone(tiny_config(out_features=STAGES)).eval()
    cut = SSMVisionBackbone(tiny_config(out_features=[tap])).eval()
    missing, unexpected = cut.load_state_dict(full.state_dict(), strict=False)
    stages = STAGES.index(tap)
    assert missing == []
    assert {int(key.split(".")[1]) for key in unexpected} == set(range(stages, 4))
    assert len(cut.stages) == stages
    with torch.no_grad():
        (ours,) = cut(picture()).feature_maps
        torch.testing.assert_close(ours, full(picture()).feature_maps[stages], rtol=0, atol=0)


def test_model_is_the_backbone_row_by_row():
    config = tiny_config(out_features=["stage3"], output_norm="layernorm")
    backbone, model = SSMVisionBackbone(config).eval(), SSMVisionModel(config).eval()
    nn.init.normal_(backbone.output_norms["stage3"].weight)
    model.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        feature_map = backbone(picture()).feature_maps[-1]
        output = model(picture(), output_hidden_states=True)
    assert torch.equal(output.last_hidden_state, feature_map.flatten(2).transpose(1, 2))
    assert output.last_hidden_state.shape[-1] == config.hidden_size
    assert len(output.hidden_states) == config.num_hidden_layers + 1
    assert output.hidden_states[-1] is output.last_hidden_state
    assert [tuple(state.shape[1:]) for state in output.hidden_states] == [(130, 8), (130, 8), (35, 16), (12, 16)]


@pytest.mark.parametrize("asked", [None, False, True, -1, [-1], 0])
def test_hidden_states_on_request(asked):
    config = tiny_config()
    model = SSMVisionModel(config)
    returned = model(picture(), output_hidden_states=asked).hidden_states
    assert (returned is None) == (asked is None or asked is False)
    config.output_hidden_states = True
    assert model(picture()).hidden_states is not None


def test_backbone_hidden_states_on_request():
    backbone = SSMVisionBackbone(tiny_config())
    assert backbone(picture()).hidden_states is None
    hidden_states = backbone(picture(), output_hidden_states=True).hidden_states
    assert [state.shape[1] for state in hidden_states] == [8, 8, 16, 16, 24]


@pytest.mark.parametrize("output_norm", ["none", "layernorm", "parameter_free"])
def test_output_norm(output_norm):
    backbone = SSMVisionBackbone(tiny_config(out_features=["stage2", "stage4"], output_norm=output_norm)).eval()
    names = [name for name, _ in backbone.named_parameters() if "output_norms" in name]
    assert names == (
        [f"output_norms.{stage}.{kind}" for stage in ("stage2", "stage4") for kind in ("weight", "bias")]
        if output_norm == "layernorm"
        else []
    )
    with torch.no_grad():
        output = backbone(picture(), output_hidden_states=True)
    for feature_map, raw in zip(output.feature_maps, output.hidden_states[2::2], strict=True):
        expected = raw
        if output_norm != "none":
            expected = (raw - raw.mean(1, keepdim=True)) / (raw.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
        torch.testing.assert_close(feature_map, expected, atol=1e-5, rtol=1e-4)


def test_norm_at_one_tap_does_not_reach_the_next_stage():
    plain = SSMVisionBackbone(tiny_config(out_features=["stage2", "stage4"])).eval()
    normed = SSMVisionBackbone(tiny_config(out_features=["stage2", "stage4"], output_norm="parameter_free")).eval()
    normed.load_state_dict(plain.state_dict())
    with torch.no_grad():
        raw = plain(picture()).feature_maps[1]
        assert torch.equal(normed(picture(), output_hidden_states=True).hidden_states[-1], raw)


@variants
def test_classifier_trains(fields):
    model = SSMVisionForImageClassification(tiny_config(num_labels=3, **fields))
    output = model(picture(), labels=torch.tensor([0, 2]))
    assert output.logits.shape == (2, 3)
    output.loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_classifier_by_plain_arithmetic_at_a_tap():
    model = SSMVisionForImageClassification(tiny_config(num_labels=3, out_features=["stage2"])).eval()
    nn.init.normal_(model.norm.weight)
    with torch.no_grad():
        tokens = model.model(picture()).last_hidden_state
        torch.testing.assert_close(model(picture()).logits, model.classifier(model.norm(tokens).mean(1)))


AUTO_CLASSES = [
    (SSMVisionModel, AutoModel),
    (SSMVisionForImageClassification, AutoModelForImageClassification),
    (SSMVisionBackbone, AutoBackbone),
]


@pytest.mark.parametrize("model_class, auto_class", AUTO_CLASSES)
@variants
def test_save_and_reload_is_bit_equal(fields, model_class, auto_class, tmp_path):
    model = model_class(tiny_config(output_norm="layernorm", **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path)
    assert type(auto_class.from_config(model.config)) is model_class
    # AutoBackbone.from_pretrained asks the Hub about every path, so a folder is opened with the class itself.
    opener = model_class if auto_class is AutoBackbone else auto_class
    loaded, info = opener.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    saved = model.state_dict()
    assert loaded.state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.state_dict().items())
    with torch.no_grad():
        assert torch.equal(loaded(picture())[0][0], model(picture())[0][0])


def test_backbone_opens_a_classifier_folder(tmp_path):
    classifier = SSMVisionForImageClassification(tiny_config())
    classifier.save_pretrained(tmp_path)
    backbone, info = SSMVisionBackbone.from_pretrained(tmp_path, out_features=["stage3"], output_loading_info=True)
    assert not info["missing_keys"]
    assert {key.removeprefix("model.").split(".")[0] for key in info["unexpected_keys"]} == {
        "norm",
        "classifier",
        "stages",
    }
    own = classifier.model.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in backbone.state_dict().items())


def parameter_statistics(model):
    return {
        name: (parameter.numel(), parameter.mean().item(), parameter.std(correction=0).item())
        for name, parameter in model.named_parameters()
    }


@variants
def test_every_parameter_is_initialised_under_meta_loading(fields):
    """An empty checkpoint: from_pretrained builds on meta and must fill every parameter as the constructor does."""
    config = tiny_config(
        hidden_sizes=[32, 32], depths=[1, 1], output_norm="layernorm", num_labels=40, initializer_range=0.05, **fields
    )
    model = SSMVisionForImageClassification.from_pretrained(None, config=config, state_dict={})
    built = parameter_statistics(SSMVisionForImageClassification(config))
    loaded = parameter_statistics(model)
    assert loaded.keys() == built.keys()
    for name, (size, mean, std) in loaded.items():
        assert math.isfinite(mean) and math.isfinite(std), name
        assert std == pytest.approx(built[name][2], rel=4 / math.sqrt(size), abs=1e-6), name
        assert mean == pytest.approx(built[name][1], abs=5 * std * math.sqrt(2 / size) + 1e-6), name


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_initial_distribution(device):
    """VMamba's: truncated normal linear weights, log-uniform step sizes, rates 1..N, skip 1, torch's convolutions."""
    config = tiny_config(hidden_sizes=[64, 64], depths=[2, 2], d_state=3, conv_bias=True, dt_min=0.01, dt_max=0.5)
    if device == "meta":
        model = SSMVisionModel.from_pretrained(None, config=config, state_dict={})
    else:
        model = SSMVisionModel(config)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), name
            assert module.bias is None or not module.bias.any(), name
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any(), name
        elif isinstance(module, nn.Conv2d):
            bound = module.weight[0].numel() ** -0.5
            assert bound > module.weight.abs().max() > 0.9 * bound, name
            assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15), name
            assert module.bias is None or bound > module.bias.abs().max() > 0.5 * bound, name
        elif isinstance(module, SelectiveScan2dMixer):
            assert torch.equal(module.a_log, torch.tensor([1.0, 2.0, 3.0]).log().expand(4, 128, 3))
            assert (module.d == 1).all()
            steps = torch.nn.functional.softplus(module.dt_bias.detach())
            assert 0.01 * 0.999 < steps.min() < 0.015 and 0.4 < steps.max() < 0.5 * 1.001
            assert steps.log().mean().item() == pytest.approx((math.log(0.01) + math.log(0.5)) / 2, abs=0.25)
            assert module.dt_weight.abs().max().item() == pytest.approx(4**-0.5, rel=0.1)
            assert module.x_proj_weight.abs().max().item() == pytest.approx(128**-0.5, rel=0.1)


def test_a_partial_checkpoint_keeps_what_it_holds():
    model = SSMVisionModel(tiny_config())
    state = {name: torch.full_like(p, 7.0) for name, p in model.state_dict().items() if name.endswith("dt_bias")}
    loaded = SSMVisionModel.from_pretrained(None, config=tiny_config(), state_dict=state)
    assert all((parameter == 7).all() for name, parameter in loaded.named_parameters() if name.endswith("dt_bias"))
    assert not any(
        (parameter == 7).any() for name, parameter in loaded.named_parameters() if not name.endswith("dt_bias")
    )


@variants
def test_gradient_checkpointing_changes_nothing(fields):
    model = SSMVisionForImageClassification(tiny_config(**fields)).train()

    def gradients():
        model.zero_grad()
        model(picture(), labels=torch.tensor([0, 1])).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    plain = gradients()
    model.activation_checkpointing_enable()
    counted = []
    handle = model.model.stages[1].blocks[0].norm1.register_forward_hook(lambda *_: counted.append(1))
    checkpointed = gradients()
    handle.remove()
    assert len(counted) == 2  # once forward, once more in the backward pass
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def test_drop_path_grows_linearly_drops_samples_and_rests_in_eval():
    model = SSMVisionModel(tiny_config(drop_path_rate=0.4, depths=[1, 2, 1, 1]))
    rates = [block.drop_path.rate for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    drop_path = model.stages[3].blocks[0].drop_path.train()
    x = torch.ones(4000, 1, 1, 2)
    dropped = drop_path(x)
    kept = dropped[:, 0, 0, 0] != 0
    assert torch.equal(dropped[kept], (x / 0.6)[kept])
    assert kept.float().mean().item() == pytest.approx(0.6, abs=0.05)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(picture())[0], model(picture())[0])


def test_rates_of_a_tapped_encoder_are_those_of_the_full_one():
    full = SSMVisionModel(tiny_config(drop_path_rate=0.4))
    cut = SSMVisionModel(tiny_config(drop_path_rate=0.4, out_features=["stage2"]))
    for ours, theirs in zip(cut.stages, full.stages, strict=False):
        assert [block.drop_path.rate for block in ours.blocks] == [block.drop_path.rate for block in theirs.blocks]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@variants
def test_half_precision_stays_close(fields, dtype):
    model = SSMVisionModel(tiny_config(**fields)).eval()
    with torch.no_grad():
        reference = model(picture()).last_hidden_state
        half = model.to(dtype)(picture().to(dtype)).last_hidden_state
    assert half.dtype == dtype
    assert (half.float() - reference).abs().max() < 0.05 * reference.abs().max()


def test_mixers_may_differ_between_stages():
    model = SSMVisionModel(tiny_config(mixer=["dwconv", "ss2d", "window_attention", "global_attention"]))
    kinds = [type(stage.blocks[0].mixer) for stage in model.stages]
    assert kinds == [MIXERS[name] for name in ("dwconv", "ss2d", "window_attention", "global_attention")]
    assert model(picture()).last_hidden_state.isfinite().all()


@pytest.mark.parametrize(
    "fields, millions",
    [
        ({}, 49_377_216),
        ({"ssm_ratio": 1.0, "depths": [2, 2, 20, 2]}, 48_242_304),
        ({"depths": [2, 2, 5, 2]}, 29_935_296),
        ({"ssm_ratio": 1.0, "depths": [2, 2, 8, 2]}, 29_478_528),
        ({"hidden_sizes": [128, 256, 512, 1024]}, 87_530_752),
        ({**V0, "d_state": 16, "depths": [2, 2, 27, 2]}, 43_646_880),
    ],
)
def test_parameters_of_the_published_variants(fields, millions):
    """The reference without its linear classifier but with its last norm, which is our classifier's."""
    with torch.device("meta"):
        config = SSMVisionConfig(num_labels=1000, **fields)
        model = SSMVisionForImageClassification(config)
    head = sum(parameter.numel() for parameter in model.classifier.parameters())
    norm = sum(parameter.numel() for parameter in model.norm.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total - head - norm == millions


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 4, 32, 32), (2, 3, 0, 32), (0, 3, 32, 32)])
def test_wrong_pixel_values_are_named(shape):
    with pytest.raises(ValueError, match=r"pixel_values must be \[batch, 3, height, width\], got"):
        SSMVisionBackbone(tiny_config())(torch.zeros(shape))
