"""What `ssm-vlm convert` leaves alone, keeps and notes: files in the output, the origin, the size of pictures."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel

from ssm_vlm import cli
from ssm_vlm.modeling.encoder_conversion import convert_published

FIXTURES = Path(__file__).parent.parent / "fixtures"
VIT = FIXTURES / "vit_timm.weights.safetensors"


@pytest.fixture
def convert(tmp_path, capsys):
    def run(source, folder="made", *options):
        status = cli.main(["convert", str(source), "--output", str(tmp_path / folder), *options])
        shown = capsys.readouterr()
        return status, shown.err, tmp_path / folder

    return run


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("name", ["thesis.txt", "vqa.scores.json", "config.json", "preprocessor_config.json"])
def test_files_of_somebody_else_are_left(convert, name):
    assert convert(VIT)[0] == 0
    status, _, folder = convert(VIT)  # nothing but what the first made
    assert status == 0
    (folder / name).write_text("{}")
    before = contents(folder)
    status, told, _ = convert(VIT)
    assert status == 1 and told.count("\n") == 1 and "holds files that no conversion made" in told and name in told
    assert contents(folder) == before


def test_a_folder_inside_is_left(convert):
    folder = convert(VIT)[2]
    (folder / "notes").mkdir()
    status, told, _ = convert(VIT)
    assert status == 1 and "notes" in told and (folder / "notes").is_dir()


def test_a_card_that_somebody_changed_is_kept(convert):
    folder = convert(VIT)[2]
    card = folder / "README.md"
    ours = card.read_text()
    card.write_text("my own words")
    assert convert(VIT)[0] == 0 and card.read_text() == "my own words"
    card.write_text(ours)
    assert convert(FIXTURES / "swin_timm.weights.safetensors")[0] == 0 and card.read_text() != ours


def test_a_file_that_comes_while_it_converts_is_left(tmp_path):
    folder = convert_published(VIT, tmp_path / "made").folder

    def progress(step):
        if step == "writing":
            (folder / "thesis.txt").write_text("mine")

    with pytest.raises(ValueError, match=r"thesis\.txt"):
        convert_published(VIT, folder, progress=progress)
    assert (folder / "thesis.txt").read_text() == "mine" and (folder / "model.safetensors").is_file()


def test_source_and_output_may_not_overlap(convert, tmp_path):
    folder = convert(VIT)[2]
    before = contents(folder)
    for source, output in ((folder, "made"), (folder, "made/inside"), (folder / "model.safetensors", "made")):
        status, told, _ = convert(source, output)
        assert status == 1 and "overlap: give a new folder" in told and told.count("\n") == 1
    shutil.copytree(folder, tmp_path / "outer/made")
    assert convert(tmp_path / "outer/made", "outer")[0] == 1
    assert contents(folder) == before


def test_a_converted_folder_keeps_its_origin(convert):
    first = convert(VIT)[2]
    status, _, second = convert(first, "second")
    assert status == 0
    old, new = (json.loads((folder / "origin.json").read_text()) for folder in (first, second))
    assert new == old | {"files": new["files"]} and new["source"] == VIT.name and new["layout"] == "timm_vit"
    assert len(new["sha256"]) == 64


@pytest.mark.parametrize(
    ("case", "size"), [("vit_timm", 64), ("vit_deit3", 64), ("swin_timm", 64), ("convnext_timm", 224)]
)
def test_pictures_have_the_size_that_the_file_shows(convert, case, size):
    status, told, folder = convert(FIXTURES / f"{case}.weights.safetensors")
    assert status == 0
    config = AutoModel.from_pretrained(folder).config
    size = config.image_size if case != "convnext_timm" else size
    assert AutoImageProcessor.from_pretrained(folder).size == {"height": size, "width": size}
    assert "note: mean, standard deviation and interpolation of the pictures are assumed, those of " in told
    origin = json.loads((folder / "origin.json").read_text())
    assert origin["pixels_assumed_from"] in told
    assumed = f"(assumed, those of `{origin['pixels_assumed_from']}`: the published file does not show them)"
    assert assumed in (folder / "README.md").read_text()


def published_vit(width, depth, grid):
    """A file as timm publishes its ViTs of patch 16, all zeros."""
    sizes = {"norm1": (width, width), "norm2": (width, width)}
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, grid**2 + 1, width)}
    shapes |= {"patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,), "head.weight": (1000, width), "head.bias": (1000,)}
    linear = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (4 * width, width)}
    linear |= {"mlp.fc2": (width, 4 * width)}
    for block in range(depth):
        for name in sizes:
            shapes |= {f"blocks.{block}.{name}.{kind}": (width,) for kind in ("weight", "bias")}
        for name, shape in linear.items():
            shapes |= {f"blocks.{block}.{name}.weight": shape, f"blocks.{block}.{name}.bias": shape[:1]}
    return {key: torch.zeros(shape) for key, shape in shapes.items()}


def test_a_name_has_its_own_size(tmp_path):
    sizes = {}
    for grid in (14, 24):
        save_file(published_vit(192, 12, grid), tmp_path / "vit.safetensors")
        conversion = convert_published(tmp_path / "vit.safetensors", tmp_path / f"made{grid}")
        sizes[grid] = AutoImageProcessor.from_pretrained(conversion.folder).size["height"], conversion.names
        assert conversion.assumed  # at 224 pixels because AugReg's and DeiT's pixels differ
    assert sizes[14][0] == 224 and "vit_tiny_patch16.augreg_in21k_224" in sizes[14][1]
    assert sizes[24] == (384, [])


def test_a_prefix_before_every_name(convert, tmp_path):
    tensors = {f"module.backbone.{key}": tensor for key, tensor in load_file(VIT).items()}
    torch.save({"state_dict": tensors}, tmp_path / "file.pth")
    status, told, folder = convert(tmp_path / "file.pth")
    assert status == 0, told
    plain = convert(VIT, "plain")[2]
    assert (folder / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
