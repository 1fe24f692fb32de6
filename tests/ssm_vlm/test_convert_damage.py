"""`ssm-vlm convert` and sources that are damaged, unsafe or something else: one sentence, and nothing is left."""

import builtins
import json
import re
import zipfile
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


def _a_block(tensors):
    return next(key for key in tensors if "blocks." in key or "levels." in key)


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
    "8 bits": lambda t: t | {_last_weight(t): t[_last_weight(t)].to(torch.float8_e4m3fn)},
    "counted too far": lambda t: t | {re.sub(r"\.\d+\.", ".99999999.", _a_block(t)): torch.ones(1)},
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


def rezipped(file, change):
    """A torch file as somebody else packs it: `change` of name and bytes gives what is written in its place."""
    torch.save({"model": weights_of("timm_vit")}, file.with_name("whole.pth"))
    with zipfile.ZipFile(file.with_name("whole.pth")) as whole, zipfile.ZipFile(file, "w") as packed:
        for member in whole.infolist():
            for contents, how in change(member.filename, whole.read(member)):
                packed.writestr(member.filename, contents, how)
    return file


STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
ZIPS = {
    "less than claimed": (
        lambda name, data: [(data[:4] if name.endswith("data/3") else data, STORED)],
        "its tensors claim more numbers than it holds",
    ),
    "twice": (
        lambda name, data: [(data, STORED)] * (1 + name.endswith("data/3")),
        "it holds whole/data/3 twice",
    ),
    "lost": (lambda name, data: [] if name.endswith("data/3") else [(data, STORED)], "data/3: file not found."),
    "compressed": (lambda name, data: [(data, DEFLATED)], "is not a checkpoint that can be read safely"),
    "a bomb": (
        lambda name, data: [(bytes(10**8) if name.endswith("data/3") else data, DEFLATED)],
        "it would grow to more than 100 times its size",
    ),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", ZIPS)
def test_zip_files_that_are_not_as_torch_writes_them(case, refused, tmp_path):
    change, message = ZIPS[case]
    assert message in refused(rezipped(tmp_path / "file.pth", change))


def test_a_file_that_was_only_packed_again_is_read(tmp_path):
    """The twin of the test above."""
    file = rezipped(tmp_path / "file.pth", lambda name, data: [(data, STORED)])
    assert cli.main(["convert", str(file), "--output", str(tmp_path / "out")]) == 0
    converted = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(converted["vit.embeddings.cls_token"], weights_of("timm_vit")["cls_token"])


TENSORS = {
    "expanded": (
        lambda t: t | {"pos_embed": torch.zeros(1).expand(1, 10_001, 32)},
        "pos_embed, of shape (1, 10001, 32), but fewer numbers",
    ),
    "sparse": (
        lambda t: t | {"head.weight": t["head.weight"].to_sparse()},
        "head.weight, which is sparse, quantised or",
    ),
    "without values": (
        lambda t: t | {"head.weight": t["head.weight"].to("meta")},
        "head.weight, which is sparse, quan",
    ),
    "named by a number": (lambda t: t | {5: torch.ones(1)}, "a tensor whose name is 5 and no text"),
    "named by nothing": (lambda t: {None: torch.ones(1)}, "a tensor whose name is None and no text"),
    "control characters": (
        lambda t: t | {"\x1b[2J\nerror: harmless": torch.ones(1)},
        r"has undeclared \x1b[2J\nerror: harmless.",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_none(case, refused, tmp_path):
    change, message = TENSORS[case]
    torch.save({"model": change(weights_of("timm_vit"))}, tmp_path / "file.pth")
    assert message in refused(tmp_path / "file.pth")


@pytest.mark.parametrize("case", ["a bomb", "twice"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_of_arrays(case, refused, tmp_path):
    arrays = dict(np.load(FIXTURES / "vit_jax.npz"))
    with zipfile.ZipFile(tmp_path / "file.npz", "w", DEFLATED) as archive:
        for name, array in arrays.items():
            for _ in range(1 + (case == "twice" and name == "cls")):
                array = np.zeros(10**8, np.int8) if case == "a bomb" and name == "cls" else array
                with archive.open(f"{name}.npy", "w") as file:
                    np.lib.format.write_array(file, array)
    message = "it holds cls.npy twice" if case == "twice" else "it would grow to more than 100 times its size"
    assert message in refused(tmp_path / "file.npz")


@pytest.mark.parametrize("case", ["in two shards", "in another shard", "in no shard"])
def test_shards_that_are_not_as_their_index_says(case, refused, tmp_path):
    tensors = weights_of("timm_vit")
    halves = [dict(list(tensors.items())[:20]), dict(list(tensors.items())[20:])]
    places = {key: f"{n}.safetensors" for n, half in enumerate(halves) for key in half}
    first = next(iter(tensors))
    if case == "in two shards":
        halves[1][first] = tensors[first] + 1
    else:
        places[first if case == "in another shard" else "ghost"] = "1.safetensors"
    (tmp_path / "source").mkdir()
    for n, half in enumerate(halves):
        save_file(half, tmp_path / f"source/{n}.safetensors")
    (tmp_path / "source/model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    told = refused(tmp_path / "source")
    assert "only one of the two has " in told and ("ghost" if case == "in no shard" else first) in told


def test_links_in_a_circle(refused, tmp_path):
    (tmp_path / "file.pth").symlink_to("file.pth")
    assert "There is no checkpoint file" in refused(tmp_path / "file.pth")


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
    "deep": ('{"a":' * 100_000 + "1" + "}" * 100_000, "has no weight_map"),
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
    "deep": ('{"a":' * 100_000 + "1" + "}" * 100_000, "is not JSON"),
    "too many blocks": (
        json.dumps(ViTConfig().to_dict() | {"num_hidden_layers": 10**8}),
        "it says that the encoder has 100000000 blocks",
    ),
    "less than no block": (json.dumps(ViTConfig().to_dict() | {"num_hidden_layers": -1}), "the encoder has -1 blocks"),
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


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn])
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


class Runs:
    def __reduce__(self):
        return exec, ("import builtins; builtins.pickle_ran = True",)


def test_code_beside_transformers_format_does_not_run(refused, tmp_path):
    """Neither what is in the place of weights, nor files that a config asks for; torch's advice is not passed on."""
    file = small_vit(tmp_path / "source")
    torch.save(load_file(file) | {"vit.extra": Runs()}, file.with_name("pytorch_model.bin"))
    file.unlink()
    told = refused(tmp_path / "source")
    assert "cannot be read safely" in told and "weights_only" not in told and not hasattr(builtins, "pickle_ran")
    fields = {"model_type": "unheard_of", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (tmp_path / "source/config.json").write_text(json.dumps(fields))
    (tmp_path / "source/evil.py").write_text("import builtins; builtins.pickle_ran = True; Config = Model = object")
    refused(tmp_path / "source")
    assert not hasattr(builtins, "pickle_ran")


@pytest.mark.parametrize("names", [["pipeline"], ["ViTConfig"], [5, None], ["os.system"]])
def test_a_class_that_is_none_is_not_taken(names, tmp_path):
    file = small_vit(tmp_path / "source")
    fields = json.loads(file.with_name("config.json").read_text()) | {"architectures": names}
    tensors = {key.removeprefix("vit."): t for key, t in load_file(file).items() if key.startswith("vit.")}
    save_file(tensors, file, metadata={"format": "pt"})
    file.with_name("config.json").write_text(json.dumps(fields))
    status = cli.main(["convert", str(tmp_path / "source"), "--output", str(tmp_path / "out")])
    assert status in (0, 1)  # what it holds decides, and nothing is called


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
