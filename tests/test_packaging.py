"""The installed package: what the wheel holds, that it works away from the checkout, and what importing it costs."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import ssm_vlm
from ssm_vlm.configuration.named_encoders import ENCODERS
from ssm_vlm.modeling.encoder_loading import load_encoder

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGE_DIRS = PYPROJECT["tool"]["setuptools"]["package-dir"]
NOT_SOURCE = ("tests", "benchmarks", "build", "dist", "runs", "*.egg-info", ".*", "__pycache__")
HEAVY = ("datasets", "deepspeed", "evaluate", "matplotlib", "sklearn", "timm", "torchvision")


def source_files(pattern: str) -> set[Path]:
    """Files of the library's folders in the checkout, relative to it."""
    found = (path.relative_to(ROOT) for path in ROOT.glob(f"*/**/{pattern}"))
    return {
        path for path in found if not any(part.match(name) for name in NOT_SOURCE for part in map(Path, path.parts))
    }


def run(*command, cwd: Path, **variables: str) -> str:
    """Standard output of a command that knows nothing of this process's python path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | variables
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command[:4]} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_every_folder_with_code_is_a_listed_package():
    folders = {path.parent.as_posix() for path in source_files("*.py")}
    assert {"ssm_vlm", "configuration", "modeling", "training", "eval"} <= folders
    assert folders == set(PACKAGE_DIRS.values())
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == set(PACKAGE_DIRS)
    for package, folder in PACKAGE_DIRS.items():
        assert (ROOT / folder / "__init__.py").is_file()
        assert package == "ssm_vlm" or package == "ssm_vlm." + folder.replace("/", ".")


def test_the_version_is_said_once():
    assert ssm_vlm.__version__ == PYPROJECT["project"]["version"]


# What importing costs

PROBE = """
import json, os, sys, tempfile
written, reached, cuda, not_ours = [], [], [], set()

def hook(event, arguments):
    if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        written.append(os.fspath(arguments[0]) if not isinstance(arguments[0], int) else arguments[0])
    elif event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.posix_spawn"):
        reached.append(event)

sys.addaudithook(hook)
import torch

def spied(name, real):
    def call(*arguments, **options):
        cuda.append(name)
        return real(*arguments, **options)
    setattr(torch.cuda, name, call)

for name in ("_lazy_init", "current_device", "device_count", "get_device_capability", "init", "is_available"):
    spied(name, getattr(torch.cuda, name))
{statements}
print(json.dumps({{
    "file": ssm_vlm.__file__,
    "modules": sorted(name for name in set(sys.modules) - not_ours if "." not in name),
    "written": [path for path in written if not str(path).startswith((tempfile.gettempdir(), os.devnull))],
    "reached": reached,
    "cuda": cuda,
    "cuda_is_initialised": torch.cuda.is_initialized(),
}}))
"""
IMPORT = "import ssm_vlm"
IMPORT_ALL = f"""
from transformers import Trainer  # takes in `datasets` where that is installed
not_ours = set(sys.modules)
import importlib, pkgutil, ssm_vlm
for package in {sorted(PACKAGE_DIRS)}:
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__, package + "."):
        try:
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
        except ImportError as error:
            assert "need Triton" in str(error), error
"""


def probe(python, statements: str, folder: Path) -> dict:
    """What importing does, with home and caches in an empty folder, which must stay so."""
    places = {name: folder / name for name in ("home", "cache", "tmp", "cwd")}
    for place in places.values():
        place.mkdir()
    cost = json.loads(
        run(
            python, "-c", PROBE.format(statements=statements), cwd=places["cwd"], HOME=str(places["home"]),
            XDG_CACHE_HOME=str(places["cache"]), HF_HOME=str(places["cache"] / "hf"), TMPDIR=str(places["tmp"]),
            PYTHONDONTWRITEBYTECODE="1", TRITON_CACHE_DIR=str(places["cache"] / "triton"),
        )
    )  # fmt: skip
    # PyTorch itself makes an empty cache folder where temporary files go
    assert not [path for path in folder.rglob("*") if path.is_file()]
    assert (cost["written"], cost["reached"], cost["cuda"], cost["cuda_is_initialised"]) == ([], [], [], False)
    assert not set(HEAVY) & set(cost["modules"])
    return cost


@pytest.mark.parametrize("statements", [IMPORT, IMPORT_ALL], ids=["ssm_vlm", "every module"])
def test_importing_loads_nothing_heavy_writes_nothing_and_leaves_cuda_alone(tmp_path, statements):
    probe(sys.executable, statements, tmp_path)


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built by way of the source distribution, as for an index, from a copy that leaves the checkout clean."""
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*(name for name in NOT_SOURCE if name != "tests")))
    (source / "eval" / "studies").mkdir(exist_ok=True)
    (source / "eval" / "studies" / "another.yaml").write_text("study_dir: runs/another\n")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", source, cwd=folder)
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = {Path(name).name for name in archive.namelist() if ".dist-info/" in name}
    inside = {folder: package.replace(".", "/") for package, folder in PACKAGE_DIRS.items()}
    code = {f"{inside[path.parent.as_posix()]}/{path.name}" for path in source_files("*.py")}
    recipes = {f"ssm_vlm/{path.as_posix()}" for path in source_files("*.yaml") if path.parent.name == "recipes"}
    studies = {f"ssm_vlm/{path.as_posix()}" for path in source_files("*.yaml") if path.parent.name == "studies"}
    assert recipes and all(name.startswith("ssm_vlm/training/recipes/") for name in recipes)
    cards = {f"ssm_vlm/model_cards/{path.name}" for path in (ROOT / "model_cards").iterdir() if path.is_file()}
    assert names == code | recipes | studies | cards | {"ssm_vlm/py.typed", "ssm_vlm/eval/studies/another.yaml"}
    assert {"METADATA", "LICENSE", "entry_points.txt"} <= metadata


@pytest.mark.slow
def test_the_wheel_works_away_from_the_checkout(wheel, tmp_path):
    """Installed into an environment of its own, which sees this environment's packages but not the checkout."""
    home = tmp_path / "environment"
    venv.create(home, with_pip=False, symlinks=True)
    python, scripts = home / "bin" / "python", home / "bin"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
        wheel,
        cwd=tmp_path,
    )
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    # a folder that a .pth names is searched, but .pth files in it, such as that of an editable install, are not read
    (packages / "test_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")

    (tmp_path / "probe").mkdir()
    cost = probe(python, IMPORT_ALL, tmp_path / "probe")
    assert Path(cost["file"]).is_relative_to(home) and not Path(cost["file"]).is_relative_to(ROOT)

    rows = json.loads(run(scripts / "ssm-vlm", "encoders", "--json", cwd=tmp_path))
    assert [row["name"] for row in rows] == list(ENCODERS)
    assert "usage: ssm-vlm" in run(scripts / "ssm-vlm", "--help", cwd=tmp_path)

    load_encoder("digit_vmamba.digitscenes_64", pretrained=False).save_pretrained(tmp_path / "encoder")
    (tmp_path / "encoder" / "README.md").unlink()
    run(scripts / "ssm-vlm", "card", tmp_path / "encoder", cwd=tmp_path)
    assert "A vision encoder" in (tmp_path / "encoder" / "README.md").read_text()
