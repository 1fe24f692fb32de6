"""Loading by name: strict keys, declared discards, folders, safe reading of pickles, and the answers to bad input."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    ConvNextBackbone,
    ConvNextConfig,
    SwinConfig,
    ViTConfig,
)

from ssm_vlm.configuration.configuration_hidden_state_backbone import HiddenStateBackboneConfig
from ssm_vlm.configuration.configuration_ssm_vision import SSMVisionConfig
from ssm_vlm.configuration.encoder_entry import IMAGENET, NamedEncoder, Preprocessing, WeightSource
from ssm_vlm.configuration.named_encoders import ENCODERS
from ssm_vlm.modeling.checkpoint_files import read_state_dict
from ssm_vlm.modeling.encoder_loading import convert_encoder, image_processor_arguments, load_encoder

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
TIMM = WeightSource(
    "timm_vit",
    url="https://example.org/vit.pth",
    discards=(r"blocks\.2\.", r"norm\.", r"head\."),
)


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
            discards = (r"layers\.3\.", r"layers\.2\.downsample\.", r"outnorm[013]\.", r"rpn_head\.")
        else:
            contents = {"model": state_dict, "epoch": 3}
            discards = (r"layers\.3\.", r"layers\.2\.downsample\.", r"(classifier\.)?(norm|head)\.")
        torch.save(contents, tmp_path / "file.pth")
        config = partial(tiny_vmamba_config, output_norm="layernorm" if dense else "none")
        name = table("vmamba_tiny.golden", config, WeightSource("vmamba", url="https://x", discards=discards))
        convert_encoder(name, tmp_path / "file.pth", tmp_path / "weights")
        encoder = load_encoder(name, weights_dir=tmp_path / "weights")
        assert sum("blocks.0.norm1.weight" in key for key in encoder.state_dict()) == 3
        if dense:
            io = load_file(FIXTURES / f"{case}.io.safetensors")
            features = encoder(io["input.0"]).feature_maps[-1]
            assert (features - io["stage3.0"]).abs().max() <= 1e-4 * io["stage3.0"].abs().max()

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
            r"lacks vision_model\.layers\.0\.layernorm_before\.bias; it has another shape for "
            r"vision_model\.embeddings\.cls_token \(1, 1, 31\) instead of \(1, 1, 32\)"
        )
        with pytest.raises(ValueError, match=message):
            convert_encoder(tiny_vit, tmp_path / "file.safetensors", tmp_path / "out")

    def test_a_declared_discard_that_meets_nothing_is_named(self, tiny_vit, tmp_path):
        weights = load_file(FIXTURES / "vit_timm.weights.safetensors")
        save_file({k: v for k, v in weights.items() if not k.startswith("blocks.2")}, tmp_path / "file.safetensors")
        with pytest.raises(ValueError, match=r"holds no key like blocks\\.2\\., which 'tiny_vit.golden' declares"):
            convert_encoder(tiny_vit, tmp_path / "file.safetensors", tmp_path / "out")

    def test_a_failed_conversion_keeps_the_old_folder(self, tiny_vit, tmp_path):
        convert_encoder(tiny_vit, FIXTURES / "vit_timm.weights.safetensors", tmp_path)
        with pytest.raises(FileNotFoundError, match="no checkpoint file"):
            convert_encoder(tiny_vit, tmp_path / "gone.pth", tmp_path)
        load_encoder(tiny_vit, weights_dir=tmp_path)

    def test_converting_again_replaces_the_folder(self, tiny_vit, tmp_path):
        (tmp_path / tiny_vit).mkdir()
        (tmp_path / tiny_vit / "old.txt").write_text("old")
        convert_encoder(tiny_vit, FIXTURES / "vit_timm.weights.safetensors", tmp_path)
        assert not (tmp_path / tiny_vit / "old.txt").exists()

    def test_own_encoders_have_nothing_to_convert(self, tmp_path):
        with pytest.raises(ValueError, match="has no published weights: this project trains it"):
            convert_encoder("digit_vit.digitscenes_64", tmp_path / "x.pth", tmp_path)


class TestStockLayout:
    """The layouts of Transformers: a folder in the Hub's form, whatever head it has."""

    @staticmethod
    def entry(table, *more_discards, **changes):
        stock = ViTConfig(**(TINY_VIT.to_dict() | changes))
        discards = (r"layers\.2\.", r"layernorm\.", *more_discards)
        weights = WeightSource("stock", hub_id="nobody/vit", discards=discards)
        return table("stock_vit.test", lambda: HiddenStateBackboneConfig(vision_config=stock), weights)

    @pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForImageClassification])
    def test_features_are_those_of_the_whole_model(self, table, tmp_path, auto_class):
        name = self.entry(table, r"pooler\." if auto_class is AutoModel else r"classifier\.", r"pooler\.")
        stock = auto_class.from_config(TINY_VIT).eval()
        stock.save_pretrained(tmp_path / "hub")
        convert_encoder(name, tmp_path / "hub", tmp_path / "out")
        pixels = torch.randn(1, 3, 64, 64)
        tokens = stock(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        features = load_encoder(name, weights_dir=tmp_path / "out")(pixels).feature_maps[-1]
        assert torch.equal(features, tokens.transpose(1, 2).reshape(1, 32, 4, 4))

    def test_an_undeclared_head_is_named(self, table, tmp_path):
        name = self.entry(table, r"pooler\.")
        AutoModelForImageClassification.from_config(TINY_VIT).save_pretrained(tmp_path / "hub")
        with pytest.raises(ValueError, match=r"has undeclared vision_model\.classifier\.bias"):
            convert_encoder(name, tmp_path / "hub", tmp_path / "out")

    def test_what_no_shape_shows_is_compared(self, table, tmp_path):
        name = self.entry(table, num_attention_heads=4)
        AutoModel.from_config(TINY_VIT).save_pretrained(tmp_path / "hub")
        with pytest.raises(ValueError, match="another architecture: num_attention_heads 2 instead of 4"):
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
        AutoModel.from_config(TINY_VIT).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="holds a 'vit' model, which is not a Backbone"):
            load_encoder(tmp_path)

    def test_a_folder_with_a_key_too_few(self, tmp_path):
        load_encoder("digit_dwconv.digitscenes_64", pretrained=False).save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        del weights["stem.norm1.bias"]
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"does not fit: it lacks stem\.norm1\.bias"):
            load_encoder(tmp_path)


class TestWhereWeightsAreNot:
    def test_unknown_name(self):
        with pytest.raises(ValueError, match=r"no encoder named 'vmamba_smal'; the nearest names are vmamba_small"):
            load_encoder("vmamba_smal")

    def test_release_files_must_be_converted(self):
        with pytest.raises(OSError, match=r"Download https://github\.com/MzeroMiko.*run convert_encoder\('vmamba_tiny"):
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

    def test_code_in_a_pickle_does_not_run(self, tmp_path):
        import builtins

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
