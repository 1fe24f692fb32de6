"""The encoder contract, held by every entry of the table at toy size: one test run per distinct architecture."""

import copy
import json
from functools import cache

import pytest
import torch
from transformers import (
    AutoBackbone,
    DetrConfig,
    DetrForObjectDetection,
    LlamaConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from ssm_vlm.configuration.configuration_llava_style import LlavaStyleConfig
from ssm_vlm.configuration.named_encoders import ENCODERS
from ssm_vlm.configuration.taps import tap_norm
from ssm_vlm.modeling.encoder_loading import load_encoder
from ssm_vlm.modeling.modeling_llava_style import LlavaStyleModel
from ssm_vlm.modeling.token_grid import encoder_downsampling, grid_size, num_image_tokens

WIDTHS = [8, 16, 32, 64]


def shrink_ssm_vision(config):
    config.hidden_sizes = WIDTHS[: len(config.depths)]
    config.depths = [min(depth, 2) for depth in config.depths]
    config.head_dim, config.image_size = 4, 64


def shrink_mambavision(config):
    config.stem_width, config.hidden_sizes, config.depths = 4, WIDTHS, [1, 1, 3, 2]
    config.num_attention_heads, config.window_sizes = [2, 4], [3, 2]
    config.layer_scale = config.layer_scale and 0.5
    config.image_size = 64


def shrink_plain(config):
    stock = config.vision_config
    stock.hidden_size, stock.num_attention_heads, stock.num_hidden_layers = 16, 2, 3
    stock.intermediate_size = 32
    if stock.model_type == "siglip2_vision_model":
        stock.num_patches = 16
    else:
        stock.image_size = 4 * stock.patch_size


def shrink_swin(config):
    config.embed_dim, config.depths, config.num_heads, config.window_size = 8, [1, 1, 2], [1, 2, 4], 2


def shrink_convnext(config):
    config.hidden_sizes, config.depths, config.layer_scale_init_value = WIDTHS[:3], [1, 1, 2], 0.5


def shrink_vitdet(config):
    config.hidden_size, config.num_attention_heads, config.num_hidden_layers = 16, 2, 3
    config.window_block_indices, config.window_size = [0, 1], 2
    config.image_size, config.pretrain_image_size = 4 * config.patch_size, 3 * config.patch_size


def shrink_vit_adapter(config):
    config.hidden_size, config.num_attention_heads, config.num_hidden_layers = 16, 2, 4
    config.conv_inner_size, config.deform_num_heads, config.pretrain_image_size = 4, 2, 48
    config.injector_init_value = 0.5


def shrink_tapped_timm(config):
    """MaxViT with windows of one cell, also for models of one size only (tests/timm_models has them as they are)."""
    config.backbone, config.grid_multiple, config.only_size = "maxvit_tiny_tf_224", 1, None
    config.stage_names = ["stem", "stage1", "stage2", "stage3", "stage4"]
    config.stage_downsampling, config.out_features = [[2, "ceil"]] * 5, config.out_features
    config.model_args = {"img_size": 32, "embed_dim": WIDTHS, "stem_width": 8, "transformer_dim_head": 4}
    config.model_args |= {"depths": [1, 1, 2, 1], "drop_path_rate": 0.1}
    config.stage_channels = [8, *WIDTHS]


def shrink_pvt_v2(config):
    config.hidden_sizes, config.depths, config.num_attention_heads = [8, 16, 32], [1, 1, 2], [1, 2, 4]
    config.sr_ratios, config.mlp_ratios = [2, 2, 1], [2, 2, 2]


SHRINK = {
    "ssm_vision": shrink_ssm_vision,
    "mambavision": shrink_mambavision,
    "hidden_state_backbone": shrink_plain,
    "swin": shrink_swin,
    "convnext": shrink_convnext,
    "pvt_v2": shrink_pvt_v2,
    "vitdet": shrink_vitdet,
    "vit_adapter": shrink_vit_adapter,
    "tapped_timm": shrink_tapped_timm,
}
"""A new family of encoders adds one function that makes its config small."""


def without_derived(fields):
    """What follows from the rest of a config: its stages' names and, in a stock config, its own outputs."""
    derived = {"out_indices", "stage_names", "hidden_size", "pooler_output_size", "num_layers"}
    if "vision_config" in fields:  # the tap moves with the number of blocks
        fields["vision_config"] = without_derived(fields["vision_config"]) | {"hidden_size": 16}
        derived |= {"out_features"}
    elif fields["model_type"] == "tapped_timm":
        derived = {"out_indices"}
    elif fields["model_type"] not in ("ssm_vision", "mambavision", "swin", "convnext"):
        derived |= {"out_features"}
    if fields["model_type"] in ("vitdet", "vit_adapter"):
        derived -= {"hidden_size"}
    return {key: value for key, value in fields.items() if key not in derived}


def tiny_config(name):
    """The entry's config with fewer and narrower blocks, all else as it is."""
    config = ENCODERS[name].config()
    SHRINK[config.model_type](config)
    if hasattr(config, "drop_path_rate"):
        config.drop_path_rate = 0.1
    return type(config)(**without_derived(config.to_dict()))


def distinct():
    """One name per architecture that is still distinct at toy size."""
    names = {}
    for name in ENCODERS:
        names.setdefault(json.dumps(tiny_config(name).to_dict(), sort_keys=True, default=str), name)
    return list(names.values())


@cache
def steps(name):
    return encoder_downsampling(tiny_config(name))


def stride(name):
    product = 1
    for step, _ in steps(name):
        product *= step
    return product


def build(name, **changes):
    torch.manual_seed(0)
    config = tiny_config(name)
    for key, value in changes.items():
        setattr(config, key, value)
    return AutoBackbone.from_config(config).eval()


def needs_timm(name):
    """The name as a parameter of a test, which is skipped where a model of timm's cannot be built."""
    return pytest.param(name, marks=[pytest.mark.timm] if ENCODERS[name].config().model_type == "tapped_timm" else [])


@pytest.fixture(params=map(needs_timm, distinct()))
def name(request):
    return request.param


def test_every_entry_shrinks_to_one_that_is_tested():
    tested = {json.dumps(tiny_config(name).to_dict(), sort_keys=True, default=str) for name in distinct()}
    for name in ENCODERS:
        assert json.dumps(tiny_config(name).to_dict(), sort_keys=True, default=str) in tested


@pytest.mark.parametrize("shape", ["square", "oblong", "odd", "one cell"])
def test_feature_map_has_the_counted_grid(name, shape):
    unit = stride(name)
    height, width = {
        "square": (4 * unit, 4 * unit),
        "oblong": (2 * unit, 5 * unit),
        "odd": (3 * unit + 1, 2 * unit + unit // 2 + 1),
        "one cell": (unit, unit),
    }[shape]
    backbone = build(name)
    if shape == "odd" and getattr(backbone.config, "canvas_multiple", None):
        with pytest.raises(ValueError, match=f"multiples of {unit} pixels, got {height}x{width}"):
            backbone(torch.randn(2, 3, height, width))
        return
    with torch.no_grad():
        features = backbone(torch.randn(2, 3, height, width)).feature_maps[-1]
    rows, columns = grid_size(height, width, steps(name))
    assert features.shape == (2, backbone.channels[-1], rows, columns)
    assert num_image_tokens(height, width, steps(name)) == rows * columns
    assert features.isfinite().all()


def test_rows_run_down_and_columns_across(name):
    """A picture that changes at the bottom right changes that corner of the map the most."""
    unit = stride(name)
    backbone = build(name)
    before = torch.randn(1, 3, 4 * unit, 6 * unit)
    after = before.clone()
    after[..., -unit:, -unit:] += 3.0
    with torch.no_grad():
        difference = backbone(after).feature_maps[-1] - backbone(before).feature_maps[-1]
    cells = difference.abs().sum(1)[0]  # [4, 6]
    assert cells.shape == (4, 6)
    assert cells.flatten().argmax() == 23


def test_an_image_is_encoded_as_if_alone(name):
    pixels = torch.randn(3, 3, 3 * stride(name), 4 * stride(name))
    backbone = build(name)
    with torch.no_grad():
        together = backbone(pixels).feature_maps[-1]
        alone = torch.cat([backbone(pixels[i : i + 1]).feature_maps[-1] for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_saved_and_reloaded_bit_equal(name, tmp_path):
    backbone = build(name)
    backbone.save_pretrained(tmp_path)
    reloaded = copy.deepcopy(load_encoder(tmp_path))  # out of the mapped file: how memory is aligned changes last bits
    assert type(reloaded) is type(backbone) and not reloaded.training
    pixels = torch.randn(1, 3, 3 * stride(name), 2 * stride(name))
    with torch.no_grad():
        assert torch.equal(backbone(pixels).feature_maps[-1], reloaded(pixels).feature_maps[-1])


def test_frozen_inside_the_vlm(name):
    """Under `train()` a frozen encoder gives what it gives in `eval()`, and neither it nor its statistics move."""
    text = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    vision = tiny_config(name)
    for config in (vision, getattr(vision, "vision_config", vision)):
        if hasattr(config, "drop_path_rate"):
            config.drop_path_rate = 0.5
    torch.manual_seed(0)
    model = LlavaStyleModel(LlavaStyleConfig(vision_config=vision, text_config=text, image_token_id=31))
    pixels = torch.randn(2, 3, 2 * stride(name), 3 * stride(name))
    count = num_image_tokens(*pixels.shape[-2:], steps(name))
    expected = model.eval().get_tap_features(pixels)
    before = {key: value.clone() for key, value in model.vision_tower.state_dict().items()}
    model.train()
    ids = torch.tensor([[1] + [31] * count + [2, 3]] * 2)
    model(input_ids=ids, pixel_values=pixels).last_hidden_state.sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in model.vision_tower.parameters())
    assert any(p.grad is not None for p in model.connector.parameters())
    for one, other in zip(expected, model.get_tap_features(pixels), strict=True):
        assert one.shape == (count, model.vision_tower.channels[-1]) and torch.equal(one, other)
    for key, value in model.vision_tower.state_dict().items():
        assert torch.equal(value, before[key])


def gradients_reach(model, tower):
    """Every parameter of the tower that its feature maps depend on has a gradient."""
    return sum(p.grad is not None and p.grad.abs().sum() > 0 for p in tower.parameters()) / len(
        list(tower.parameters())
    )


def test_inside_upernet(name):
    config = UperNetConfig(
        backbone_config=tiny_config(name),
        hidden_size=8,
        pool_scales=[1, 2],
        use_auxiliary_head=False,
        num_labels=3,
    )
    torch.manual_seed(0)
    model = UperNetForSemanticSegmentation(config).train()
    height, width = 4 * stride(name), 5 * stride(name)
    labels = torch.randint(3, (2, height, width))
    output = model(pixel_values=torch.randn(2, 3, height, width), labels=labels)
    assert output.logits.shape == (2, 3, height, width)
    output.loss.backward()
    assert gradients_reach(model, model.backbone) > 0.8


def test_inside_a_detector(name):
    config = DetrConfig(
        backbone_config=tiny_config(name),
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=4,
        num_labels=3,
    )
    torch.manual_seed(0)
    model = DetrForObjectDetection(config).train()
    height, width = 3 * stride(name), 4 * stride(name)
    mask = torch.ones(2, height, width, dtype=torch.long)
    mask[1, :, -stride(name) :] = 0
    output = model(pixel_values=torch.randn(2, 3, height, width), pixel_mask=mask)
    assert output.logits.shape[:2] == (2, 4) and output.pred_boxes.shape == (2, 4, 4)
    (output.logits.sum() + output.pred_boxes.sum()).backward()
    (tower,) = (module for module in model.modules() if type(module) is type(build(name)))
    assert gradients_reach(model, tower) > 0.8


def test_what_is_not_trained_is_not_trained_after_saving_and_loading_either(name, tmp_path):
    config = tiny_config(name)
    config.save_pretrained(tmp_path / "config")
    encoder = load_encoder(tmp_path / "config", tap=config.out_features[-1], pretrained=False)
    trained = {key: parameter.requires_grad for key, parameter in encoder.named_parameters()}
    assert tap_norm(encoder.config) == tap_norm(config)
    if tap_norm(config) == "parameter-free":
        assert not any(is_trained for key, is_trained in trained.items() if "norms." in key)
    for trip in ("first", "second"):
        encoder.save_pretrained(tmp_path / trip)
        encoder = load_encoder(tmp_path / trip)
        assert {key: parameter.requires_grad for key, parameter in encoder.named_parameters()} == trained
        assert tap_norm(encoder.config) == tap_norm(config)
