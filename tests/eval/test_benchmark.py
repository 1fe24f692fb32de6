"""Timing side by side: turns, summaries, what is skipped, and the command on toys."""

import contextlib
import io
import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest
import torch

from ssm_vlm.configuration.named_encoders import ENCODERS, NamedEncoder
from ssm_vlm.eval import benchmark, benchmark_contenders, benchmark_parts, benchmark_report, benchmark_timing
from ssm_vlm.modeling.ops.scan_backends import BACKEND_VARIABLE

ROOT = Path(__file__).parents[2]


# Measuring


def test_contenders_take_turns_in_alternating_order():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = benchmark_timing.measure(contenders, rounds=3, warmup=1)
    assert "".join(calls) == "abc" + "abc" + "cba" + "abc"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_slow_contender_is_measured_slow_and_gets_the_rounds_that_its_budget_allows():
    contenders = {"fast": lambda: None, "slow": lambda: time.sleep(0.02)}
    seconds = benchmark_timing.measure(contenders, rounds=8, budget=0.1)
    assert min(seconds["slow"]) >= 0.02 > sorted(seconds["fast"])[4]
    assert len(seconds["fast"]) == 8
    assert benchmark_timing.MIN_ROUNDS <= len(seconds["slow"]) < 8


@pytest.mark.parametrize("contenders, rounds", [({}, 3), ({"a": lambda: None}, 0)])
def test_nothing_to_measure_is_refused(contenders, rounds):
    with pytest.raises(ValueError, match=f"at least one round, got {len(contenders)} and {rounds}"):
        benchmark_timing.measure(contenders, rounds)


def test_summary():
    assert benchmark_timing.summarise([2.0, 4.0, 3.0]) == {
        "fastest": 2.0,
        "lower_quartile": 2.5,
        "median": 3.0,
        "upper_quartile": 3.5,
    }
    assert benchmark_timing.summarise([6.0])["upper_quartile"] == 6.0


def test_peak_memory_counts_what_lives_at_once():
    def one_after_the_other():
        for _ in range(3):
            torch.empty(1000)

    def together():
        return [torch.empty(1000) for _ in range(3)]

    device = torch.device("cpu")
    assert 4000 <= benchmark_timing.peak_memory(one_after_the_other, device) < 8000
    assert 12000 <= benchmark_timing.peak_memory(together, device) < 16000


def test_copy_bandwidth_counts_reading_and_writing(monkeypatch):
    monkeypatch.setattr(benchmark_timing, "measure", lambda *_, **__: {"copy": [0.5]})
    assert benchmark_timing.copy_bandwidth(torch.device("cpu"), megabytes=1) == 2 * 2**20 / 0.5


@pytest.mark.parametrize("before", [None, "chunked"])
def test_backend_is_set_for_the_call_only(before, monkeypatch):
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    if before is not None:
        monkeypatch.setenv(BACKEND_VARIABLE, before)
    with pytest.raises(RuntimeError), benchmark_timing.scan_backend("naive"):
        assert os.environ[BACKEND_VARIABLE] == "naive"
        raise RuntimeError
    assert os.environ.get(BACKEND_VARIABLE) == before
    with benchmark_timing.scan_backend(None):
        assert os.environ.get(BACKEND_VARIABLE) == before


# What is run


def test_backward_reaches_the_parameters():
    encoder = benchmark_contenders.build_encoder("digit_vmamba.digitscenes_64")
    benchmark_contenders.encoder_call(encoder, torch.randn(1, 3, 16, 16), "chunked", backward=True)()
    assert encoder.stem.conv1.weight.grad.abs().max() > 0


def test_last_stage_runs_what_the_tap_leaves_out():
    name = next(
        name for name, entry in ENCODERS.items() if isinstance(entry, NamedEncoder) and name.startswith("vmamba")
    )
    with torch.device("meta"):
        assert len(benchmark_contenders.build_encoder(name).stages) == 3
        assert len(benchmark_contenders.build_encoder(name, True).stages) == 4


def test_scans_are_timed_within_the_block_only():
    encoder = benchmark_contenders.build_encoder("digit_vmamba.digitscenes_64")
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad(), benchmark_contenders.timed_scans(torch.device("cpu")) as seconds:
        start = time.perf_counter()
        encoder(pixels)
        whole, inside = time.perf_counter() - start, seconds()
        assert 0 < inside < whole
    with torch.no_grad():
        encoder(pixels)
    assert seconds() == inside


def test_compulsory_bytes():
    shape = benchmark_parts.OpShape.parse("2x3x32")  # rank 1, one state: 4 * (1 + 1 + 1) values of projections
    maps = 32 + 12
    assert benchmark_parts.compulsory_bytes(shape, 2, torch.float32, "forward") == 4 * 2 * 6 * (maps + 32)
    both = 4 * 2 * 6 * (maps + 32 + maps + 32 + maps)
    assert benchmark_parts.compulsory_bytes(shape, 2, torch.float32, "forward+backward") == both


def test_throughput_batch_keeps_the_pixels():
    assert benchmark_parts.throughput_batch(16, 224, 224) == 16
    assert benchmark_parts.throughput_batch(16, 448, 448) == 4
    assert benchmark_parts.throughput_batch(16, 2048, 2048) == 1


def test_what_exceeds_the_budget_is_skipped_and_named():
    settings = benchmark_parts.Settings(rounds=2, budget=0.05, say=lambda line: None)
    setting = {"part": "op", "name": "x", "height": 1, "width": 2, "batch": 3, "dtype": "float32", "passes": "forward"}
    calls = {"quick": lambda: torch.ones(1), "slow": lambda: time.sleep(0.03), "foreseen": lambda: 1 / 0}
    rows = settings.run(setting, calls, {"foreseen": 100.0})
    assert [row["variant"] for row in rows] == ["quick"]
    assert [(entry["what"].split(", ")[-1], entry["reason"].split(",")[0]) for entry in settings.skipped] == [
        ("slow", "0.0 s a call"),
        ("foreseen", "about 100 s a call"),
    ]


def encoder_row(name: str, side: int, seconds: float, **others) -> dict:
    row = {"part": "encoder", "name": name, "variant": "default", "height": side, "width": side, "batch": 1}
    return row | {"median": seconds, "lower_quartile": seconds, "upper_quartile": 2 * seconds} | others


def test_exponent_and_crossover():
    rows = [encoder_row("line", side, side**2 * 1e-6) for side in (100, 200, 400)]
    rows += [encoder_row("square", side, side**4 * 1e-6 / 150**2) for side in (100, 200, 400)]
    exponents = benchmark_parts.exponents(rows)
    assert exponents == {"line, default": pytest.approx(1), "square, default": pytest.approx(2)}
    (crossing,) = benchmark_parts.crossovers(rows)
    assert (crossing["cheaper_above"], crossing["cheaper_below"]) == ("line", "square")
    assert crossing["side"] == pytest.approx(150) and crossing["median"] == pytest.approx(150**2 * 1e-6)


# The command


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
        assert row["peak_bytes"] > 0
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
        (["--table", "nothing.json"], "nothing.json"),
    ],
)
def test_bad_input_is_one_sentence(arguments, said, capsys):
    assert benchmark.main(arguments) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


# The README's table


def test_readme_holds_the_table_of_the_results():
    paths = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    start, end = benchmark_report.MARKERS
    found = re.search(f"{start}\n(.*?)\n{end}", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert found is not None and found[1] == benchmark_report.readme_block(paths)


def test_table_names_what_was_measured(tmp_path):
    ours, theirs = benchmark_report.README_ENCODERS
    rows = [
        encoder_row(ours, 224, 0.2, scan_share=0.25),
        encoder_row(ours, 224, 1.0) | {"variant": "copy_based"},
        encoder_row(theirs, 224, 0.08),
        encoder_row(ours, 384, 0.5),
    ]
    machine = {"device": "A chip", "cores": 2, "threads": 1, "cuda": None, "date": "2026-01-01", "commit": None}
    record = {
        "rows": rows,
        "settings": {"dtype": "float32", "rounds": 1},
        "machine": machine | {"versions": {"torch": "2.9"}},
    }
    file = tmp_path / "results.json"
    file.write_text(json.dumps(record))
    lines = benchmark_report.readme_block([file]).splitlines()
    assert lines[2:4] == [
        "| vmamba_small_s2l15 | 224 | 1 | 200 | 200-400 | 25 % | 5.0 |",
        "| vit_small_patch16 | 224 | 1 | 80.0 | 80.0-160 |  |  |",
    ]
    assert len(lines) == 6  # 384 is not among the sizes of the table
    assert lines[-1].startswith("A chip, 2 cores, 1 threads, float32, PyTorch 2.9, 2026-01-01")


def test_table_goes_between_the_markers(tmp_path):
    start, end = benchmark_report.MARKERS
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{start}\nold\n{end}\nafter\n")
    benchmark_report.write_readme(readme, r"new \1")
    assert readme.read_text() == f"before\n{start}\nnew \\1\n{end}\nafter\n"
    readme.write_text("nothing")
    with pytest.raises(ValueError, match="has no lines"):
        benchmark_report.write_readme(readme, "new")


# The script for a CUDA machine


@pytest.mark.slow
def test_gpu_script_runs_here_in_its_quick_form(tmp_path):
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--quick"],
        cwd=tmp_path,
        env=os.environ | {"OUT": str(tmp_path), "PYTHON": os.sys.executable},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert len(list(tmp_path.glob("*.json"))) == 1
    assert (tmp_path / "tests.log").read_text()


def test_gpu_script_refuses_a_machine_without_cuda(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh")],
        cwd=tmp_path,
        env=os.environ | {"OUT": str(tmp_path), "PYTHON": os.sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and "no CUDA device" in done.stderr
