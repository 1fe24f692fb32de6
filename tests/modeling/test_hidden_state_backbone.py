"""The adapter around plain vision transformers: contract, truncation, bad input; golden features: test_convert_stock."""

import pytest
import torch
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    ResNetConfig,
    SiglipVisionConfig,
    ViTConfig,
)

from ssm_vlm.configuration.configuration_hidden_state_backbone import HIDDEN_STATE_FAMILIES, HiddenStateBackboneConfig
from ssm_vlm.modeling.modeling_hidden_state_backbone import HiddenStateBackbone
from ssm_vlm.modeling.token_grid import encoder_downsampling, grid_size

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
STOCK = {
    config.model_type: config
    for config in (
        ViTConfig(**SMALL),
        DeiTConfig(**SMALL),
        CLIPVisionConfig(**SMALL),
        SiglipVisionConfig(**SMALL),
        Dinov2Config(**SMALL),
        Dinov2WithRegistersConfig(**SMALL, num_register_tokens=3),
    )
}


def build(stock, **kwargs):
    torch.manual_seed(0)
    backbone = HiddenStateBackbone(HiddenStateBackboneConfig(vision_config=stock, **kwargs)).eval()
    # Position embeddings, registers and CLS tokens often start at zero: make every parameter matter.
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.normal_(std=0.2)
    return backbone


def test_every_family_is_tested():
    assert set(STOCK) == set(HIDDEN_STATE_FAMILIES)


@pytest.mark.parametrize("model_type", STOCK)
class TestEveryFamily:
    @pytest.mark.parametrize("size", [(32, 32), (24, 48), (33, 41), (8, 8)])
    def test_shape_is_what_token_grid_says(self, model_type, size):
        backbone = build(STOCK[model_type])
        (features,) = backbone(torch.randn(2, 3, *size)).feature_maps
        assert features.shape == (2, 16, *grid_size(*size, encoder_downsampling(backbone.config)))
        assert backbone.channels == [16] and backbone.config.hidden_size == 16

    def test_features_are_the_stock_hidden_state_without_prefix(self, model_type):
        backbone = build(STOCK[model_type], tap_layer=-1)
        pixels = torch.randn(2, 3, 32, 32)
        tokens = backbone.vision_model(pixels, output_hidden_states=True).hidden_states[-1]
        prefix = tokens.shape[1] - 16
        assert prefix == backbone.config.num_prefix_tokens
        expected = tokens[:, prefix:].reshape(2, 4, 4, 16).permute(0, 3, 1, 2)
        assert torch.equal(backbone(pixels).feature_maps[-1], expected)

    def test_truncation_changes_nothing_before_the_tap(self, model_type):
        stock = STOCK[model_type]
        whole = build(stock, tap_layer=-1)
        cut = build(stock, tap_layer=-3)
        cut.load_state_dict({k: v for k, v in whole.state_dict().items() if k in cut.state_dict()})
        blocks = {name.split("layer")[1].split(".")[1] for name in cut.state_dict() if "layer" in name}
        assert blocks & set("0123") == {"0", "1"}  # of 4 blocks the last two are not allocated
        pixels = torch.randn(1, 3, 32, 40)
        states = whole(pixels, output_hidden_states=True).hidden_states
        assert torch.equal(
            cut(pixels).feature_maps[-1],
            states[2][:, whole.config.num_prefix_tokens :].reshape(1, 4, 5, 16).permute(0, 3, 1, 2),
        )

    def test_no_parameter_is_idle(self, model_type):
        backbone = build(STOCK[model_type])
        backbone(torch.randn(2, 3, 32, 32)).feature_maps[-1].square().sum().backward()
        idle = {name for name, parameter in backbone.named_parameters() if parameter.grad is None}
        # Transformers always allocates the mask token of DINOv2 with registers.
        assert idle <= {"vision_model.embeddings.mask_token"} and (not idle or "registers" in model_type)

    def test_saved_and_reloaded_bit_equal(self, model_type, tmp_path):
        backbone = build(STOCK[model_type], out_features=["block1", "block3"], apply_final_norm=True)
        backbone.save_pretrained(tmp_path)
        reloaded, info = HiddenStateBackbone.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        assert reloaded.config.out_features == ["block1", "block3"]
        pixels = torch.randn(1, 3, 40, 24)
        for one, other in zip(backbone(pixels).feature_maps, reloaded.eval()(pixels).feature_maps, strict=True):
            assert torch.equal(one, other)

    def test_final_norm(self, model_type):
        backbone = build(STOCK[model_type], tap_layer=-1, apply_final_norm=True)
        raw = build(STOCK[model_type], tap_layer=-1)
        raw.load_state_dict({k: v for k, v in backbone.state_dict().items() if not k.startswith("norm.")})
        pixels = torch.randn(1, 3, 32, 32)
        by_hand = backbone.norm(raw(pixels).feature_maps[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        assert torch.allclose(backbone(pixels).feature_maps[-1], by_hand, atol=1e-6)
        assert not torch.allclose(by_hand, raw(pixels).feature_maps[-1], atol=1e-2)


def test_equal_to_the_stock_model_with_its_final_norm():
    torch.manual_seed(0)
    stock = AutoModel.from_config(STOCK["vit"]).eval()
    backbone = HiddenStateBackbone(
        HiddenStateBackboneConfig(vision_config=STOCK["vit"], tap_layer=-1, apply_final_norm=True)
    ).eval()
    weights = {f"vision_model.{k}": v for k, v in stock.state_dict().items() if not k.startswith("pooler")}
    weights = {k.replace("vision_model.layernorm.", "norm."): v for k, v in weights.items()}
    backbone.load_state_dict(weights)
    pixels = torch.randn(2, 3, 32, 32)
    expected = stock(pixels).last_hidden_state[:, 1:].reshape(2, 4, 4, 16).permute(0, 3, 1, 2)
    assert torch.allclose(backbone(pixels).feature_maps[-1], expected, atol=1e-6)


def test_several_blocks_for_dense_heads():
    backbone = build(STOCK["vit"], out_features=["stem", "block1", "block3"])
    output = backbone(torch.randn(1, 3, 32, 32))
    assert [tuple(f.shape) for f in output.feature_maps] == [(1, 16, 4, 4)] * 3
    assert output.hidden_states is None and backbone.channels == [16, 16, 16]
    assert (
        torch.equal(output.feature_maps[-1], build(STOCK["vit"])(torch.zeros(1, 3, 32, 32)).feature_maps[-1]) is False
    )


def test_auto_classes_and_nested_config_round_trip():
    config = HiddenStateBackboneConfig(vision_config=STOCK["clip_vision_model"], tap_layer=1)
    again = AutoConfig.for_model(**config.to_dict())
    assert isinstance(again, HiddenStateBackboneConfig) and isinstance(again.vision_config, CLIPVisionConfig)
    assert again.to_dict() == config.to_dict() and again.num_blocks == 2
    assert isinstance(AutoBackbone.from_config(again), HiddenStateBackbone)
    assert config.vision_config.num_hidden_layers == 4  # the stock config stays whole


def test_gradient_checkpointing_gives_equal_gradients():
    pixels = torch.randn(2, 3, 32, 32)
    gradients = []
    for enable in (False, True):
        backbone = build(STOCK["vit"]).train()
        if enable:
            backbone.activation_checkpointing_enable()
        backbone(pixels).feature_maps[-1].square().sum().backward()
        gradients.append([p.grad for p in backbone.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"vision_config": ResNetConfig()}, "cannot wrap a vision_config of model_type 'resnet'; it knows clip_vision"),
        ({"vision_config": ViTConfig(**SMALL), "tap_layer": 4}, r"tap_layer 4 is outside the 4 blocks.*-4 to 3"),
        ({"vision_config": ViTConfig(**SMALL), "tap_layer": -5}, "tap_layer -5 is outside the 4 blocks"),
        ({"vision_config": ViTConfig(**SMALL | {"patch_size": [8, 4]})}, r"needs square patches.*\[8, 4\]"),
        ({"vision_config": ViTConfig(**SMALL), "out_features": ["block1"]}, "must be the tap 'block3'"),
    ],
)
def test_bad_configs_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        HiddenStateBackboneConfig(**kwargs)


def test_an_input_smaller_than_a_patch_is_named():
    with pytest.raises(ValueError, match="7x32 pixel canvas gives a 0x4 grid"):
        build(STOCK["vit"])(torch.randn(1, 3, 7, 32))


def test_a_position_embedding_made_for_an_oblong_is_used_only_for_that():
    backbone = build(ViTConfig(**SMALL | {"image_size": [16, 40]}))
    assert backbone(torch.randn(1, 3, 16, 40)).feature_maps[-1].shape == (1, 16, 2, 5)
    with pytest.raises(ValueError, match="was made for 16x40 pixels; only one made for a square"):
        backbone(torch.randn(1, 3, 32, 32))
