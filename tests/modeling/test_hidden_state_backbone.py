"""The adapter around plain vision transformers: contract, truncation, bad input (golden: test_convert_stock)."""

import pytest
import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoBackbone,
    AutoConfig,
    AutoModel,
    CLIPVisionConfig,
    ConvNextConfig,
    LlamaConfig,
    ResNetConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTConfig,
)
from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

from ssm_vlm.configuration.configuration_hidden_state_backbone import HIDDEN_STATE_FAMILIES, HiddenStateBackboneConfig
from ssm_vlm.modeling.encoder_loading import load_encoder
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
MORE = {
    "dinov2_with_registers": {"num_register_tokens": 3},
    "dinov3_vit": {"num_register_tokens": 3},
    "beit": {"use_absolute_position_embeddings": True, "use_relative_position_bias": True},
    "data2vec-vision": {"use_shared_relative_position_bias": True},
    "vit_mae": {"mask_ratio": 0.75},
    "internvl_vision": {"use_absolute_position_embeddings": True, "use_mean_pooling": False},
    "siglip2_vision_model": {"num_patches": 16},
    "aimv2_vision_model": {"is_native": True},
}
STOCK = {
    name: CONFIG_MAPPING[name](
        **{key: value for key, value in SMALL.items() if key != "image_size" or name != "siglip2_vision_model"},
        **MORE.get(name, {}),
    )
    for name in HIDDEN_STATE_FAMILIES
}
NORMLESS = {"beit", "data2vec-vision"}
"""Families whose published configs pool the mean and norm only that."""


def whole_model(model_type):
    """The stock model, all blocks, norm and pooler included."""
    torch.manual_seed(0)
    name = HIDDEN_STATE_FAMILIES[model_type].stock_class
    stock = STOCK[model_type]
    return (AutoModel.from_config(stock) if name is None else getattr(transformers, name)(stock)).eval()


def build(stock, **kwargs):
    torch.manual_seed(0)
    backbone = HiddenStateBackbone(HiddenStateBackboneConfig(vision_config=stock, **kwargs)).eval()
    # Position embeddings, registers and CLS tokens often start at zero: make every parameter matter.
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.normal_(std=0.2)
    return backbone


def stock_hidden_states(model_type, stock, pixels):
    """Embeddings and every block's output of a stock model, called as its own image processor would have it."""
    if model_type == "siglip2_vision_model":
        rows, columns = pixels.shape[2] // 8, pixels.shape[3] // 8
        return stock(
            torch.stack([torch.as_tensor(convert_image_to_patches(picture.numpy(), 8)) for picture in pixels]),
            pixel_attention_mask=torch.ones(len(pixels), rows * columns),
            spatial_shapes=torch.tensor([[rows, columns]] * len(pixels)),
            output_hidden_states=True,
        ).hidden_states
    arguments = {"output_hidden_states": True}
    if HIDDEN_STATE_FAMILIES[model_type].takes_interpolation:
        arguments["interpolate_pos_encoding"] = True
    if model_type == "vit_mae":  # nothing masked, nothing moved
        stock.config.mask_ratio = 0.0
        count = pixels.shape[2] // 8 * (pixels.shape[3] // 8)
        arguments["noise"] = torch.linspace(0, 1, count).expand(len(pixels), -1)
    return stock(pixels, **arguments).hidden_states


@pytest.mark.parametrize("model_type", STOCK)
class TestEveryFamily:
    @pytest.mark.parametrize("size", [(32, 32), (24, 48), (33, 41), (8, 8)])
    def test_shape_is_what_token_grid_says(self, model_type, size):
        backbone = build(STOCK[model_type])
        (features,) = backbone(torch.randn(2, 3, *size)).feature_maps
        assert features.shape == (2, 16, *grid_size(*size, encoder_downsampling(backbone.config)))
        assert backbone.channels == [16] and backbone.config.hidden_size == 16

    @pytest.mark.parametrize("tap_layer", [-1, -2, -4])
    @pytest.mark.parametrize("size", [(32, 32), (32, 40)])
    def test_features_are_the_whole_stock_models_hidden_state(self, model_type, tap_layer, size):
        """Held to the model as Transformers builds it, all blocks, norm and pooler included."""
        backbone = build(STOCK[model_type], tap_layer=tap_layer)
        stock = whole_model(model_type)
        weights = {key.removeprefix("vision_model."): t for key, t in backbone.state_dict().items()}
        info = stock.load_state_dict(weights, strict=False)
        assert not info.unexpected_keys
        blocks = {name.split("layer")[1].split(".")[1] for name in weights if "layer" in name}
        assert blocks & set("0123") == set("0123"[: tap_layer % 4 + 1])  # later blocks are not allocated
        pixels = torch.randn(2, 3, *size)
        tokens = stock_hidden_states(model_type, stock, pixels)[tap_layer % 4 + 1]
        grid = (size[0] // 8, size[1] // 8)
        prefix = tokens.shape[1] - grid[0] * grid[1]
        assert prefix == backbone.config.num_prefix_tokens
        expected = tokens[:, prefix:].reshape(2, *grid, 16).permute(0, 3, 1, 2)
        assert torch.allclose(backbone(pixels).feature_maps[-1], expected, atol=1e-6)
        assert not torch.allclose(backbone(pixels.flip(3)).feature_maps[-1], expected, atol=1e-2)

    def test_gradients_are_those_of_the_whole_stock_model(self, model_type):
        backbone, stock = build(STOCK[model_type]), whole_model(model_type)
        stock.load_state_dict(
            {k.removeprefix("vision_model."): t for k, t in backbone.state_dict().items()}, strict=False
        )
        pixels, cotangent = torch.randn(2, 3, 32, 40), torch.randn(2, 16, 4, 5)
        (backbone(pixels).feature_maps[-1] * cotangent).sum().backward()
        tokens = stock_hidden_states(model_type, stock, pixels)[3][:, backbone.config.num_prefix_tokens :]
        (tokens.mT.reshape(2, 16, 4, 5) * cotangent).sum().backward()
        expected = {f"vision_model.{name}": parameter.grad for name, parameter in stock.named_parameters()}
        for name, parameter in backbone.named_parameters():
            if parameter.grad is not None:
                scale = max(expected[name].abs().max(), 1e-3)
                assert (parameter.grad - expected[name]).abs().max() <= 1e-3 * scale, name

    def test_bfloat16(self, model_type):
        torch.manual_seed(0)
        backbone = HiddenStateBackbone(HiddenStateBackboneConfig(vision_config=STOCK[model_type])).eval()
        pixels = torch.randn(2, 3, 32, 40)
        with torch.no_grad():
            expected = backbone(pixels).feature_maps[-1]
            features = backbone.to(torch.bfloat16)(pixels.bfloat16()).feature_maps[-1]
        assert features.dtype == torch.bfloat16
        assert (features - expected).abs().max() <= 2e-2 * expected.abs().max()

    def test_a_saved_whole_model_is_loaded_up_to_its_tap(self, model_type, tmp_path):
        stock = whole_model(model_type)
        stock.save_pretrained(tmp_path)
        encoder, pixels = load_encoder(tmp_path), torch.randn(1, 3, 32, 40)
        assert encoder.config.out_features == ["block3"]
        tokens = stock_hidden_states(model_type, stock, pixels)[3][:, encoder.config.num_prefix_tokens :]
        expected = tokens.reshape(1, 4, 5, 16).permute(0, 3, 1, 2)
        assert torch.allclose(encoder(pixels).feature_maps[-1], expected, atol=1e-6)

    def test_no_parameter_is_idle(self, model_type):
        backbone = build(STOCK[model_type])
        backbone(torch.randn(2, 3, 32, 32)).feature_maps[-1].square().sum().backward()
        idle = {name for name, parameter in backbone.named_parameters() if parameter.grad is None}
        always = dict.fromkeys(("dinov2_with_registers", "dinov3_vit", "tipsv2_vision_model"), "mask_token")
        always["vit_mae"] = "position_embeddings"  # sines, which are not trained
        assert idle == {f"vision_model.embeddings.{always[name]}" for name in always if name == model_type}

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
        if model_type in NORMLESS:
            pytest.skip("its published models have no final norm")
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
        (
            {"vision_config": ResNetConfig()},
            "cannot wrap a vision_config of model_type 'resnet'; it knows aimv2_vision_model, altclip_",
        ),
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


def test_a_model_of_one_picture_size_says_so():
    stock = CONFIG_MAPPING["aimv2_vision_model"](**SMALL, is_native=False)
    backbone = build(stock)
    assert backbone(torch.randn(1, 3, 32, 32)).feature_maps[-1].shape == (1, 16, 4, 4)
    with pytest.raises(ValueError, match="aimv2_vision_model reads pictures of 32x32 pixels only, got 8x8"):
        backbone(torch.randn(1, 3, 8, 8))


def test_stochastic_depth_of_the_kept_blocks_is_that_of_the_whole_model():
    stock = CONFIG_MAPPING["dinov2"](**SMALL, drop_path_rate=0.3)
    cut = build(stock, tap_layer=1).vision_model.config
    assert cut.num_hidden_layers == 2 and cut.drop_path_rate == pytest.approx(0.1)


TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 99,
}
COMPOSITES = {
    "clip": {"vision_config": SMALL, "text_config": TEXT},
    "siglip": {"vision_config": SMALL, "text_config": TEXT},
    "aimv2": {"vision_config": SMALL | {"is_native": True}, "text_config": TEXT},
    "chinese_clip": {"vision_config": SMALL, "text_config": TEXT},
    "metaclip_2": {"vision_config": SMALL, "text_config": TEXT},
    "llava": {
        "vision_config": STOCK["clip_vision_model"],
        "text_config": LlamaConfig(**TEXT),
        "image_token_index": 98,
    },
}


@pytest.mark.parametrize("name", COMPOSITES)
def test_the_vision_part_of_a_larger_model(name, tmp_path):
    torch.manual_seed(0)
    whole = AutoModel.from_config(CONFIG_MAPPING[name](**COMPOSITES[name])).eval()
    whole.save_pretrained(tmp_path)
    encoder, pixels = load_encoder(tmp_path, tap="block2"), torch.randn(1, 3, 32, 32)
    part = whole.vision_tower if name == "llava" else whole.vision_model
    tokens = part(pixels, output_hidden_states=True).hidden_states[2][:, encoder.config.num_prefix_tokens :]
    assert torch.allclose(encoder(pixels).feature_maps[-1], tokens.mT.reshape(1, 16, 4, 4), atol=1e-6)


def test_the_encoder_of_a_segmenter_keeps_its_trained_norm(tmp_path):
    stages = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "out_features": ["stage2", "stage3"]}
    config = UperNetConfig(backbone_config=ConvNextConfig(**stages), hidden_size=8, use_auxiliary_head=False)
    segmenter = UperNetForSemanticSegmentation(config).eval()
    with torch.no_grad():
        segmenter.backbone.hidden_states_norms["stage3"].weight.normal_()
    segmenter.save_pretrained(tmp_path)
    encoder, pixels = load_encoder(tmp_path), torch.randn(1, 3, 64, 64)
    assert torch.allclose(encoder(pixels).feature_maps[-1], segmenter.backbone(pixels).feature_maps[-1], atol=1e-6)
