"""The file of answers: going on after an interruption, and refusing what does not belong together."""

import errno
import json
import os

import pytest

from ssm_vlm.eval.prediction_log import PredictionLog

HEADER = {"model": "abc", "max_new_tokens": 8}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "answers.jsonl"


def test_answers_are_kept_and_found_again(path):
    log = PredictionLog(path, HEADER)
    log.append([{"id": "a", "prediction": "one\ntwo"}, {"id": "b", "prediction": "drei ü \ud800"}])
    log.append([{"id": "c", "prediction": ""}])
    again = PredictionLog(path, HEADER)
    assert list(again.answers) == ["a", "b", "c"] == list(log.answers)
    assert again.answers["a"] == {"id": "a", "prediction": "one\ntwo"}
    assert json.loads(path.read_text().splitlines()[0]) == {"predictions": HEADER}


def test_a_torn_line_is_dropped_wherever_it_was_cut(path):
    log = PredictionLog(path, HEADER)
    log.append([{"id": "a", "prediction": "one"}])
    kept = path.read_bytes()
    log.append([{"id": "b", "prediction": "zwö"}])
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        torn = PredictionLog(path, HEADER)
        first_line = kept.index(b"\n") + 1
        assert list(torn.answers) == (["a"] if length >= len(kept) else [])
        assert path.read_bytes() == (kept if length >= len(kept) else whole[:first_line])
        torn.append([{"id": "z", "prediction": "new"}])
        assert "z" in PredictionLog(path, HEADER).answers


@pytest.mark.parametrize(
    "header, difference",
    [
        ({"model": "abd", "max_new_tokens": 8}, r"model \('abc' there, 'abd' here\)"),
        ({"model": "abc"}, r"max_new_tokens \(8 there, None here\)"),
        ({**HEADER, "model": "x", "new": 1}, r"model \('abc' there, 'x' here\), new \(None there, 1 here\)"),
    ],
)
def test_another_run_is_refused(path, header, difference):
    PredictionLog(path, HEADER).append([{"id": "a", "prediction": "one"}])
    before = path.read_bytes()
    message = rf"answers.jsonl holds predictions of another run, which differs in {difference}; remove the file or"
    with pytest.raises(ValueError, match=message):
        PredictionLog(path, header)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content, message",
    [
        (b"my diary", "is not a file of predictions; choose another name"),
        (b"my diary\nday 2\n", r"line 1 is not a line of predictions \(.*\); remove the file or choose another name"),
        (b"[1]\n", "line 1 is not a line of predictions"),
        (b'{"predictions": {"model": "abc", "max_new_tokens": 8}}\n{"id": "a"\n{"id": "b"}\n', "line 2 is not a line"),
        (b'{"predictions": {"model": "abc", "max_new_tokens": 8}}\n{"i": "a"}\n', r"line 2 is not a line .*\('id'\)"),
    ],
)
def test_other_files_are_left_alone(tmp_path, content, message):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        PredictionLog(path, HEADER)
    assert path.read_bytes() == content


def test_a_full_disk_is_told_and_loses_nothing(path, monkeypatch):
    log = PredictionLog(path, HEADER)
    log.append([{"id": "a", "prediction": "one"}])

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"cannot write predictions \(No space left on device\); the 1 that are there are kept"
    ):
        log.append([{"id": "b", "prediction": "two"}])
    assert list(log.answers) == ["a"]
