"""`ssm-vlm convert`: published files of VMamba become folders, and everything else gets one clear sentence.

The files of the other families are converted in their own tests.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, ViTImageProcessor

from ssm_vlm import SSMVisionConfig, cli
from ssm_vlm.modeling.modeling_ssm_vision import SSMVisionBackbone, SSMVisionForImageClassification, SSMVisionModel

FIXTURES = Path(__file__).parent.parent / "fixtures"
NAME = "vmamba_small_s2l15.in1k_224"


def golden(case):
    return load_file(FIXTURES / f"{case}.weights.safetensors"), load_file(FIXTURES / f"{case}.io.safetensors")


def published_vmamba(width, depths, ratio=2):
    """A file as VMamba's v2 classifiers are published, of any size, all zeros."""
    shapes = {}

    def norm(name, channels):
        shapes.update({f"{name}.weight": (channels,), f"{name}.bias": (channels,)})

    def conv(name, channels, inputs):
        shapes.update({f"{name}.weight": (channels, inputs, 3, 3), f"{name}.bias": (channels,)})

    conv("patch_embed.0", width // 2, 3)
    norm("patch_embed.2", width // 2)
    conv("patch_embed.5", width, width // 2)
    norm("patch_embed.7", width)
    for stage, depth in enumerate(depths):
        c = width * 2**stage
        e, rank = ratio * c, -(-c // 16)
        for index in range(depth):
            block = f"layers.{stage}.blocks.{index}"
            norm(f"{block}.norm", c)
            norm(f"{block}.norm2", c)
            norm(f"{block}.op.out_norm", e)
            shapes |= {f"{block}.op.x_proj_weight": (4, rank + 2, e), f"{block}.op.dt_projs_weight": (4, e, rank)}
            shapes |= {
                f"{block}.op.A_logs": (4 * e, 1),
                f"{block}.op.Ds": (4 * e,),
                f"{block}.op.dt_projs_bias": (4, e),
            }
            shapes |= {f"{block}.op.in_proj.weight": (e, c, 1, 1), f"{block}.op.out_proj.weight": (c, e, 1, 1)}
            shapes |= {f"{block}.op.conv2d.weight": (e, 1, 3, 3)}
            shapes |= {f"{block}.mlp.fc1.weight": (4 * c, c, 1, 1), f"{block}.mlp.fc1.bias": (4 * c,)}
            shapes |= {f"{block}.mlp.fc2.weight": (c, 4 * c, 1, 1), f"{block}.mlp.fc2.bias": (c,)}
        if stage + 1 < len(depths):
            conv(f"layers.{stage}.downsample.1", 2 * c, c)
            norm(f"layers.{stage}.downsample.3", 2 * c)
    norm("classifier.norm", c)
    shapes |= {"classifier.head.weight": (1000, c), "classifier.head.bias": (1000,)}
    return {key: torch.zeros(shape) for key, shape in shapes.items()}


@pytest.fixture
def convert(tmp_path, capsys):
    """Runs the command on these contents or this file; returns status, output and the folder."""

    def run(source, *options):
        if isinstance(source, dict):
            torch.save(source, tmp_path / "published.pth")
            source = tmp_path / "published.pth"
        status = cli.main(["convert", str(source), "--output", str(tmp_path / "made"), *options])
        shown = capsys.readouterr()
        return status, shown.out if status == 0 else shown.err, tmp_path / "made"

    return run


@torch.no_grad()
def test_a_classification_file(convert):
    weights, io = golden("vmamba_v2_ratio2")
    status, shown, folder = convert({"model": weights, "epoch": 222})
    assert status == 0 and shown.startswith(f"{folder}\n")
    for line in (
        "class      SSMVisionForImageClassification",
        "named      no encoder",
        "taps       stem stage1 stage2 stage3 stage4",
    ):
        assert line in shown
    logits = AutoModelForImageClassification.from_pretrained(folder).eval()(io["input.1"]).logits
    assert (logits - io["logits.1"]).abs().max() <= 1e-4 * io["logits.1"].abs().max()
    assert isinstance(AutoModelForImageClassification.from_pretrained(folder), SSMVisionForImageClassification)
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, SSMVisionModel) and not info["missing_keys"]
    backbone = SSMVisionBackbone.from_pretrained(folder, out_features=["stage2", "stage3"]).eval()
    maps = backbone(io["input.1"]).feature_maps
    assert len(maps) == len(backbone.stages) - 1 == 2
    origin = json.loads((folder / "origin.json").read_text())
    assert origin["layout"] == "vmamba" and origin["source"] == "published.pth" and len(origin["sha256"]) == 64


@torch.no_grad()
def test_a_dense_file_and_how_its_pictures_are_prepared(convert):
    weights, io = golden("vmamba_v2_ratio2_backbone")
    contents = {f"backbone.{key}": tensor for key, tensor in weights.items()} | {"roi_head.fc.weight": torch.ones(2)}
    status, shown, folder = convert({"state_dict": contents, "meta": {}})
    assert status == 0 and "class      SSMVisionBackbone" in shown and "left out   1 tensors" in shown
    model = AutoModel.from_pretrained(folder).eval()
    expected = io["stage4.0"].flatten(2).transpose(1, 2)
    assert (model(io["input.0"]).last_hidden_state - expected).abs().max() <= 1e-4 * expected.abs().max()
    processor = AutoImageProcessor.from_pretrained(folder)
    assert processor.downsampling == [[2, "ceil"]] * 4


def test_the_variant_is_found_in_the_table(convert):
    status, shown, folder = convert({"model": published_vmamba(96, (2, 2, 8, 2), ratio=1)})
    assert status == 0 and "named      vmamba_tiny_s1l8.in1k_224\n" in shown
    assert "pictures   as for vmamba_tiny_s1l8.in1k_224" in shown and "parameters 30,249,064" in shown
    assert AutoImageProcessor.from_pretrained(folder).size == {"height": 224, "width": 224}


def test_a_file_of_another_variant_is_refused_by_keys_and_shapes(convert):
    weights, _ = golden("vmamba_v2_ratio2")
    status, shown, folder = convert({"model": weights}, "--encoder", NAME)
    assert status == 1 and not folder.exists()
    assert (
        "does not fit: it lacks stages.0.blocks.1.mixer.a_log, " in shown and " more; it has another shape for" in shown
    )
    assert "has another shape for stages.0.blocks.0.mixer.a_log (4, 16, 1) instead of (4, 192, 1)" in shown


def test_a_file_with_more_blocks_than_the_named_encoder_is_refused_by_its_keys(convert):
    deeper = published_vmamba(96, (2, 2, 8, 2))
    status, shown, _ = convert({"model": deeper}, "--encoder", "vmamba_tiny_s2l5.in1k_224")
    assert status == 1 and "does not fit: it has undeclared stages.2.blocks.5.mixer.a_log, " in shown


def test_files_that_cannot_be_meant(convert, tmp_path):
    save_file({"encoder.weight": torch.ones(2)}, tmp_path / "unknown.safetensors")
    (tmp_path / "notes.txt").write_text("no weights")
    swin = FIXTURES / "swin_release.weights.safetensors"
    for source, options, message in (
        (tmp_path / "gone.pth", (), "There is no checkpoint file"),
        (tmp_path / "notes.txt", (), "is not a checkpoint that can be read safely"),
        (
            tmp_path / "unknown.safetensors",
            (),
            "holds 1 tensors (encoder.weight) in none of the layouts that are known: ",
        ),
        (swin, ("--encoder", NAME), f"is in the layout 'swin', but {NAME!r} comes in 'vmamba'"),
        (swin, ("--encoder", "vmamba"), "There is no encoder named 'vmamba'; the nearest names are"),
        (swin, ("--encoder", "digit_vmamba.digitscenes_64"), "has no published weights: this project trains it"),
    ):
        status, shown, folder = convert(source, *options)
        assert status == 1 and shown.startswith("error: ") and message in shown and shown.count("\n") == 1
        assert not folder.exists()


def test_a_folder_that_is_not_ours_is_left_alone(convert, tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made/config.json").write_text("{}")
    status, shown, folder = convert(FIXTURES / "vmamba_v0.weights.safetensors")
    assert status == 1 and "holds files that no conversion made: give a new one" in shown
    assert [file.name for file in folder.iterdir()] == ["config.json"]


@pytest.mark.parametrize("error", [SafetensorError("No space left on device"), OSError("No space left on device")])
def test_a_full_disk_leaves_the_earlier_folder(convert, monkeypatch, error, tmp_path):
    status, _, folder = convert(FIXTURES / "vmamba_v0.weights.safetensors")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert status == 0

    def full(*_, **__):
        raise error

    monkeypatch.setattr(SSMVisionForImageClassification, "save_pretrained", full)
    status, shown, _ = convert(FIXTURES / "vmamba_v0.weights.safetensors")
    assert status == 1 and "No space left on device" in shown
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@torch.no_grad()
def test_a_folder_in_transformers_format_keeps_its_pictures(convert, tmp_path):
    config = SSMVisionConfig(hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
    model = AutoModelForImageClassification.from_config(config).eval()
    model.save_pretrained(tmp_path / "stock")
    status, shown, folder = convert(tmp_path / "stock")
    assert status == 1 and "holds no image processor that can be read" in shown
    ViTImageProcessor(size={"height": 64, "width": 64}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path / "stock")
    status, shown, _ = convert(tmp_path / "stock")
    assert status == 0 and "pictures   as for the source" in shown
    processor = AutoImageProcessor.from_pretrained(folder)
    assert processor.geometry == "letterbox" and list(processor.image_mean) == [0.1, 0.2, 0.3]
    pixels = torch.randn(1, 3, 64, 64)
    assert torch.equal(
        AutoModelForImageClassification.from_pretrained(folder).eval()(pixels).logits, model(pixels).logits
    )


def test_push(convert, monkeypatch):
    pushed = []

    def push_folder(folder, repo_id):
        pushed.append(
            (sorted(file.name for file in folder.iterdir() if file.suffix in (".json", ".safetensors")), repo_id)
        )
        return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr("ssm_vlm.push_command.push_folder", push_folder)
    status, shown, _ = convert(FIXTURES / "vmamba_v0.weights.safetensors", "--push", "me/vmamba")
    assert status == 0 and shown.endswith("https://huggingface.co/me/vmamba\n")
    assert pushed == [(["config.json", "model.safetensors", "origin.json", "preprocessor_config.json"], "me/vmamba")]


MEASURE = """
import os, sys
from ssm_vlm.modeling.encoder_conversion import convert_published

def memory(kind):
    with open("/proc/self/status") as status:
        return 1024 * int(next(line for line in status if line.startswith(kind)).split()[1])

small, big = sys.argv[1:]
convert_published(small, "small")  # what is imported and allocated once
before = memory("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak counts from here
convert_published(big, "big")
print((memory("VmHWM") - before) / os.path.getsize(big))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
@pytest.mark.parametrize("form", ["zip", "before torch 1.6", "safetensors"])
def test_the_weights_are_in_memory_once(tmp_path, form):
    save_file(published_vmamba(8, (1, 1, 1, 1)), tmp_path / "small.safetensors")
    big = published_vmamba(128, (2, 2, 15, 2))
    file = tmp_path / ("big.safetensors" if form == "safetensors" else "big.pth")
    if form == "safetensors":
        save_file(big, file)
    else:
        torch.save({"model": big}, file, _use_new_zipfile_serialization=form == "zip")
    assert os.path.getsize(file) > 300e6
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, "small.safetensors", file.name],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) <= 1.2
