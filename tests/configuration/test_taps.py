"""From whole configs to tapped ones: every stock family, own ones, composites, and the answers to wrong taps."""

import dataclasses

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoBackbone,
    AutoModel,
    BertConfig,
    CLIPConfig,
    ConvNextConfig,
    HieraConfig,
    LlavaConfig,
    SiglipConfig,
    SwinConfig,
    UperNetConfig,
    ViTConfig,
    VitDetConfig,
)

from ssm_vlm.configuration.configuration_hidden_state_backbone import HiddenStateBackboneConfig
from ssm_vlm.configuration.configuration_llava_style import LlavaStyleConfig
from ssm_vlm.configuration.configuration_ssm_vision import SSMVisionConfig
from ssm_vlm.configuration.named_encoders import ENCODERS
from ssm_vlm.configuration.taps import STAGE_CUTS, says_its_norm, tapped_config
from ssm_vlm.modeling.encoder_loading import tap_whole
from ssm_vlm.modeling.token_grid import encoder_downsampling, grid_size

WIDTHS, DEPTHS = [8, 16, 24, 32], [1, 2, 2, 1]
WHOLE = {
    "swin": {"embed_dim": 8, "depths": DEPTHS, "num_heads": [1, 2, 2, 4], "window_size": 4, "image_size": 128},
    "swinv2": {
        "embed_dim": 8,
        "depths": DEPTHS,
        "num_heads": [1, 2, 2, 4],
        "window_size": 4,
        "image_size": 128,
        "pretrained_window_sizes": [0, 0, 0, 0],
    },
    "convnext": {"hidden_sizes": WIDTHS, "depths": DEPTHS, "layer_scale_init_value": 0.5},
    "convnextv2": {"hidden_sizes": WIDTHS, "depths": DEPTHS},
    "dinov3_convnext": {"hidden_sizes": WIDTHS, "depths": DEPTHS},
    "resnet": {"embedding_size": 8, "hidden_sizes": WIDTHS, "depths": DEPTHS},
    "pvt_v2": {"hidden_sizes": [8, 16, 40, 64], "depths": DEPTHS, "sr_ratios": [2, 2, 1, 1]},
}
NORMED = {"swin": 1e-5, "convnext": 1e-6, "convnextv2": 1e-6}
"""Families whose Backbone norms its tap -> epsilon."""


def whole_model(name):
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIG_MAPPING[name](**WHOLE[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def stage_output(name, model, pixels, stage):
    """[B, C, H, W] at the end of a stage, before the next one's downsampling, by the whole model's own means."""
    if name == "swin":
        return model(
            pixels,
            output_hidden_states=True,
            output_hidden_states_before_downsampling=True,
            always_partition=True,
        ).reshaped_hidden_states[stage]
    if name == "swinv2":
        embedded, size = model.embeddings(pixels)
        states = model.encoder(embedded, size, output_hidden_states=True, output_hidden_states_before_downsampling=True)
        return states.reshaped_hidden_states[stage]
    states = model(pixels, output_hidden_states=True).hidden_states
    return states[stage - 1 if name == "pvt_v2" else stage]


def test_every_cut_is_tested():
    assert set(WHOLE) == set(STAGE_CUTS)


@pytest.mark.parametrize("name", WHOLE)
class TestStages:
    @pytest.mark.parametrize("stage", [1, 2, 3, 4])
    @pytest.mark.parametrize("size", [(128, 128), (64, 160), (101, 75)])
    def test_the_cut_model_computes_what_the_whole_one_does(self, name, stage, size):
        model, pixels = whole_model(name), torch.randn(1, 3, *size)
        config = tapped_config(model.config, f"stage{stage}")
        backbone = tap_whole(model.state_dict(), type(model), config, name)
        with torch.no_grad():
            features, expected = backbone(pixels).feature_maps[-1], stage_output(name, model, pixels, stage)
        if name in NORMED:
            by_channel = expected.permute(0, 2, 3, 1)
            expected = torch.nn.functional.layer_norm(by_channel, by_channel.shape[-1:], eps=NORMED[name])
            expected = expected.permute(0, 3, 1, 2)
        assert features.shape == expected.shape
        assert (features - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert features.shape[2:] == grid_size(*size, encoder_downsampling(config))
        assert backbone.channels == [features.shape[1]]
        frozen = {key for key, parameter in backbone.named_parameters() if not parameter.requires_grad}
        assert all("norm" in key for key in frozen) and bool(frozen) == (name in NORMED)

    def test_later_stages_do_not_exist(self, name):
        whole = whole_model(name)
        counts = []
        for stage in (1, 2, 3, 4):
            backbone = AutoBackbone.from_config(tapped_config(whole.config, f"stage{stage}"))
            counts.append(sum(parameter.numel() for parameter in backbone.parameters()))
        assert counts == sorted(counts) and counts[2] < 0.75 * counts[3]

    def test_default_is_the_third_stage(self, name):
        config = tapped_config(CONFIG_MAPPING[name](**WHOLE[name]))
        assert config.out_features == ["stage3"] and list(config.depths) == [1, 2, 2]
        assert tapped_config(config).to_dict() == config.to_dict()

    def test_wrong_taps_are_told_with_the_choices(self, name):
        with pytest.raises(ValueError, match=f"A '{name}' model has no tap 'stage5'; choose .*stage1, stage2, stage3"):
            tapped_config(CONFIG_MAPPING[name](**WHOLE[name]), "stage5")


@pytest.mark.parametrize("name", ["bit", "hgnet_v2", "focalnet"])
def test_other_backbones_keep_their_later_stages(name):
    whole = CONFIG_MAPPING[name]()
    config = tapped_config(whole)
    assert config.out_features == ["stage3"] and type(config) is type(whole)
    assert list(config.depths) == list(whole.depths)


def test_stochastic_depth_is_that_of_the_whole_model():
    rate = tapped_config(SwinConfig(drop_path_rate=0.2)).drop_path_rate
    assert rate == pytest.approx(0.2 * 9 / 11)  # 12 blocks, of which 10 are kept


def test_labels_do_not_travel():
    config = tapped_config(ConvNextConfig(num_labels=1000))
    assert len(config.id2label) == 2
    assert len(tapped_config(ViTConfig(num_labels=1000)).vision_config.id2label) == 2


class TestPlain:
    def test_default_is_the_second_to_last_block(self):
        config = tapped_config(ViTConfig())
        assert isinstance(config, HiddenStateBackboneConfig)
        assert config.out_features == ["block11"] and config.tap_layer == -2
        assert tapped_config(config).to_dict() == config.to_dict()

    @pytest.mark.parametrize(("tap", "layer"), [("block1", -12), ("block12", -1)])
    def test_by_name(self, tap, layer):
        config = tapped_config(ViTConfig(), tap)
        assert config.out_features == [tap] and config.tap_layer == layer
        assert tapped_config(config, "block7").out_features == ["block7"]

    def test_wrong_taps_are_told_with_the_choices(self):
        with pytest.raises(ValueError, match="A 'vit' model has no tap 'stage3'; choose block1 to block12"):
            tapped_config(ViTConfig(), "stage3")

    def test_the_final_norm_stays_behind_the_last_block_only(self):
        config = HiddenStateBackboneConfig(vision_config=ViTConfig(), tap_layer=-1, apply_final_norm=True)
        assert tapped_config(config).apply_final_norm
        assert not tapped_config(config, "block3").apply_final_norm

    @pytest.mark.parametrize(("tap", "stage", "kept"), [(None, "stage12", 12), ("block4", "stage4", 4)])
    def test_backbones_that_call_blocks_stages(self, tap, stage, kept):
        config = tapped_config(VitDetConfig(drop_path_rate=0.11), tap)
        assert config.out_features == [stage] and config.num_hidden_layers == kept
        assert config.drop_path_rate == pytest.approx(0.01 * (kept - 1))
        with pytest.raises(ValueError, match="no tap 'block13'; choose block1 to block12"):
            tapped_config(VitDetConfig(), "block13")


class TestOwn:
    def test_ssm_vision(self):
        whole = SSMVisionConfig(out_features=["stage4"])
        assert tapped_config(whole).out_features == ["stage3"]
        assert tapped_config(whole, "stage2").hidden_size == 192
        assert tapped_config(SSMVisionConfig(hidden_sizes=[8, 16], depths=[1, 1])).out_features == ["stage2"]

    @pytest.mark.parametrize("name", ENCODERS)
    def test_named_encoders_have_no_field_that_their_class_does_not_know(self, name):
        """Transformers keeps any argument as an attribute, and then no published config would be equal."""
        config = ENCODERS[name].config()
        config = getattr(config, "vision_config", config)
        if says_its_norm(config):
            assert config.output_norm == "parameter_free"
            del config.output_norm
        known = {field.name for field in dataclasses.fields(config)} | set(type(config)().to_dict())
        assert not set(config.to_dict()) - known

    @pytest.mark.parametrize("name", ENCODERS)
    def test_named_encoders_keep_their_tap(self, name):
        config = ENCODERS[name].config()
        tap = config.out_features[-1]
        assert tapped_config(config, tap).out_features == [tap]


class TestComposites:
    @pytest.mark.parametrize(
        ("config", "inner"), [(CLIPConfig(), "clip_vision_model"), (SiglipConfig(), "siglip_vision_model")]
    )
    def test_the_vision_part_is_taken(self, config, inner):
        tapped = tapped_config(config)
        assert tapped.vision_config.model_type == inner and tapped.out_features == ["block11"]

    def test_of_a_vision_language_model(self):
        assert tapped_config(LlavaConfig(), "block4").vision_config.model_type == "clip_vision_model"

    def test_a_tapped_part_keeps_its_tap(self):
        swin = SwinConfig(out_features=["stage1", "stage2"])
        assert tapped_config(UperNetConfig(backbone_config=swin)).out_features == ["stage2"]
        vision = ENCODERS["vit_small_patch16.augreg_in1k_224"].config()
        assert tapped_config(LlavaStyleConfig(vision_config=vision)).to_dict() == vision.to_dict()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BertConfig(), "A 'bert' model cannot be tapped: it is no Backbone, and none of the plain vision transformers"),
        (HieraConfig(), "A 'hiera' model cannot be tapped: the Backbone of this Transformers version leaves out"),
    ],
)
def test_what_cannot_be_tapped(config, message):
    with pytest.raises(ValueError, match=message):
        tapped_config(config)
