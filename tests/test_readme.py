"""The README holds what the study wrote, and its code runs."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TINY_DATA = {
    "train_scenes": 24,
    "text_scenes": 24,
    "val_scenes": 2,
    "test_scenes": 2,
    "classification_train": 64,
    "classification_val": 8,
}
TINY_STEPS = ["--encoder_steps", "1", "--language_model_steps", "1", "--vlm_steps", "1"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_table_is_the_one_that_the_study_wrote():
    table = re.search(r"<!-- table -->\n(.*)<!-- /table -->", README, flags=re.DOTALL)
    assert table is not None
    assert table[1].strip() == (ROOT / "docs" / "study" / "table.md").read_text().strip()


def test_files_and_pictures_that_the_readme_names_exist():
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README) + re.findall(
        r"`((?:configuration|modeling|training|tests)/[\w/.]+)`", README
    ):
        if "_x.py" not in path:
            assert (ROOT / path).exists(), path


def test_every_make_target_it_names_is_there():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w[\w-]*)", "\n".join(blocks("bash")), flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder in which a tiny study has run and the user's own picture, recipe and questions lie."""
    folder = tmp_path_factory.mktemp("readme")
    run(folder, "-m", "ssm_vlm.eval.study", *TINY_STEPS, "--data", json.dumps(TINY_DATA))
    Image.new("RGB", (60, 40), "navy").save(folder / "photo.jpg")
    (folder / "training").symlink_to(ROOT / "training")
    (folder / "my_recipe.yaml").write_text((ROOT / "training" / "recipes" / "digit_vlm.yaml").read_text())
    data = folder / "runs" / "study" / "data"
    (folder / "images").symlink_to(data / "images" / "eval")
    (folder / "questions.json").symlink_to(data / "vqa_test_questions.json")
    (folder / "annotations.json").symlink_to(data / "vqa_test_annotations.json")
    vmamba = ROOT / "tests" / "fixtures" / "vmamba_v2_ratio2.weights.safetensors"
    torch.save({"model": load_file(vmamba)}, folder / "vssm1_tiny_0230s_ckpt_epoch_264.pth")
    (folder / "RUN_DIR").symlink_to(folder / "runs" / "study" / "models" / "digit_vit.digitscenes_64")
    return folder


def run(folder: Path, *arguments: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.slow
def test_its_python_runs(workplace):
    for block in blocks("python"):
        assert run(workplace, "-c", block).strip().startswith("[")


# A command as the README has it -> the modules that run it here, in few steps and on CPU.
LAUNCHERS = {
    "ssm-vlm": ["-m", "ssm_vlm"],
    "python": [],
    "torchrun": ["-m", "torch.distributed.run"],
    "accelerate": ["-m", "accelerate.commands.accelerate_cli"],
}
COMMANDS = [
    line.split("#")[0].strip()
    for block in blocks("bash")
    for line in block.splitlines()
    if line.split()[:1] and line.split()[0] in LAUNCHERS
]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_run(workplace, command):
    words = shlex.split(command)
    arguments = [*LAUNCHERS[words[0]], *words[1:]]
    if "train_vlm" in command or " train " in command:
        arguments += ["--max_steps", "1", "--use_cpu", "true"]
    if words[0] == "accelerate":
        arguments.insert(arguments.index("launch") + 1, "--cpu")
    run(workplace, *arguments)


def test_the_readme_still_has_commands_to_run():
    assert len(COMMANDS) >= 7
