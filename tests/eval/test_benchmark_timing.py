"""Timing side by side: turns, summaries, peak memory, and what a run says of its machine."""

import os
import subprocess
import time

import pytest
import torch

from ssm_vlm.eval import benchmark_timing
from ssm_vlm.modeling.ops.scan_backends import BACKEND_VARIABLE

CPU = torch.device("cpu")


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


def test_a_call_taken_before_counts_as_first_round_or_stands_for_the_warm_up():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = benchmark_timing.measure(contenders, 3, warmup=1, warm={"a": 7.0, "b": 5.0}, first_rounds=["b"])
    assert "".join(calls) == "ab" + "ba" + "a"
    assert seconds["b"][0] == 5.0 and 7.0 not in seconds["a"]
    assert len(seconds["a"]) == len(seconds["b"]) == 3


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


def one_after_the_other():
    for _ in range(3):
        torch.ones(1 << 24)


def together():
    return [torch.ones(1 << 24) for _ in range(3)]


@pytest.mark.parametrize("peak", ["resident", "profiled"])
def test_peak_memory_counts_what_lives_at_once(peak, monkeypatch, tmp_path):
    if peak == "profiled":
        monkeypatch.setattr(benchmark_timing, "PROCESS", tmp_path / "nowhere")
    elif benchmark_timing.peak_memory_kind(CPU) != "resident":
        pytest.skip("this system does not let a process reset its most resident memory")
    assert benchmark_timing.peak_memory_kind(CPU) == peak
    together()  # what torch loads at its first call
    block = 4 * 2**24  # so large that it goes back to the system at once
    assert 0.9 * block <= benchmark_timing.peak_memory(one_after_the_other, CPU) < 1.1 * block
    assert 2.9 * block <= benchmark_timing.peak_memory(together, CPU) < 3.1 * block


def test_resident_memory_sees_what_torch_does_not_allocate():
    if benchmark_timing.peak_memory_kind(CPU) != "resident":
        pytest.skip("this system does not let a process reset its most resident memory")
    scratch = lambda: bytearray(b"1" * (8 << 20))  # noqa: E731
    assert benchmark_timing.peak_memory(scratch, CPU) > 7 << 20
    assert benchmark_timing.profiled_peak(scratch) == 0


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


@pytest.mark.parametrize("changed, marked", [("code.py", True), ("benchmarks/results/new.json", False)])
def test_commit_says_whether_code_differs_from_it_and_results_do_not_count(changed, marked, tmp_path, monkeypatch):
    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", tmp_path, *who, *words], check=True, capture_output=True)

    for name in ("code.py", "benchmarks/results/new.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old")
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    monkeypatch.setattr(benchmark_timing, "__file__", str(tmp_path / "eval" / "benchmark_timing.py"))
    clean = benchmark_timing._commit()
    assert len(clean) == 40
    (tmp_path / changed).write_text("new")
    assert benchmark_timing._commit() == clean + ("+changes" if marked else "")


def test_a_copy_without_git_takes_the_commit_that_it_is_told(monkeypatch):
    monkeypatch.setattr(benchmark_timing, "copy_bandwidth", lambda *_: 1.0)
    monkeypatch.setattr(benchmark_timing, "_commit", lambda: None)
    assert benchmark_timing.machine(CPU, "abc")["commit"] == "abc"
    monkeypatch.setattr(benchmark_timing, "_commit", lambda: "found")
    assert benchmark_timing.machine(CPU, "abc")["commit"] == "found"
