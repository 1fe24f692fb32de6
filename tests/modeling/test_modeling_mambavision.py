"""MambaVision as a model of Transformers: sizes, taps, initial weights, training, and bad input."""

import pytest
import torch
from torch import nn
from transformers import AutoBackbone, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from ssm_vlm import (
    MambaVisionBackbone,
    MambaVisionConfig,
    MambaVisionForImageClassification,
    MambaVisionModel,
    encoder_downsampling,
    grid_size,
)
from ssm_vlm.modeling.drop_path import DropPath

STAGES = MambaVisionConfig().stage_names
SIZES = [(64, 64), (64, 96), (33, 47), (31, 130), (5, 3), (1, 1)]


def toy_config(**fields):
    sizes = {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 3, 2], "stem_width": 4, "num_labels": 5}
    return MambaVisionConfig(**{**sizes, "num_attention_heads": [2, 4], "window_sizes": [3, 2], **fields})


def build(model_class=MambaVisionBackbone, **fields):
    torch.manual_seed(0)
    return model_class(toy_config(**fields)).eval()


def pixels(height=33, width=47, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tap", STAGES)
@pytest.mark.parametrize("size", SIZES)
def test_map_has_the_counted_grid_at_every_tap(tap, size):
    backbone = build(out_features=[tap])
    with torch.no_grad():
        (features,) = backbone(pixels(*size)).feature_maps
    assert features.shape == (2, backbone.channels[-1], *grid_size(*size, encoder_downsampling(backbone.config)))
    assert backbone.config.hidden_size == backbone.channels[-1] and features.isfinite().all()


@pytest.mark.parametrize("tap", STAGES)
def test_nothing_after_the_tap_exists_and_nothing_before_it_changes(tap):
    """The tapped model's parameters are the first of the whole model's, and so are its maps."""
    whole, tapped = build(out_features=STAGES), build(out_features=[tap])
    position = STAGES.index(tap)
    assert len(tapped.stages) == (position + 1) // 2 and len(tapped.downsamples) == position // 2
    assert isinstance(tapped.norm, nn.BatchNorm2d) == (tap == "stage4")
    tapped.load_state_dict({key: whole.state_dict()[key] for key in tapped.state_dict()})
    with torch.no_grad():
        expected = whole(pixels()).feature_maps[position]
        output = tapped(pixels(), output_hidden_states=True)
    assert torch.equal(output.feature_maps[0], expected)
    assert len(output.hidden_states) == position + 1 == tapped.config.num_hidden_layers + 1


def test_stage2_downsampled_has_seen_no_mixer_and_no_attention():
    """Each of its positions sees the neighbourhood that its convolutions reach; one of stage 3 sees its window."""
    before, after = build(out_features=["stage2_downsampled"]), build(out_features=["stage3"], window_sizes=[9, 9])
    picture = pixels(128, 128)
    changed = picture.clone()
    changed[..., :8, :8] += 3.0
    for backbone, everywhere in ((before, False), (after, True)):
        with torch.no_grad():
            difference = (backbone(changed).feature_maps[0] - backbone(picture).feature_maps[0]).abs().sum(1)
        assert bool(difference[:, -1, -1].all()) is everywhere


@pytest.mark.parametrize("model_class", [MambaVisionModel, MambaVisionBackbone, MambaVisionForImageClassification])
@pytest.mark.parametrize("layer_scale", [None, 0.25])
def test_every_weight_is_initialised_from_meta(model_class, layer_scale):
    """As from_pretrained builds models: without memory first, then everything that no file holds is filled."""
    config = toy_config(layer_scale=layer_scale, conv_layer_scale=layer_scale)
    with torch.device("meta"):
        model = model_class(config)
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(7 if tensor.dtype == torch.long else torch.nan)
    model.init_weights()
    for key, tensor in model.state_dict().items():
        assert tensor.float().isfinite().all() and (tensor != 7).all(), key
    assert all(tensor.isfinite().all() for tensor in model.buffers())
    mixer = model.get_submodule(f"{'model.' if hasattr(model, 'model') else ''}stages.2.blocks.0.mixer")
    step = nn.functional.softplus(mixer.dt_bias)
    assert (step >= config.dt_min * 0.99).all() and (step <= config.dt_max * 1.01).all()
    assert torch.allclose(mixer.a_log.exp(), torch.arange(1.0, 9.0).expand(16, 8)) and (mixer.d == 1).all()
    scales = [tensor for key, tensor in model.named_parameters() if key.endswith(".scale")]
    assert len(scales) == (12 if layer_scale else 0) and all((scale == layer_scale).all() for scale in scales)


def test_saved_and_reloaded_bit_equal(tmp_path):
    model = build(MambaVisionForImageClassification, layer_scale=0.3)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.num_batches_tracked.fill_(3)
    model.save_pretrained(tmp_path)
    reloaded = MambaVisionForImageClassification.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, reloaded.state_dict()[key]) for key, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(pixels()).logits, reloaded(pixels()).logits)


@torch.no_grad()
def test_sequence_model_holds_the_map_row_by_row():
    backbone, model = build(), build(MambaVisionModel)
    model.load_state_dict(backbone.state_dict())
    output = model(pixels(), output_hidden_states=True)
    features = backbone(pixels()).feature_maps[0]
    assert torch.equal(output.last_hidden_state, features.flatten(2).transpose(1, 2))
    assert torch.equal(output.last_hidden_state, output.hidden_states[-1])
    assert torch.allclose(output.pooler_output, features.mean((2, 3)), atol=1e-6)
    assert len(output.hidden_states) == len(STAGES) and model(pixels()).hidden_states is None


@torch.no_grad()
def test_final_norm_is_the_classifiers_and_can_be_left_out():
    normed, raw = build(), build(final_norm=False)
    nn.init.normal_(normed.norm.running_mean)
    raw.load_state_dict({key: value for key, value in normed.state_dict().items() if not key.startswith("norm.")})
    expected = normed.norm(raw(pixels()).feature_maps[0])
    assert torch.equal(normed(pixels()).feature_maps[0], expected)
    classifier = build(MambaVisionForImageClassification)
    classifier.model.load_state_dict(normed.state_dict())
    logits = classifier.classifier(expected.mean((2, 3)))
    assert torch.allclose(classifier(pixels()).logits, logits, atol=1e-6)


def test_loss_is_cross_entropy():
    model, labels = build(MambaVisionForImageClassification), torch.tensor([4, 1])
    output = model(pixels(), labels=labels)
    assert torch.allclose(output.loss, nn.functional.cross_entropy(output.logits, labels))


def gradients(model):
    model.zero_grad()
    model(pixels(64, 64)).feature_maps[0].square().sum().backward()
    return {key: parameter.grad.clone() for key, parameter in model.named_parameters()}


def test_checkpointing_changes_no_gradient():
    """Without BatchNorm's statistics, which a second forward pass would update twice."""
    model = build(out_features=["stage3"]).train()
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.eval()
    expected = gradients(model)
    model.activation_checkpointing_enable()
    found = gradients(model)
    assert all(torch.allclose(found[key], expected[key], rtol=1e-4, atol=1e-6) for key in expected)


def test_every_parameter_learns_at_an_odd_size():
    model = build(layer_scale=0.5, conv_layer_scale=0.5).train()
    (model(pixels(61, 75)).feature_maps[0] * torch.randn(1)).square().sum().backward()
    silent = [key for key, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0]
    # A convolution before a BatchNorm of batch statistics has a bias without effect.
    assert all(".conv" in key and key.endswith(".bias") for key in silent)


def test_gradients_by_finite_differences_in_float64():
    torch.manual_seed(0)
    model = build(out_features=["stage3"], hidden_sizes=[4, 4, 4, 4], stem_width=2, num_attention_heads=[1, 1]).double()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "weight" in key and "norm" not in key:
                parameter.normal_(std=0.5)
    inputs = torch.randn(1, 3, 20, 36, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(inputs)
    (slope,) = torch.autograd.grad(model(inputs).feature_maps[0].sin().sum(), inputs)
    with torch.no_grad():
        ends = [model(inputs + sign * 1e-6 * direction).feature_maps[0].sin().sum() for sign in (1, -1)]
    assert torch.isclose((slope * direction).sum(), (ends[0] - ends[1]) / 2e-6, rtol=1e-5)


def test_batch_norm_learns_statistics_in_training_and_none_when_frozen():
    model = build(drop_path_rate=0.5)
    with torch.no_grad():
        expected = model(pixels()).feature_maps[0]
        before = {key: value.clone() for key, value in model.state_dict().items()}
        assert torch.equal(model(pixels()).feature_maps[0], expected)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        model.train()(pixels(64, 64))
    assert not torch.equal(model.stem.norm1.running_mean, before["stem.norm1.running_mean"])
    assert model.norm.num_batches_tracked == 1


def test_stochastic_depth_grows_over_all_blocks():
    model = build(drop_path_rate=0.6)
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.1 * index for index in range(7)], abs=1e-6)
    tapped = build(drop_path_rate=0.6, out_features=["stage2"])
    assert [m.rate for m in tapped.modules() if isinstance(m, DropPath)] == rates[:2]


@pytest.mark.parametrize("shape", [(400, 6), (400, 6, 1, 1)])
def test_dropped_branches_keep_their_mean(shape):
    torch.manual_seed(0)
    drop = DropPath(0.25).train()
    kept = drop(torch.ones(shape))
    assert kept.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert kept.flatten(1).std(dim=1).max() == 0 and kept.mean() == pytest.approx(1.0, abs=0.1)
    assert torch.equal(drop.eval()(kept), kept)


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (33, 47)])
def test_attention_implementations_agree(size):
    model = build(out_features=["stage3"])
    found = []
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert model.stages[2].blocks[-1].mixer.config._attn_implementation == name
        found.append(model(pixels(*size)).feature_maps[0])
    assert torch.allclose(*found, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("tap", ["stage2_downsampled", "stage3", "stage4"])
@pytest.mark.parametrize("size", [(64, 64), (33, 47)])
def test_bfloat16_is_within_two_percent(tap, size):
    model = build(out_features=[tap])
    exact = model(pixels(*size)).feature_maps[0]
    half = model.bfloat16()(pixels(*size).bfloat16()).feature_maps[0]
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().max() <= 2e-2 * exact.abs().max()


@torch.no_grad()
def test_tower_of_the_stock_llava():
    vision = toy_config(out_features=["stage3"], image_size=64)
    text = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=31,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[1] + [31] * 16 + [2]])
    assert model(input_ids=ids, pixel_values=pixels(64, 64, 1)).logits.shape == (1, 18, 32)


BAD = {
    "two stages": ({"depths": [1, 1]}, "depths must be 4 positive integers, of four stages, got \\[1, 1\\]"),
    "an empty stage": ({"depths": [1, 0, 3, 2]}, "depths must be 4 positive integers"),
    "heads of all stages": ({"num_attention_heads": [1, 1, 2, 4]}, "must be 2 positive integers, of stages 3 and 4"),
    "no window": ({"window_sizes": [0, 2]}, "window_sizes must be 2 positive integers"),
    "odd width": ({"hidden_sizes": [8, 16, 33, 64]}, "even multiples of their number of heads, got width 33"),
    "heads that do not divide": ({"num_attention_heads": [3, 4]}, "got width 32 for 3 heads"),
    "no state": ({"d_state": 0}, "d_state must be at least 1, got 0"),
    "no rank": ({"dt_rank": 0}, "dt_rank must be at least 1, got 0"),
    "no MLP": ({"mlp_ratio": 0.01}, "mlp_ratio=0.01 leaves an MLP no hidden channel"),
    "no activation": ({"hidden_act": "gelo"}, "no activation 'gelo' for hidden_act"),
    "no such tap": ({"out_features": ["stage5"]}, "stage5"),
    "NVIDIA's own fields": ({"in_dim": 32}, "NVIDIA's own MambaVision code"),
}


@pytest.mark.parametrize("fields, message", BAD.values(), ids=BAD)
def test_bad_config_is_told(fields, message):
    with pytest.raises(ValueError, match=message):
        toy_config(**fields)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (0, 3, 32, 32)])
def test_bad_pictures_are_told(shape):
    with pytest.raises(ValueError, match=r"MambaVisionBackbone: pixel_values must be \[batch, 3, height, width\], got"):
        build()(torch.zeros(shape))


def test_config_survives_saving(tmp_path):
    config = toy_config(out_features=["stage2_downsampled"], layer_scale=0.1, dt_rank=3)
    config.save_pretrained(tmp_path)
    assert MambaVisionConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert isinstance(AutoBackbone.from_config(config), MambaVisionBackbone)
