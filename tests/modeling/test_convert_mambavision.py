"""MambaVision's published files: every spelling of their keys, every published size, and files that are refused."""

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from ssm_vlm import MambaVisionBackbone, MambaVisionConfig, MambaVisionForImageClassification, MambaVisionModel
from ssm_vlm.configuration.encoder_entry import IMAGENET, NamedEncoder, Preprocessing, WeightSource
from ssm_vlm.configuration.mambavision_encoders import MAMBAVISION_ENCODERS
from ssm_vlm.configuration.named_encoders import ENCODERS
from ssm_vlm.configuration.taps import tapped_config
from ssm_vlm.modeling import convert_mambavision
from ssm_vlm.modeling.convert_mambavision import MAMBAVISION_LAYOUT
from ssm_vlm.modeling.encoder_conversion import convert_published
from ssm_vlm.modeling.encoder_loading import load_encoder
from ssm_vlm.modeling.published_weights import read_published

FIXTURES = Path(__file__).parents[1] / "fixtures"
CASE = "mambavision_layer_scale"


def weights():
    return load_file(FIXTURES / f"{CASE}.weights.safetensors")


def outputs():
    return load_file(FIXTURES / f"{CASE}.io.safetensors")


def published_shapes(stem, width, depths, layer_scale, labels=1000):
    """Names and shapes of a published file, written down from the paper's description and the golden files."""

    def norm(name, size, batch=False):
        yield from ((f"{name}.{kind}", [size]) for kind in ("weight", "bias"))
        if batch:
            yield from ((f"{name}.{kind}", [size]) for kind in ("running_mean", "running_var"))
            yield f"{name}.num_batches_tracked", []

    def linear(name, out, into, bias=True):
        yield f"{name}.weight", [out, into]
        if bias:
            yield f"{name}.bias", [out]

    def block(name, size, mixer):
        yield from norm(f"{name}.norm1", size)
        yield from norm(f"{name}.norm2", size)
        if layer_scale:
            yield from ((f"{name}.gamma_{index}", [size]) for index in (1, 2))
        yield from linear(f"{name}.mlp.fc1", 4 * size, size)
        yield from linear(f"{name}.mlp.fc2", size, 4 * size)
        name, half, rank = f"{name}.mixer", size // 2, -(-size // 16)
        if not mixer:
            yield from linear(f"{name}.qkv", 3 * size, size)
            yield from linear(f"{name}.proj", size, size)
            return
        yield from linear(f"{name}.in_proj", size, size, bias=False)
        yield from ((f"{name}.conv1d_{branch}.weight", [half, 1, 3]) for branch in "xz")
        yield from linear(f"{name}.x_proj", rank + 16, half, bias=False)
        yield from linear(f"{name}.dt_proj", half, rank)
        yield f"{name}.A_log", [half, 8]
        yield f"{name}.D", [half]
        yield from linear(f"{name}.out_proj", size, size, bias=False)

    yield "patch_embed.conv_down.0.weight", [stem, 3, 3, 3]
    yield from norm("patch_embed.conv_down.1", stem, batch=True)
    yield "patch_embed.conv_down.3.weight", [width, stem, 3, 3]
    yield from norm("patch_embed.conv_down.4", width, batch=True)
    for level, depth in enumerate(depths):
        size = width * 2**level
        for index in range(depth):
            name = f"levels.{level}.blocks.{index}"
            if level > 1:
                yield from block(name, size, mixer=index < (depth + 1) // 2)
                continue
            for number in (1, 2):
                yield f"{name}.conv{number}.weight", [size, size, 3, 3]
                yield f"{name}.conv{number}.bias", [size]
                yield from norm(f"{name}.norm{number}", size, batch=True)
        if level < 3:
            yield f"levels.{level}.downsample.reduction.0.weight", [2 * size, size, 3, 3]
    yield from norm("norm", size, batch=True)
    yield from linear("head", labels, size)


def published_file(*sizes):
    return {name: torch.empty(shape, device="meta") for name, shape in published_shapes(*sizes)}


SIZES = {  # stem, width, depths, LayerScale, millions of parameters as published
    "tiny": (32, 80, [1, 3, 8, 4], False, 31.8),
    "tiny2": (32, 80, [1, 3, 11, 4], False, 35.1),
    "small": (64, 96, [3, 3, 7, 5], False, 50.1),
    "base": (64, 128, [3, 3, 10, 5], True, 97.7),
    "large": (64, 196, [3, 3, 10, 5], True, 227.9),
    "large2": (64, 196, [3, 3, 12, 5], True, 241.5),
    "large3": (64, 256, [3, 3, 20, 10], True, 739.6),
}


@pytest.mark.parametrize("variant", SIZES)
def test_whole_models_have_their_published_size(variant):
    """And what a published file holds is what our whole model holds, tensor by tensor."""
    *sizes, millions = SIZES[variant]
    file = published_file(*sizes)
    model_class, config = MAMBAVISION_LAYOUT.infer(file)
    assert model_class is MambaVisionForImageClassification and config.num_labels == 1000
    with torch.device("meta"):
        model = model_class(config)
    converted = MAMBAVISION_LAYOUT.convert(file, config)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.065)  # some are cut off
    entries = [entry for entry in MAMBAVISION_ENCODERS if entry.name.startswith(f"mambavision_{variant}.")]
    for entry in entries:
        expected = entry.config()
        inferred = tapped_config(config, expected.out_features[-1]).to_dict()
        for field in MAMBAVISION_LAYOUT.unseen if expected.image_size != 224 else ():
            inferred[field] = getattr(expected, field)
        assert inferred == {**expected.to_dict(), "drop_path_rate": 0.0}
    assert entries


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "encoder.", "module.encoder."])
@pytest.mark.parametrize("form", ["model.safetensors", "mambavision.pth.tar"])
def test_every_spelling_gives_the_same_model(form, prefix, tmp_path):
    source = {prefix + key: tensor for key, tensor in weights().items()}
    if form.endswith(".tar"):
        torch.save({"epoch": 299, "arch": "x", "state_dict": source, "metric": 0.5}, tmp_path / form)
    else:
        save_file(source, tmp_path / form)
    published = read_published(tmp_path / form)
    assert published.layout == "mambavision" and published.discarded == []
    expected = MAMBAVISION_LAYOUT.convert(weights(), published.config)
    assert published.tensors.keys() == expected.keys()
    assert all(torch.equal(published.tensors[key], expected[key]) for key in expected)


@pytest.fixture
def toy_name(monkeypatch):
    """The file of the fixture as a named encoder, with the heads and windows that no shape shows."""
    made_with = json.loads((FIXTURES / f"{CASE}.json").read_text())["constructor"]
    _, config = MAMBAVISION_LAYOUT.infer(weights())
    fields = {key: value for key, value in config.to_dict().items() if key not in ("out_indices", "stage_names")}
    fields |= {"num_attention_heads": made_with["num_heads"][2:], "window_sizes": made_with["window_size"][2:]}
    entry = NamedEncoder(
        "toy_mambavision.test",
        lambda: tapped_config(MambaVisionConfig(**fields), "stage3"),
        Preprocessing(64, 64, *IMAGENET),
        1,
        1,
        "MIT",
        WeightSource("mambavision", url="https://example.org/x.pth.tar"),
    )
    monkeypatch.setitem(ENCODERS, entry.name, entry)
    return entry.name


@torch.no_grad()
def test_converted_folder_gives_the_published_outputs(toy_name, tmp_path):
    """Whole, as classifier and as sequence model; tapped, at every published level."""
    torch.save({"state_dict": weights()}, tmp_path / "x.pth.tar")
    folder = convert_published(tmp_path / "x.pth.tar", tmp_path / toy_name, toy_name).folder
    io = outputs()
    pixels, logits = io["input.1"], io["logits.1"]
    classifier = AutoModelForImageClassification.from_pretrained(folder)
    assert isinstance(classifier, MambaVisionForImageClassification) and not classifier.training
    assert torch.allclose(classifier(pixels).logits, logits, atol=1e-4 * logits.abs().max())
    assert isinstance(AutoModel.from_pretrained(folder), MambaVisionModel)
    assert MambaVisionBackbone.from_pretrained(folder).out_features == ["stage4"]
    for level, tap in enumerate(["stage1_downsampled", "stage2_downsampled", "stage3_downsampled"]):
        expected = io[f"level{level}.1"]
        for name, where in ((str(folder), None), (toy_name, tmp_path)):
            backbone = load_encoder(name, tap=tap, weights_dir=where)
            features = backbone(pixels).feature_maps[-1]
            assert torch.allclose(features, expected, atol=1e-4 * expected.abs().max())
            assert not any(key.startswith(("norm.", "stages.3.")) for key in backbone.state_dict())
    assert load_encoder(folder).out_features == ["stage3"]
    assert load_encoder(toy_name, weights_dir=tmp_path).out_features == ["stage3"]


def test_without_a_name_heads_and_windows_are_those_of_the_published_sizes(caplog):
    """And for a width that was never published a warning says so."""
    with caplog.at_level(logging.WARNING, logger=convert_mambavision.logger.name):
        config = MAMBAVISION_LAYOUT.infer(weights())[1]
        assert config.num_attention_heads == [8, 16] and config.window_sizes == [14, 7]
        (message,) = caplog.messages
        assert "first width of 8," in message and "num_attention_heads=[8, 16]" in message
        MAMBAVISION_LAYOUT.infer(
            {key: torch.empty(shape) for key, shape in published_shapes(32, 80, [1, 1, 1, 1], False)}
        )
        assert len(caplog.messages) == 1
    odd = MAMBAVISION_LAYOUT.infer(
        {key: torch.empty(shape) for key, shape in published_shapes(4, 7, [1, 1, 2, 2], False)}
    )
    assert odd[1].num_attention_heads == [4, 8]


def test_file_without_classifier_becomes_a_backbone_of_all_stages(toy_name, tmp_path):
    save_file({k: v for k, v in weights().items() if not k.startswith("head.")}, tmp_path / "model.safetensors")
    folder = convert_published(tmp_path / "model.safetensors", tmp_path / "out", toy_name).folder
    assert AutoConfig.from_pretrained(folder).architectures == ["MambaVisionBackbone"]
    assert MambaVisionBackbone.from_pretrained(folder).out_features[-1] == "stage4"
    assert load_encoder(folder).out_features == ["stage3"]


def test_file_without_counts_of_batches_is_complete(tmp_path):
    save_file(
        {k: v for k, v in weights().items() if not k.endswith("num_batches_tracked")}, tmp_path / "model.safetensors"
    )
    model = read_published(tmp_path / "model.safetensors").model()
    assert model.model.stem.norm1.num_batches_tracked == 0


REFUSED = {
    "a missing tensor": (
        lambda file: file.pop("levels.2.blocks.0.mixer.D"),
        r"lacks model\.stages\.2\.blocks\.0\.mixer\.d\.",
    ),
    "an unknown tensor": (
        lambda file: file.update({"levels.2.blocks.0.mixer.E": torch.ones(1)}),
        r"has undeclared levels\.2\.blocks\.0\.mixer\.E\.",
    ),
    "another shape": (
        lambda file: file.update({"levels.3.blocks.0.mlp.fc1.weight": torch.ones(7, 64)}),
        r"another shape for model\.stages\.3\.blocks\.0\.mlp\.fc1\.weight \(7, 64\) instead of \(128, 64\)",
    ),
    "half of it": (
        lambda file: [file.pop(key) for key in list(file) if key.startswith("levels.3")],
        r"looks like 'mambavision' but cannot be read as that: .*it lacks levels\.3\.blocks\.0\.norm1\.weight",
    ),
    "attention where a mixer belongs": (
        lambda file: [
            file.update({key.replace("blocks.2", "blocks.0"): file.pop(key)})
            for key in list(file)
            if key.startswith("levels.2.blocks.2.mixer")
        ],
        r"lacks model\.stages\.2\.blocks\.2\.mixer",
    ),
}


@pytest.mark.parametrize("broken, message", REFUSED.values(), ids=REFUSED)
def test_wrong_file_is_refused(broken, message, tmp_path):
    file = weights()
    broken(file)
    save_file(file, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        read_published(tmp_path / "model.safetensors")


def test_other_variant_is_refused(tmp_path):
    save_file(weights(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"stages\.0\.blocks\.0.* instead of .*80"):
        convert_published(tmp_path / "model.safetensors", tmp_path / "out", "mambavision_tiny.in1k_224")


def test_nvidias_own_folder_is_told_apart(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mambavision", "dim": 80, "in_dim": 32}')
    with pytest.raises(
        ValueError, match=r"NVIDIA's own MambaVision code.* the file and not the folder, or name the encoder"
    ):
        load_encoder(tmp_path)


def test_entries_differ_in_their_tap_alone():
    for true, before in zip(MAMBAVISION_ENCODERS[::2], MAMBAVISION_ENCODERS[1::2], strict=True):
        assert before.name == f"{true.name}_before_mixers"
        ours, theirs = true.config().to_dict(), before.config().to_dict()
        assert {key for key in ours if ours[key] != theirs[key]} == {"out_features", "out_indices"}
        same = {"name", "config", "parameters", "flops"}
        for field in dataclasses.fields(true):
            assert field.name in same or getattr(true, field.name) == getattr(before, field.name)


@pytest.mark.parametrize("entry", MAMBAVISION_ENCODERS, ids=lambda entry: entry.name)
def test_taps_are_what_their_names_say(entry):
    """Both give 16 pixels per position and four times the first width; only one has mixers and attention before it."""
    config = entry.config()
    size = entry.preprocessing.height
    with torch.device("meta"):
        backbone = MambaVisionBackbone(config)
        features = backbone(torch.empty(1, 3, size, size)).feature_maps[-1]
    assert features.shape == (1, 4 * config.hidden_sizes[0], size // 16, size // 16)
    kinds = {type(module).__name__ for module in backbone.modules()}
    assert {"MambaVisionMixer", "MambaVisionAttention"} <= kinds or entry.name.endswith("_before_mixers")
    assert not {"MambaVisionMixer", "MambaVisionAttention", "MambaVisionWindowStage"} & kinds or "stage3" in (
        config.out_features
    )
    assert [side * 16 * 2**index for index, side in enumerate(config.window_sizes)] == [size, size]
