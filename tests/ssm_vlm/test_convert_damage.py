"""`ssm-vlm convert` and sources that are damaged, unsafe or something else: one sentence, and nothing is left."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from ssm_vlm import cli

FIXTURES = Path(__file__).parent.parent / "fixtures"
FAMILIES = {
    "vmamba": "vmamba_v2_ratio2",
    "vmamba_v0": "vmamba_v0",
    "timm_vit": "vit_timm",
    "deit3": "vit_deit3",
    "swin": "swin_timm",
    "swin of a detector": "swin_release",
    "convnext": "convnext_timm",
    "convnextv2": "convnextv2_timm",
    "timm_maxvit": "maxvit_tf",
    "mambavision": "mambavision",
    "vitdet": "vitdet",
    "vit_adapter": "vit_adapter",
}
PREFIXES = {"vitdet": "backbone.net.", "vit_adapter": "backbone."}
PYTHONS_OWN = re.compile(
    r"tuple index|max\(\)|empty sequence|unpack|zip\(|Errno|Error\(|list index|not subscriptable|math domain|NoneType"
    r"|size of tensor|shape '|division|Traceback|KeyError|has no attribute"
)


def mm_names(tensors):
    """Names and shapes of Microsoft's Swin as in a file of mmdetection."""
    named = {"backbone.norm3." + key.removeprefix("norm."): t for key, t in tensors.items() if key.startswith("norm.")}
    for key, tensor in tensors.items():
        if not key.startswith(("norm.", "head.")):
            key = key.replace(".proj.", ".projection.") if key.startswith("patch_embed.") else key
            key = key.replace("layers.", "stages.").replace("attn.", "attn.w_msa.")
            key = key.replace("mlp.fc1", "ffn.layers.0.0").replace("mlp.fc2", "ffn.layers.1")
            named["backbone." + key] = tensor
    return named


def weights_of(family):
    tensors = load_file(FIXTURES / f"{FAMILIES[family]}.weights.safetensors")
    if family == "swin of a detector":
        return mm_names(tensors)
    return {PREFIXES.get(family, "") + key: tensor for key, tensor in tensors.items()}


def _last_weight(tensors):
    """A tensor that no layout leaves out."""
    return next(key for key in reversed(tensors) if key.endswith("weight") and tensors[key].is_floating_point())


def _some_with(number):
    def change(tensors):
        key = _last_weight(tensors)
        spoilt = tensors[key].clone()
        spoilt.view(-1)[-1] = number
        return tensors | {key: spoilt}

    return change


DAMAGES = {
    "first half": lambda t: dict(list(t.items())[: len(t) // 2]),
    "second half": lambda t: dict(list(t.items())[len(t) // 2 :]),
    "every seventh gone": lambda t: {k: v for i, (k, v) in enumerate(t.items()) if i % 7 != 3},
    "block 0 gone": lambda t: {k: v for k, v in t.items() if not re.search(r"(blocks|stages\.0)\.0\.", k)},
    "flat": lambda t: {k: v.flatten() for k, v in t.items()},
    "no dimensions": lambda t: {k: v.flatten()[0] for k, v in t.items()},
    "empty": lambda t: {k: v[:0] if v.dim() else v for k, v in t.items()},
    "a row short": lambda t: {k: v[:-1].contiguous() if v.dim() > 1 else v for k, v in t.items()},
    "whole numbers": lambda t: t | {_last_weight(t): t[_last_weight(t)].to(torch.int64)},
    "NaN": _some_with(float("nan")),
    "infinity": _some_with(float("inf")),
    "one too many": lambda t: t | {next(iter(t)).rpartition(".")[0] + ".unheard_of": torch.ones(2)},
}


@pytest.fixture
def refused(tmp_path, capsys):
    """Converts, and returns the one sentence that refuses it."""

    def run(source, *options):
        (tmp_path / "out").mkdir(exist_ok=True)
        status = cli.main(["convert", str(source), "--output", str(tmp_path / "out/made"), *options])
        lines = capsys.readouterr().err.splitlines()
        told = [line for line in lines if line.startswith("error: ")]
        assert status == 1 and len(told) == 1 and lines[-1] == told[0], (status, lines)
        assert not PYTHONS_OWN.search(told[0]), told[0]
        assert not any((tmp_path / "out").iterdir())
        return told[0]

    return run


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_damaged_tensors(family, damage, refused, tmp_path):
    tensors = DAMAGES[damage](weights_of(family))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "file.safetensors")
    told = refused(tmp_path / "file.safetensors")
    assert "file.safetensors" in told
    if damage in ("NaN", "infinity") and "timm is not installed" not in told:
        assert "NaN or infinity is in " in told and ".weight" in told


@pytest.mark.parametrize("form", ["safetensors", "zip", "before torch 1.6"])
@pytest.mark.parametrize("family", FAMILIES)
def test_files_that_are_cut_off(family, form, refused, tmp_path):
    file = tmp_path / ("file.safetensors" if form == "safetensors" else "file.pth")
    if form == "safetensors":
        save_file(weights_of(family), file)
    else:
        torch.save({"model": weights_of(family)}, file, _use_new_zipfile_serialization=form == "zip")
    whole = file.read_bytes()
    for size in (0, 3, 5000, len(whole) // 2, len(whole) - 10):
        file.write_bytes(whole[:size])
        assert str(file) in refused(file)


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".npz", ".safetensors", ".bin", ""])
@pytest.mark.parametrize(
    "text", ["hello", "<!DOCTYPE html><html>", "PK\x03\x04junk", "version https://git-lfs.github.com"]
)
def test_files_that_are_something_else(refused, tmp_path, suffix, text):
    file = tmp_path / f"file{suffix}"
    file.write_text(text)
    assert str(file) in refused(file)


INDEXES = {
    "no map": ("{}", "has no weight_map"),
    "no JSON": ("nonsense", "has no weight_map"),
    "a list": ("[]", "has no weight_map"),
    "outside": ('{"weight_map": {"a": "../../secret.safetensors"}}', "outside its own folder or is no file of weights"),
    "above": ('{"weight_map": {"a": ".."}}', "outside its own folder or is no file of weights"),
    "itself": (
        '{"weight_map": {"a": "model.safetensors.index.json"}}',
        "outside its own folder or is no file of weights",
    ),
    "a number": ('{"weight_map": {"a": 5}}', "outside its own folder or is no file of weights"),
    "gone": ('{"weight_map": {"a": "gone.safetensors"}}', ""),
}


@pytest.mark.parametrize("config", [None, {"model_type": "vit"}])
@pytest.mark.parametrize("case", INDEXES)
def test_indexes(case, config, refused, tmp_path):
    text, message = INDEXES[case]
    (tmp_path / "a/source").mkdir(parents=True)
    (tmp_path / "a/source/model.safetensors.index.json").write_text(text)
    if config:
        (tmp_path / "a/source/config.json").write_text(json.dumps(config))
    save_file(weights_of("timm_vit"), tmp_path / "secret.safetensors")
    assert message in refused(tmp_path / "a/source")


CONFIGS = {
    "no JSON": ("{", "is not JSON"),
    "a list": ("[]", "no checkpoint file"),
    "a number": ("5", "no checkpoint file"),
    "unknown": ('{"model_type": "unheard_of"}', "No model can be read from the folder"),
    "words for numbers": ('{"model_type": "vit", "hidden_size": "wide"}', "No model can be read from the folder"),
    "text": (json.dumps(BertConfig().to_dict()), "holds no vision encoder that can be used: A 'bert' model"),
    "no weights": (json.dumps(ViTConfig().to_dict()), "The weights in"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_folders_in_transformers_format(case, refused, tmp_path):
    text, message = CONFIGS[case]
    (tmp_path / "source").mkdir()
    (tmp_path / "source/config.json").write_text(text)
    assert message in refused(tmp_path / "source")


def small_vit(folder):
    config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=32)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor().save_pretrained(folder)
    return folder / "model.safetensors"


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("form", ["safetensors", "shards", "bin"])
def test_whole_numbers_in_transformers_format(form, dtype, refused, tmp_path):
    """Transformers would cast them without a word."""
    file = small_vit(tmp_path / "source")
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("k_proj.weight") or key.endswith("key.weight"))
    tensors |= {key: tensors[key].to(dtype)}
    if form == "bin":
        file.unlink()
        torch.save(tensors, file.with_name("pytorch_model.bin"))
    elif form == "shards":
        file.rename(file.with_name("model-1.safetensors"))
        save_file(tensors, file.with_name("model-1.safetensors"), metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-1.safetensors")}
        file.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(tensors, file, metadata={"format": "pt"})
    told = refused(tmp_path / "source")
    assert f"it has another type for {key} {dtype} instead of torch.float32" in told


def test_buffers_of_whole_numbers_are_no_damage(tmp_path):
    """Checkpoints of older versions hold them beside their weights, and so do those with batch norm."""
    config = CLIPVisionConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16
    )
    CLIPVisionModel(config).save_pretrained(tmp_path / "clip")
    CLIPImageProcessor().save_pretrained(tmp_path / "clip")
    file = tmp_path / "clip/model.safetensors"
    key = "vision_model.embeddings.position_ids"
    save_file(load_file(file) | {key: torch.arange(5)[None]}, file, metadata={"format": "pt"})
    assert cli.main(["convert", str(tmp_path / "clip"), "--output", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("damage", ["cut off", "NaN", "every seventh gone"])
def test_weights_in_transformers_format(damage, refused, tmp_path):
    file = small_vit(tmp_path / "source")
    if damage == "cut off":
        file.write_bytes(file.read_bytes()[:5000])
    else:
        save_file(DAMAGES[damage](load_file(file)), file, metadata={"format": "pt"})
    assert "source" in refused(tmp_path / "source")


@pytest.mark.parametrize("repository", ["a/b/c/d", "bad name!", ""])
def test_a_repository_that_cannot_be(repository, refused):
    refused(FIXTURES / "vit_timm.weights.safetensors", "--push", repository)


def test_arrays_of_anything_are_refused(refused, tmp_path):
    np.savez(tmp_path / "file.npz", **{"embedding/kernel": np.array(["text"])})
    refused(tmp_path / "file.npz")


def test_a_picture_that_is_no_square_is_not_taken_for_deit3(refused, tmp_path):
    tensors = weights_of("timm_vit")
    tensors["pos_embed"] = torch.zeros(1, 9, tensors["pos_embed"].shape[2])  # 2x4 patches and the class token
    save_file(tensors, tmp_path / "file.safetensors")
    assert "pos_embed has 9 positions, which is no square of patches" in refused(tmp_path / "file.safetensors")


def test_an_encoder_beside_heads(refused, tmp_path):
    tensors = {f"backbone.{key}": tensor for key, tensor in weights_of("swin").items()}
    save_file(tensors | {"decode_head.weight": torch.ones(1)}, tmp_path / "file.safetensors")
    assert "in the layout 'swin' under 'backbone.', but 1 others" in refused(tmp_path / "file.safetensors")
