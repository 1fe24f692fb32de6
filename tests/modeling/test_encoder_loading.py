"""Loading by name: strict keys, declared discards, folders, safe reading of pickles, and the answers to bad input."""

import builtins
import hashlib
import json
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    BertConfig,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    ConvNextBackbone,
    ConvNextConfig,
    ConvNextImageProcessor,
    ConvNextV2Config,
    LlamaConfig,
    SwinConfig,
    ViTConfig,
    ViTImageProcessor,
)
from transformers.image_utils import OPENAI_CLIP_MEAN

from ssm_vlm import (
    BackboneClassifierConfig,
    BackboneForImageClassification,
    LlavaStyleConfig,
    LlavaStyleForConditionalGeneration,
)
from ssm_vlm.configuration.configuration_hidden_state_backbone import HiddenStateBackboneConfig
from ssm_vlm.configuration.configuration_ssm_vision import SSMVisionConfig
from ssm_vlm.configuration.encoder_entry import IMAGENET, NamedEncoder, Preprocessing, WeightSource
from ssm_vlm.configuration.named_encoders import ENCODERS
from ssm_vlm.configuration.taps import tap_norm
from ssm_vlm.modeling.checkpoint_files import read_state_dict
from ssm_vlm.modeling.encoder_conversion import convert_encoder, convert_published
from ssm_vlm.modeling.encoder_loading import load_encoder, read_transformers
from ssm_vlm.modeling.encoder_preprocessing import encoder_image_processor, image_processor_arguments
from ssm_vlm.modeling.image_processing_llava_style import LlavaStyleImageProcessor

FIXTURES = Path(__file__).parent.parent / "fixtures"
PIXELS = Preprocessing(64, 64, *IMAGENET)
TINY_VIT = ViTConfig(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=128,
    image_size=64,
    patch_size=16,
    layer_norm_eps=1e-6,
)
TIMM = WeightSource("timm_vit", url="https://example.org/vit.pth")


def tiny_vmamba_config(**fields):
    reference = json.loads((FIXTURES / "vmamba_v2_ratio2.json").read_text())["constructor"]
    return SSMVisionConfig(
        hidden_sizes=[reference["dims"] * 2**stage for stage in range(len(reference["depths"]))]
        if isinstance(reference["dims"], int)
        else reference["dims"],
        depths=reference["depths"],
        mlp_ratio=reference["mlp_ratio"],
        ssm_ratio=reference["ssm_ratio"],
        out_features=["stage3"],
        **fields,
    )


@pytest.fixture
def table(monkeypatch):
    """Puts tiny encoders into the table for one test."""

    def add(name, config, weights):
        monkeypatch.setitem(ENCODERS, name, NamedEncoder(name, config, PIXELS, 1, 1, "MIT", weights))
        return name

    return add


@pytest.fixture
def tiny_vit(table):
    return table("tiny_vit.golden", lambda: HiddenStateBackboneConfig(vision_config=TINY_VIT), TIMM)


class TestConvert:
    def test_timm_file_to_folder_to_golden_features(self, tiny_vit, tmp_path):
        folder = convert_encoder(tiny_vit, FIXTURES / "vit_timm.weights.safetensors", tmp_path)
        assert folder == tmp_path / tiny_vit and (folder / "model.safetensors").is_file()
        assert [path.name for path in tmp_path.iterdir()] == [tiny_vit]  # no scratch is left
        io = load_file(FIXTURES / "vit_timm.io.safetensors")
        encoder = load_encoder(tiny_vit, weights_dir=tmp_path)
        assert not encoder.training
        features = encoder(io["input.0"]).feature_maps[-1]
        assert (features - io["block2.0"]).abs().max() <= 1e-4 * io["block2.0"].abs().max()

    def test_preprocessing_travels_with_the_weights(self, tiny_vit, tmp_path):
        folder = convert_encoder(tiny_vit, FIXTURES / "vit_timm.weights.safetensors", tmp_path)
        processor = AutoImageProcessor.from_pretrained(folder)
        assert list(processor.image_mean) == list(IMAGENET[0]) and processor.downsampling == [[16, "floor"]]

    @pytest.mark.parametrize("dense", [False, True])
    def test_vmamba_files(self, table, tmp_path, dense):
        case = "vmamba_v2_ratio2_backbone" if dense else "vmamba_v2_ratio2"
        state_dict = load_file(FIXTURES / f"{case}.weights.safetensors")
        if dense:  # as mmdetection stores it
            contents = {"state_dict": {f"backbone.{k}": v for k, v in state_dict.items()}}
            contents["state_dict"]["rpn_head.weight"] = torch.ones(1)
        else:
            contents = {"model": state_dict, "epoch": 3}
        torch.save(contents, tmp_path / "file.pth")
        config = partial(tiny_vmamba_config, output_norm="layernorm" if dense else "parameter_free")
        name = table("vmamba_tiny.golden", config, WeightSource("vmamba", url="https://x"))
        convert_encoder(name, tmp_path / "file.pth", tmp_path / "weights")
        encoder = load_encoder(name, weights_dir=tmp_path / "weights")
        assert sum("blocks.0.norm1.weight" in key for key in encoder.state_dict()) == 3
        if dense:
            io = load_file(FIXTURES / f"{case}.io.safetensors")
            features = encoder(io["input.0"]).feature_maps[-1]
            assert (features - io["stage3.0"]).abs().max() <= 1e-4 * io["stage3.0"].abs().max()

    def test_another_tap_of_a_name_comes_from_the_same_folder(self, tiny_vit, tmp_path):
        convert_encoder(tiny_vit, FIXTURES / "vit_timm.weights.safetensors", tmp_path)
        io = load_file(FIXTURES / "vit_timm.io.safetensors")
        for tap in ("block1", "block2", "block3"):
            encoder = load_encoder(tiny_vit, weights_dir=tmp_path, tap=tap)
            features = encoder(io["input.0"]).feature_maps[-1]
            assert (features - io[f"{tap}.0"]).abs().max() <= 1e-4 * io[f"{tap}.0"].abs().max()
        with pytest.raises(ValueError, match="has no tap 'stage3'; choose block1, block2, block3"):
            load_encoder(tiny_vit, weights_dir=tmp_path, tap="stage3")

    def test_an_undeclared_key_is_named(self, tiny_vit, tmp_path):
        weights = load_file(FIXTURES / "vit_timm.weights.safetensors") | {"extra.scale": torch.ones(2)}
        save_file(weights, tmp_path / "file.safetensors")
        with pytest.raises(ValueError, match=r"does not fit: it has undeclared extra\.scale\."):
            convert_encoder(tiny_vit, tmp_path / "file.safetensors", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_missing_key_and_another_shape_are_named(self, tiny_vit, tmp_path):
        weights = load_file(FIXTURES / "vit_timm.weights.safetensors")
        del weights["blocks.0.norm1.bias"]
        weights["cls_token"] = torch.zeros(1, 1, 31)
        save_file(weights, tmp_path / "file.safetensors")
        message = (
            r"lacks vit\.layers\.0\.layernorm_before\.bias; it has another shape for "
            r"vit\.embeddings\.cls_token \(1, 1, 31\) instead of \(1, 1, 32\)"
        )
        with pytest.raises(ValueError, match=message):
            convert_encoder(tiny_vit, tmp_path / "file.safetensors", tmp_path / "out")

    def test_a_file_of_another_depth_is_refused(self, tiny_vit, tmp_path):
        weights = load_file(FIXTURES / "vit_timm.weights.safetensors")
        save_file({k: v for k, v in weights.items() if not k.startswith("blocks.2")}, tmp_path / "file.safetensors")
        with pytest.raises(ValueError, match=r"does not fit: it lacks vit\.layers\.2\.attention\.k_proj\.bias, "):
            convert_encoder(tiny_vit, tmp_path / "file.safetensors", tmp_path / "out")

    def test_a_file_of_another_family_is_refused(self, tiny_vit, tmp_path):
        with pytest.raises(ValueError, match=r"is in the layout 'swin', but 'tiny_vit.golden' comes in 'timm_vit'"):
            convert_encoder(tiny_vit, FIXTURES / "swin_release.weights.safetensors", tmp_path / "out")

    def test_a_failed_conversion_keeps_the_old_folder(self, tiny_vit, tmp_path):
        convert_encoder(tiny_vit, FIXTURES / "vit_timm.weights.safetensors", tmp_path)
        with pytest.raises(FileNotFoundError, match="no checkpoint file"):
            convert_encoder(tiny_vit, tmp_path / "gone.pth", tmp_path)
        load_encoder(tiny_vit, weights_dir=tmp_path)

    def test_converting_again_replaces_the_folder(self, tiny_vit, tmp_path):
        convert_encoder(tiny_vit, FIXTURES / "vit_timm.weights.safetensors", tmp_path)
        config = (tmp_path / tiny_vit / "config.json").read_bytes()
        assert convert_encoder(tiny_vit, FIXTURES / "vit_timm.weights.safetensors", tmp_path) == tmp_path / tiny_vit
        assert (tmp_path / tiny_vit / "config.json").read_bytes() == config

    def test_a_folder_of_other_files_is_left_alone(self, tiny_vit, tmp_path):
        (tmp_path / tiny_vit).mkdir()
        (tmp_path / tiny_vit / "thesis.txt").write_text("mine")
        with pytest.raises(ValueError, match="holds files that no conversion made: give a new one"):
            convert_encoder(tiny_vit, FIXTURES / "vit_timm.weights.safetensors", tmp_path)
        assert (tmp_path / tiny_vit / "thesis.txt").read_text() == "mine"

    def test_own_encoders_have_nothing_to_convert(self, tmp_path):
        with pytest.raises(ValueError, match="has no published weights: this project trains it"):
            convert_encoder("digit_vit.digitscenes_64", tmp_path / "x.pth", tmp_path)


class TestStockLayout:
    """The layouts of Transformers: a folder in the Hub's form, whatever head it has."""

    @staticmethod
    def entry(table, **changes):
        stock = ViTConfig(**(TINY_VIT.to_dict() | changes))
        weights = WeightSource("transformers", hub_id="nobody/vit")
        return table("stock_vit.test", lambda: HiddenStateBackboneConfig(vision_config=stock), weights)

    @pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForImageClassification])
    def test_features_are_those_of_the_whole_model(self, table, tmp_path, auto_class):
        name = self.entry(table)
        stock = auto_class.from_config(TINY_VIT).eval()
        stock.save_pretrained(tmp_path / "hub")
        convert_encoder(name, tmp_path / "hub", tmp_path / "out")
        pixels = torch.randn(1, 3, 64, 64)
        tokens = stock(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        features = load_encoder(name, weights_dir=tmp_path / "out")(pixels).feature_maps[-1]
        assert torch.equal(features, tokens.transpose(1, 2).reshape(1, 32, 4, 4))

    def test_an_undeclared_key_is_named(self, table, tmp_path):
        name = self.entry(table)
        AutoModelForImageClassification.from_config(TINY_VIT).save_pretrained(tmp_path / "hub")
        weights = load_file(tmp_path / "hub/model.safetensors") | {"segmenter.weight": torch.ones(1)}
        save_file(weights, tmp_path / "hub/model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"does not fit: it has undeclared segmenter\.weight"):
            convert_encoder(name, tmp_path / "hub", tmp_path / "out")

    def test_what_no_shape_shows_is_compared(self, table, tmp_path):
        name = self.entry(table, num_attention_heads=4)
        AutoModel.from_config(TINY_VIT).save_pretrained(tmp_path / "hub")
        with pytest.raises(
            ValueError, match=r"another architecture: vision_config\.num_attention_heads 2 instead of 4"
        ):
            convert_encoder(name, tmp_path / "hub", tmp_path / "out")

    def test_convnext_is_cut_and_its_tap_norm_stays_neutral(self, table, tmp_path):
        whole = ConvNextConfig(hidden_sizes=[4, 8, 16, 32], depths=[1, 1, 2, 1], layer_scale_init_value=0.5)
        cut = partial(
            ConvNextConfig,
            hidden_sizes=[4, 8, 16],
            depths=[1, 1, 2],
            num_stages=3,
            layer_scale_init_value=0.5,
            out_features=["stage3"],
        )
        published = ENCODERS["convnext_tiny.in1k_224"].weights
        name = table("convnext.test", cut, published)
        stock = AutoModelForImageClassification.from_config(whole).eval()
        stock.save_pretrained(tmp_path / "hub")
        convert_encoder(name, tmp_path / "hub", tmp_path / "out")
        encoder = load_encoder(name, weights_dir=tmp_path / "out")
        pixels = torch.randn(1, 3, 64, 96)
        raw = stock.convnext(pixels, output_hidden_states=True).hidden_states[3]
        normed = torch.nn.functional.layer_norm(raw.permute(0, 2, 3, 1), (16,), eps=1e-6).permute(0, 3, 1, 2)
        assert isinstance(encoder, ConvNextBackbone) and raw.shape == (1, 16, 4, 6)
        assert torch.allclose(encoder(pixels).feature_maps[-1], normed, atol=1e-5)


class TestSwinRelease:
    """Held to another implementation of Swin, under the key names of Microsoft's release."""

    @pytest.fixture(scope="class")
    def golden(self, tmp_path_factory):
        arguments = json.loads((FIXTURES / "swin_release.json").read_text())["constructor"]
        torch.save(
            {"model": load_file(FIXTURES / "swin_release.weights.safetensors")},
            file := tmp_path_factory.mktemp("swin") / "swin.pth",
        )
        config = partial(
            SwinConfig,
            image_size=arguments["img_size"],
            embed_dim=arguments["embed_dim"],
            depths=arguments["depths"][:3],
            num_heads=arguments["num_heads"][:3],
            window_size=arguments["window_size"],
            out_features=["stage3"],
        )
        return file, config, load_file(FIXTURES / "swin_release.io.safetensors")

    @pytest.mark.parametrize("case", [0, 1, 2])  # square, oblong, and odd maps that need padding
    def test_features(self, golden, table, tmp_path, case):
        file, config, io = golden
        name = table("swin.test", config, ENCODERS["swin_tiny.in1k_224"].weights)
        convert_encoder(name, file, tmp_path)
        features = load_encoder(name, weights_dir=tmp_path)(io[f"input.{case}"]).feature_maps[-1]
        raw = io[f"stage3.{case}"].permute(0, 2, 3, 1)
        expected = torch.nn.functional.layer_norm(raw, raw.shape[-1:]).permute(0, 3, 1, 2)
        assert features.shape == expected.shape
        assert (features - expected).abs().max() <= 1e-4 * expected.abs().max()


NORMED_AT_THE_TAP = {
    "swin": SwinConfig(
        embed_dim=8, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 4], window_size=2, image_size=64, num_labels=3
    ),
    "convnext": ConvNextConfig(hidden_sizes=[4, 8, 16, 32], depths=[1, 1, 2, 1], layer_scale_init_value=0.5),
    "convnextv2": ConvNextV2Config(hidden_sizes=[4, 8, 16, 32], depths=[1, 1, 2, 1]),
}


def trained_norms(encoder):
    return {
        name for name, p in encoder.named_parameters() if name.startswith("hidden_states_norms.") and p.requires_grad
    }


class TestTapNormsThatNobodyTrained:
    """Stock Backbones have a norm at their tap, classifiers have none: it stays neutral, however often it is saved."""

    @pytest.fixture(params=NORMED_AT_THE_TAP)
    def whole(self, request, tmp_path):
        AutoModelForImageClassification.from_config(NORMED_AT_THE_TAP[request.param]).save_pretrained(tmp_path / "hub")
        return tmp_path / "hub"

    @staticmethod
    def with_norms(encoder, folder, scale, **fields):
        """A saved Backbone whose norms somebody trained."""
        with torch.no_grad():
            for name, parameter in encoder.named_parameters():
                if name.startswith("hidden_states_norms.") and name.endswith("weight"):
                    parameter.fill_(scale)
        for field, value in fields.items():
            setattr(encoder.config, field, value)
        encoder.save_pretrained(folder)
        return folder

    @pytest.mark.parametrize("tap", [None, "stage2", "stage4"])
    def test_they_are_frozen_after_any_number_of_round_trips(self, whole, tap, tmp_path):
        encoder = load_encoder(whole, tap=tap)
        features = encoder(pixels := torch.randn(1, 3, 64, 64)).feature_maps[-1]
        for trip in range(2):
            assert not trained_norms(encoder) and tap_norm(encoder.config) == "parameter-free"
            encoder.save_pretrained(tmp_path / str(trip))
            fields = json.loads((tmp_path / f"{trip}/config.json").read_text())
            assert fields["output_norm"] == "parameter_free"
            same_tap = encoder.out_features[-1]
            assert not trained_norms(load_encoder(tmp_path / str(trip), tap=same_tap))  # cut again
            assert not trained_norms(load_encoder(tmp_path / str(trip), pretrained=False))
            encoder = load_encoder(tmp_path / str(trip))
        assert torch.equal(encoder(pixels).feature_maps[-1], features)

    def test_they_stay_frozen_inside_a_saved_classifier(self, whole, tmp_path):
        encoder = load_encoder(whole)
        config = BackboneClassifierConfig(backbone_config=encoder.config, num_labels=3)
        BackboneForImageClassification(config, backbone=encoder).save_pretrained(tmp_path / "classifier")
        classifier = BackboneForImageClassification.from_pretrained(tmp_path / "classifier").train()
        assert not trained_norms(classifier.backbone) and classifier.norm.weight.requires_grad

    def test_they_stay_frozen_inside_a_saved_vision_language_model(self, whole, tmp_path):
        encoder = load_encoder(whole)
        text = LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
        config = LlavaStyleConfig(
            vision_config=encoder.config, text_config=text, image_token_id=63, freeze_vision=False
        )
        LlavaStyleForConditionalGeneration(config).save_pretrained(tmp_path / "vlm")
        tower = LlavaStyleForConditionalGeneration.from_pretrained(tmp_path / "vlm").train().vision_tower
        assert not trained_norms(tower) and any(p.requires_grad for p in tower.parameters())

    def test_training_moves_everything_but_them(self, whole):
        encoder = load_encoder(whole).train()
        before = {name: parameter.clone() for name, parameter in encoder.named_parameters()}
        encoder(torch.randn(2, 3, 64, 64)).feature_maps[-1].pow(3).sum().backward()
        torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1).step()
        for name, parameter in encoder.named_parameters():
            still = name.startswith(("hidden_states_norms.", "swin.layernorm."))
            assert torch.equal(parameter, before[name]) == still, name

    def test_a_whole_model_is_trained_to_its_last_norm(self, whole):
        assert all(parameter.requires_grad for parameter in read_transformers(whole).parameters())

    def test_those_that_somebody_trained_are_kept_and_trained(self, whole, tmp_path):
        folder = self.with_norms(load_encoder(whole), tmp_path / "a", 3.0, output_norm="layernorm")
        for encoder in (load_encoder(folder), load_encoder(folder, tap="stage3")):
            assert len(trained_norms(encoder)) == 2 and tap_norm(encoder.config) == "trained"
            assert (encoder.hidden_states_norms["stage3"].weight == 3).all()
        assert not trained_norms(load_encoder(folder, tap="stage2"))  # a tap whose norm the folder does not hold

    def test_a_backbone_of_somebody_else_says_nothing_and_is_trained(self, tmp_path):
        stock = ConvNextBackbone(
            ConvNextConfig(hidden_sizes=[4, 8, 16], depths=[1, 1, 2], num_stages=3, out_features=["stage3"])
        )
        encoder = load_encoder(self.with_norms(stock, tmp_path / "a", 3.0))
        assert trained_norms(encoder) and encoder.config.output_norm == "layernorm"

    def test_one_that_was_trained_against_its_config_is_told(self, whole, tmp_path):
        folder = self.with_norms(load_encoder(whole), tmp_path / "a", 3.0)
        for tap in (None, "stage3"):
            with pytest.raises(
                ValueError, match=r"'parameter_free', but hidden_states_norms\.stage3\.weight was trained"
            ):
                load_encoder(folder, tap=tap)


class TestFolders:
    def test_a_saved_backbone_of_any_kind(self, tmp_path):
        encoder = load_encoder("digit_dwconv.digitscenes_64", pretrained=False)
        encoder.save_pretrained(tmp_path / "mine")
        again = load_encoder(tmp_path / "mine")
        pixels = torch.randn(1, 3, 64, 64)
        assert torch.equal(encoder(pixels).feature_maps[-1], again(pixels).feature_maps[-1])

    def test_weights_of_another_architecture(self, tmp_path):
        load_encoder("digit_dwconv.digitscenes_64", pretrained=False).save_pretrained(
            tmp_path / "digit_identity.digitscenes_64"
        )
        with pytest.raises(ValueError, match="another architecture: mixer 'dwconv' instead of 'identity', mlp_ratio"):
            load_encoder("digit_identity.digitscenes_64", weights_dir=tmp_path)

    def test_a_folder_without_an_encoder(self, tmp_path):
        with pytest.raises(ValueError, match=r"holds no config\.json, so no saved encoder"):
            load_encoder(tmp_path)

    def test_a_folder_with_another_kind_of_model(self, tmp_path):
        BertConfig().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="A 'bert' model cannot be tapped: it is no Backbone"):
            load_encoder(tmp_path)

    def test_a_folder_with_a_key_too_few(self, tmp_path):
        load_encoder("digit_dwconv.digitscenes_64", pretrained=False).save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        del weights["stem.norm1.bias"]
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"does not fit: it lacks stem\.norm1\.bias"):
            load_encoder(tmp_path)


class TestAnyModel:
    """Models of Transformers by folder, as by Hub id: whole, with or without a head, or inside another model."""

    @pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForImageClassification])
    def test_a_plain_transformer_is_tapped_at_its_second_to_last_block(self, tmp_path, auto_class):
        stock = auto_class.from_config(TINY_VIT).eval()
        stock.save_pretrained(tmp_path)
        pixels = torch.randn(1, 3, 64, 64)
        states = stock(pixels, output_hidden_states=True).hidden_states
        for tap, index in ((None, 2), ("block1", 1), ("block3", 3)):
            encoder = load_encoder(tmp_path, tap=tap)
            expected = states[index][:, 1:].transpose(1, 2).reshape(1, 32, 4, 4)
            assert torch.equal(encoder(pixels).feature_maps[-1], expected)
            assert encoder.out_features == [f"block{index}"] and not encoder.training
            assert len(encoder.vision_model.layers) == index

    def test_a_hierarchical_model_is_tapped_at_its_third_stage(self, tmp_path):
        config = ConvNextConfig(hidden_sizes=[4, 8, 16, 32], depths=[1, 1, 2, 1], layer_scale_init_value=0.5)
        stock = AutoModelForImageClassification.from_config(config).eval()
        stock.save_pretrained(tmp_path)
        pixels = torch.randn(1, 3, 64, 96)
        states = stock.convnext(pixels, output_hidden_states=True).hidden_states
        for tap, index in ((None, 3), ("stage1", 1), ("stage4", 4)):
            encoder = load_encoder(tmp_path, tap=tap)
            raw = states[index].permute(0, 2, 3, 1)
            normed = torch.nn.functional.layer_norm(raw, raw.shape[-1:], eps=1e-6).permute(0, 3, 1, 2)
            assert torch.allclose(encoder(pixels).feature_maps[-1], normed, atol=1e-5)
            assert len(encoder.encoder.stages) == index

    def test_the_vision_part_of_a_model_with_text(self, tmp_path):
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        vision = sizes | {"image_size": 32, "patch_size": 8, "num_hidden_layers": 4}
        clip = CLIPModel(CLIPConfig(text_config=sizes | {"vocab_size": 50}, vision_config=vision)).eval()
        clip.save_pretrained(tmp_path)
        pixels = torch.randn(2, 3, 32, 32)
        states = clip.vision_model(pixels, output_hidden_states=True).hidden_states
        encoder = load_encoder(tmp_path)
        expected = states[3][:, 1:].transpose(1, 2).reshape(2, 32, 4, 4)
        assert torch.equal(encoder(pixels).feature_maps[-1], expected)
        assert not any("text" in key for key in encoder.state_dict())

    def test_what_lies_after_the_tap_may_be_missing(self, tmp_path):
        AutoModel.from_config(TINY_VIT, add_pooling_layer=False).save_pretrained(tmp_path)
        assert load_encoder(tmp_path).out_features == ["block2"]
        with pytest.raises(ValueError, match=r"does not fit: it lacks pooler\.dense\.bias, pooler\.dense\.weight\."):
            convert_published(tmp_path, tmp_path.with_name(f"{tmp_path.name}_out"))
        weights = load_file(tmp_path / "model.safetensors")
        del weights[next(key for key in weights if "layer.1." in key and "output.dense.weight" in key)]
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"does not fit: it lacks layers\.1\."):
            load_encoder(tmp_path)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_weights_keep_their_type(self, tmp_path, dtype):
        config = ConvNextConfig(hidden_sizes=[4, 8, 16, 32], depths=[1, 1, 2, 1])
        AutoModelForImageClassification.from_config(config).to(dtype).save_pretrained(tmp_path)
        encoder = load_encoder(tmp_path)
        assert {parameter.dtype for parameter in encoder.parameters()} == {dtype}

    def test_a_tap_that_is_not_there(self, tmp_path):
        AutoModel.from_config(TINY_VIT).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="has no tap 'block9'; choose block1, block2, block3"):
            load_encoder(tmp_path, tap="block9")

    def test_a_saved_backbone_keeps_its_tap_until_another_is_given(self, tmp_path):
        load_encoder("digit_dwconv.digitscenes_64", pretrained=False).save_pretrained(tmp_path)
        saved = load_encoder(tmp_path).out_features
        assert saved == ENCODERS["digit_dwconv.digitscenes_64"].config().out_features
        assert load_encoder(tmp_path, tap="stage1").out_features == ["stage1"]

    def test_a_name_without_weights_is_tapped_elsewhere(self):
        encoder = load_encoder("digit_dwconv.digitscenes_64", tap="stage1", pretrained=False)
        assert encoder.out_features == ["stage1"] and len(encoder.stages) == 1

    def test_a_hub_id_that_cannot_be_reached(self, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(OSError, match="No folder or model on the Hub is 'nobody-here/no-model': "):
            load_encoder("nobody-here/no-model")


class TestImageProcessors:
    """An image processor of any kind, saved beside the model, becomes ours."""

    CONFIG = HiddenStateBackboneConfig(vision_config=TINY_VIT)

    @pytest.mark.parametrize(
        ("stock", "size", "mean"),
        [
            (ViTImageProcessor(size={"height": 64, "width": 64}), (64, 64), [0.5] * 3),
            (CLIPImageProcessor(size={"shortest_edge": 70}, crop_size=64), (64, 64), list(OPENAI_CLIP_MEAN)),
            (ConvNextImageProcessor(size={"shortest_edge": 64}, image_mean=IMAGENET[0]), (64, 64), list(IMAGENET[0])),
            (ViTImageProcessor(size={"height": 32, "width": 64}, do_normalize=False), (32, 64), [0.0] * 3),
        ],
        ids=["vit", "clip", "convnext", "oblong"],
    )
    def test_of_stock(self, tmp_path, stock, size, mean):
        stock.save_pretrained(tmp_path)
        ours = encoder_image_processor(tmp_path, self.CONFIG)
        assert (ours.size.height, ours.size.width) == size and list(ours.image_mean) == mean
        assert ours.downsampling == [[16, "floor"]] and ours.resample == stock.resample
        assert ours.geometry == ("letterbox" if size[0] == size[1] else "letterbox_corner")
        picture = np.random.default_rng(0).integers(256, size=(*size, 3), dtype=np.uint8)
        expected = stock(picture, return_tensors="pt", do_resize=False).pixel_values
        assert torch.allclose(ours(picture, return_tensors="pt").pixel_values, expected, atol=1e-5)

    def test_of_ours_counts_the_tokens_of_the_tap(self, tmp_path):
        LlavaStyleImageProcessor(geometry="square_32", downsampling=[[4, "floor"]]).save_pretrained(tmp_path)
        ours = encoder_image_processor(tmp_path, self.CONFIG)
        assert ours.geometry == "square_32" and ours.downsampling == [[16, "floor"]]

    def test_missing(self, tmp_path):
        AutoModel.from_config(TINY_VIT).save_pretrained(tmp_path)
        with pytest.raises(OSError, match=r"holds no image processor that can be read, .*: save one beside the model"):
            encoder_image_processor(tmp_path, self.CONFIG)


class TestWhereWeightsAreNot:
    def test_unknown_name(self):
        with pytest.raises(ValueError, match=r"no encoder named 'vmamba_smal'; the nearest names are vmamba_small"):
            load_encoder("vmamba_smal")

    def test_release_files_must_be_converted(self):
        with pytest.raises(
            OSError, match=r"Download https://github\.com/MzeroMiko.*run `ssm-vlm convert DOWNLOAD --encoder vm"
        ):
            load_encoder("vmamba_tiny_s1l8.in1k_224")

    def test_own_encoders_must_be_trained(self):
        with pytest.raises(OSError, match=r"This project trains it: give weights_dir=FOLDER"):
            load_encoder("digit_vit.digitscenes_64")

    def test_no_network(self, monkeypatch):
        def offline(*_, **__):
            raise OSError("cannot reach the Hub\nmore")

        monkeypatch.setattr("ssm_vlm.modeling.encoder_loading.hf_hub_download", offline)
        with pytest.raises(
            OSError, match=r"\(cannot reach the Hub\)\. Download https://huggingface\.co/timm/vit_small"
        ):
            load_encoder("vit_small_patch16.augreg_in1k_224")

    def test_from_the_hub(self, table, monkeypatch):
        def download(repository, file):
            assert (repository, file) == ("nobody/vit", "model.safetensors")
            return str(FIXTURES / "vit_timm.weights.safetensors")

        monkeypatch.setattr("ssm_vlm.modeling.encoder_loading.hf_hub_download", download)
        config = partial(HiddenStateBackboneConfig, vision_config=TINY_VIT)
        name = table("tiny_vit.hub", config, WeightSource("timm_vit", hub_id="nobody/vit"))
        io = load_file(FIXTURES / "vit_timm.io.safetensors")
        for tap in ("block2", "block3"):
            features = load_encoder(name, tap=tap)(io["input.0"]).feature_maps[-1]
            assert (features - io[f"{tap}.0"]).abs().max() <= 1e-4 * io[f"{tap}.0"].abs().max()
        wrong = WeightSource("timm_vit", hub_id="nobody/vit", sha256="0" * 64)
        with pytest.raises(ValueError, match="is not the published file"):
            load_encoder(table("tiny_vit.other", config, wrong))

    def test_a_weights_dir_without_it(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="There is no saved encoder in .*swin_tiny.*Download https"):
            load_encoder("swin_tiny.in1k_224", weights_dir=tmp_path)


class CfgNode(dict):
    """Stands for a framework's own class in a pickle; reading must not make one."""

    made = 0

    def __setstate__(self, state):
        CfgNode.made += 1


class Runs:
    def __reduce__(self):
        return exec, ("import builtins; builtins.pickle_ran = True",)


class TestReading:
    def test_training_frameworks_leave_their_classes_in_files(self, tmp_path):
        node = CfgNode(rate=0.1)
        node.frozen = True
        torch.save({"model": {"w": torch.ones(2)}, "config": node}, tmp_path / "a.pth")
        CfgNode.made = 0
        assert read_state_dict(tmp_path / "a.pth").keys() == {"w"} and CfgNode.made == 0

    @pytest.mark.parametrize("length", [64, 6])
    def test_checksums(self, tmp_path, length):
        file = tmp_path / "a.safetensors"
        save_file({"w": torch.ones(2)}, file)
        right = hashlib.sha256(file.read_bytes()).hexdigest()[:length]
        assert read_state_dict(file, right.upper()).keys() == {"w"}
        wrong = "0" * length
        word = "is" if length == 64 else "begins with"
        message = (
            f"is not the published file, or its download is damaged: its SHA-256 is .* published file {word} {wrong}"
        )
        with pytest.raises(ValueError, match=message):
            read_state_dict(file, wrong)

    def test_numpy_archives(self, tmp_path):
        np.savez(tmp_path / "a.npz", **{"head/kernel": np.arange(6.0).reshape(2, 3)})
        (tensor,) = read_state_dict(tmp_path / "a.npz").values()
        assert tensor.tolist() == [[0, 1, 2], [3, 4, 5]]

    def test_numpy_archives_with_objects_are_refused(self, tmp_path):
        np.savez(tmp_path / "a.npz", w=np.array([Runs()], dtype=object))
        with pytest.raises(ValueError, match="not a file of numpy arrays that can be read safely"):
            read_state_dict(tmp_path / "a.npz")
        assert not hasattr(builtins, "pickle_ran")

    def test_pickled_arrays(self, tmp_path):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": {"w": np.ones(3, np.float32)}, "__author__": "x"}))
        assert read_state_dict(tmp_path / "a.pkl")["w"].tolist() == [1, 1, 1]

    @pytest.mark.parametrize("suffix", ["pkl", "pth", "bin", "tar"])
    @pytest.mark.parametrize("protocol", [0, 2, 5])
    def test_a_bare_pickle_runs_nothing_whatever_its_suffix(self, tmp_path, suffix, protocol):
        (tmp_path / f"a.{suffix}").write_bytes(pickle.dumps({"model": {"w": Runs()}}, protocol))
        with pytest.raises(ValueError, match="read safely"):
            read_state_dict(tmp_path / f"a.{suffix}")
        assert not hasattr(builtins, "pickle_ran")

    @pytest.mark.parametrize("zip_format", [True, False])
    def test_code_in_the_place_of_weights_does_not_run(self, tmp_path, zip_format):
        torch.save({"model": {"w": Runs()}}, tmp_path / "a.pth", _use_new_zipfile_serialization=zip_format)
        with pytest.raises(ValueError, match="read safely|holds no state dict"):
            read_state_dict(tmp_path / "a.pth")
        assert not hasattr(builtins, "pickle_ran")

    def test_the_format_before_torch_1_6(self, tmp_path):
        torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
        assert read_state_dict(tmp_path / "a.pth")["w"].tolist() == [1, 1]

    def test_shards_of_a_repository(self, tmp_path):
        for index in range(2):
            save_file({f"w{index}": torch.full((2,), float(index))}, tmp_path / f"model-{index}.safetensors")
        weight_map = {f"w{index}": f"model-{index}.safetensors" for index in range(2)}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        assert read_state_dict(tmp_path).keys() == {"w0", "w1"}
        for content, message in (
            ("{}", "is no index of shards"),
            ("{", "is no index"),
            (None, "outside its own folder"),
        ):
            text = content or json.dumps({"weight_map": {"w": "../model.safetensors"}})
            (tmp_path / "model.safetensors.index.json").write_text(text)
            with pytest.raises(ValueError, match=message):
                read_state_dict(tmp_path)
        (tmp_path / "empty").mkdir()
        with pytest.raises(FileNotFoundError, match="empty' holds no checkpoint file: expected model.safetensors, "):
            read_state_dict(tmp_path / "empty")

    def test_the_code_would_run_elsewhere(self):
        """The twin of the tests below."""
        pickle.loads(pickle.dumps(Runs()))
        assert builtins.pickle_ran
        del builtins.pickle_ran

    def test_code_in_a_pickle_does_not_run(self, tmp_path):
        torch.save({"model": {"w": torch.ones(2)}, "config": Runs()}, tmp_path / "a.pth")
        read_state_dict(tmp_path / "a.pth")
        assert not hasattr(builtins, "pickle_ran")

    @pytest.mark.parametrize("contents", [[torch.ones(1)], {}, {"epoch": 3}])
    def test_files_without_a_state_dict(self, tmp_path, contents):
        torch.save(contents, tmp_path / "a.pth")
        with pytest.raises(ValueError, match="holds no state dict: expected a dict of tensors"):
            read_state_dict(tmp_path / "a.pth")

    @pytest.mark.parametrize(
        ("suffix", "message"), [("pth", "can be read safely"), ("safetensors", "not a safetensors")]
    )
    def test_garbage(self, tmp_path, suffix, message):
        (tmp_path / f"a.{suffix}").write_bytes(b"not a checkpoint at all")
        with pytest.raises(ValueError, match=message):
            read_state_dict(tmp_path / f"a.{suffix}")


def test_image_processor_arguments():
    arguments = image_processor_arguments("vmamba_small_s2l15.coco_maskrcnn_1x")
    assert arguments["size"] == {"height": 800, "width": 1333} and arguments["geometry"] == "letterbox_corner"
    assert arguments["downsampling"] == [[2, "ceil"]] * 4
