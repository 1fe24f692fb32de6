"""Timing side by side: turns, summaries, and the command on tiny encoders."""

import json
import os
import time

import pytest
import torch

from ssm_vlm.configuration.named_encoders import ENCODERS, NamedEncoder
from ssm_vlm.eval import benchmark
from ssm_vlm.modeling.ops.scan_backends import BACKEND_VARIABLE


def test_contenders_take_turns_in_alternating_order():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = benchmark.measure(contenders, rounds=3, warmup=1)
    assert "".join(calls) == "abc" + "abc" + "cba" + "abc"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_slow_contender_is_measured_slow_and_the_device_is_waited_for():
    waited = []
    contenders = {"fast": lambda: None, "slow": lambda: time.sleep(0.02)}
    seconds = benchmark.measure(contenders, rounds=2, synchronize=lambda: waited.append(1))
    assert min(seconds["slow"]) >= 0.02 > max(seconds["fast"])
    assert len(waited) == 2 * 2 * 2


@pytest.mark.parametrize("contenders, rounds", [({}, 3), ({"a": lambda: None}, 0)])
def test_nothing_to_measure_is_refused(contenders, rounds):
    with pytest.raises(ValueError, match=f"at least one round, got {len(contenders)} and {rounds}"):
        benchmark.measure(contenders, rounds)


def test_summary():
    summary = benchmark.summarise({"first": [2.0, 4.0, 3.0], "second": [1.0, 1.0, 7.0], "third": [6.0]})
    assert summary["first"] == {
        "fastest": 2.0,
        "lower_quartile": 2.5,
        "median": 3.0,
        "upper_quartile": 3.5,
        "ratio_to_first": 1.0,
    }
    assert summary["second"]["ratio_to_first"] == pytest.approx(1 / 3)
    assert summary["third"]["upper_quartile"] == 6.0


@pytest.mark.parametrize("before", [None, "chunked"])
def test_backend_is_set_for_the_call_only(before, monkeypatch):
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    if before is not None:
        monkeypatch.setenv(BACKEND_VARIABLE, before)
    with pytest.raises(RuntimeError), benchmark.scan_backend("naive"):
        assert os.environ[BACKEND_VARIABLE] == "naive"
        raise RuntimeError
    assert os.environ.get(BACKEND_VARIABLE) == before
    with benchmark.scan_backend(None):
        assert os.environ.get(BACKEND_VARIABLE) == before


def test_only_scanning_encoders_are_run_once_per_backend():
    encoders = {
        name: benchmark.build_encoder(name, False)
        for name in ("digit_vmamba.digitscenes_64", "digit_vit.digitscenes_64")
    }
    contenders = benchmark.make_contenders(encoders, ["naive", "chunked"], torch.zeros(1, 3, 16, 16), backward=False)
    assert list(contenders) == [
        "digit_vmamba.digitscenes_64 [naive]",
        "digit_vmamba.digitscenes_64 [chunked]",
        "digit_vit.digitscenes_64",
    ]


def test_backward_reaches_the_parameters():
    encoder = benchmark.build_encoder("digit_vmamba.digitscenes_64", False)
    (call,) = benchmark.make_contenders({"e": encoder}, ["chunked"], torch.randn(1, 3, 16, 16), backward=True).values()
    call()
    assert encoder.stem.conv1.weight.grad.abs().max() > 0


def test_last_stage_runs_what_the_tap_leaves_out():
    name = next(
        name for name, entry in ENCODERS.items() if isinstance(entry, NamedEncoder) and name.startswith("vmamba")
    )
    with torch.device("meta"):
        assert len(benchmark.build_encoder(name, False).stages) == 3
        assert len(benchmark.build_encoder(name, True).stages) == 4


@pytest.mark.parametrize("extra", [[], ["--backward", "--dtype", "bfloat16"]])
def test_command_prints_and_saves(tmp_path, capsys, extra):
    output = tmp_path / "benchmark.json"
    arguments = [
        "--encoder",
        "digit_vmamba.digitscenes_64",
        "digit_dwconv.digitscenes_64",
        "--backend",
        "naive",
        "chunked",
    ]
    arguments += ["--size", "16", "24", "--rounds", "2", "--threads", "1", "--output", str(output), *extra]
    assert benchmark.main(arguments) == 0
    record = json.loads(output.read_text())
    names = [
        "digit_vmamba.digitscenes_64 [naive]",
        "digit_vmamba.digitscenes_64 [chunked]",
        "digit_dwconv.digitscenes_64",
    ]
    assert list(record["seconds"]) == list(record["summary"]) == names
    assert all(len(times) == 2 for times in record["seconds"].values())
    assert record["settings"]["size"] == [16, 24] and record["machine"]["threads"] == 1
    printed = capsys.readouterr().out
    assert "16x24" in printed and "[naive]" in printed


def test_unknown_encoder_is_one_sentence(capsys):
    assert benchmark.main(["--encoder", "vmamba_smal"]) == 1
    assert "nearest names are vmamba_small" in capsys.readouterr().err
