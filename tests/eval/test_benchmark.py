"""The command on toys, its answers to bad input, and the scripts that run it."""

import contextlib
import io
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from ssm_vlm.eval import benchmark

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory) -> tuple[dict, str, Path]:
    """Record, output and picture of a quick run of all parts."""
    folder = tmp_path_factory.mktemp("benchmark")
    arguments = ["--quick", "--threads", "1", "--output", str(folder), "--plot", str(folder / "plot.png")]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert benchmark.main(arguments) == 0
    (saved,) = folder.glob("*.json")
    return json.loads(saved.read_text()), printed.getvalue(), saved


def test_quick_run_measures_every_part(quick_run):
    record, printed, saved = quick_run
    assert {row["part"] for row in record["rows"]} == {"op", "encoder", "vlm"}
    assert {row["passes"] for row in record["rows"] if row["part"] == "op"} == {"forward", "forward+backward"}
    op_variants = {row["variant"] for row in record["rows"] if row["part"] == "op"}
    assert {"naive", "chunked", "chunked alone", "copy_based"} <= op_variants
    for row in record["rows"]:
        assert row["lower_quartile"] <= row["median"] <= row["upper_quartile"] and len(row["seconds"]) == 2
        assert row["peak_bytes"] >= 0
    scanning = [row for row in record["rows"] if "scan_share" in row]
    assert scanning and all(0 < row["scan_share"] < 1 for row in scanning)
    assert {row["variant"] for row in record["rows"] if row["part"] == "vlm"} == {
        "encoder, connector",
        "first token",
        "8 more tokens",
    }
    assert record["machine"]["threads"] == 1 and record["machine"]["copy_bytes_per_second"] > 1e6
    assert record["exponents"]["digit_vit.digitscenes_64, default"] < 3
    assert saved.name.endswith(f"_{record['machine']['date']}.json")
    assert saved.with_name("plot.png").read_bytes().startswith(b"\x89PNG")
    assert "48x64" in printed and "copy_based" in printed and "% scan" in printed


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["encoder", "--quick", "--encoder", "vmamba_smal"], "nearest names are vmamba_small"),
        (["encoders", "--quick"], "no part 'encoders'"),
        (["encoder", "--quick", "--size", "224x"], "'224x' is no size"),
        (["op", "--quick", "--shape", "56x56"], "'56x56' is no shape"),
        (["--report", "nothing.json"], "nothing.json"),
    ],
)
def test_bad_input_is_one_sentence(arguments, said, capsys):
    assert benchmark.main(arguments) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


# The scripts


def script(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHON": os.sys.executable} | variables
    command = ["bash", str(ROOT / "benchmarks" / name), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpu.sh", "cpu.sh"])
def test_scripts_run_here_in_their_quick_form(name, tmp_path):
    done = script(name, "--quick", OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert len(list(tmp_path.glob("*.json"))) == 1
    assert len(list(tmp_path.iterdir())) <= 8


@pytest.mark.parametrize("name", ["gpu.sh", "cpu.sh"])
def test_scripts_refuse_options_that_they_do_not_have(name, tmp_path):
    done = script(name, "--fast", OUT=str(tmp_path))
    assert done.returncode == 2 and done.stderr == f"usage: benchmarks/{name} [--quick]\n"


def test_gpu_script_refuses_a_machine_without_cuda(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = script("gpu.sh", OUT=str(tmp_path))
    assert done.returncode == 1 and "no CUDA device" in done.stderr


def test_cpu_script_refuses_files_that_differ_from_the_commit(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    copy = tmp_path / "benchmarks" / "cpu.sh"
    copy.write_text((ROOT / "benchmarks" / "cpu.sh").read_text())
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init"], ["add", "."], ["commit", "-m", "all"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    copy.write_text(copy.read_text() + "# changed\n")
    environment = os.environ | {"PYTHON": "false"}
    done = subprocess.run(["bash", str(copy)], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "commit or set aside" in done.stderr and "benchmarks/cpu.sh" in done.stderr


@pytest.mark.parametrize("name, minutes", [("gpu.sh", 10), ("cpu.sh", 40)])
def test_limits_of_the_parts_add_up(name, minutes):
    text = (ROOT / "benchmarks" / name).read_text()
    full = text[text.rindex('exit "$failed"', 0, text.rindex("exit")) :]
    limits = [int(line.split()[1]) for line in full.splitlines() if line.split()[:1] in (["part"], ["limit"])]
    assert len(limits) >= 4 and sum(limits) <= 60 * minutes
