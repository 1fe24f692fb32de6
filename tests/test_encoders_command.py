"""`ssm-vlm encoders`."""

import json
import re

import pytest

from ssm_vlm.configuration.named_encoders import ENCODERS
from ssm_vlm.encoders_command import describe, main


def test_json_names_every_encoder_with_its_cost(capsys):
    assert main(["--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert sorted(row["name"] for row in rows) == sorted(ENCODERS)
    (detector,) = (row for row in rows if row["name"] == "vmamba_small_s2l15.coco_maskrcnn_1x")
    assert detector["grid"] == [50, 84] and detector["tokens"] == 4200 and detector["tap"] == "stage3"
    assert detector["parameters"] == ENCODERS[detector["name"]].parameters and detector["tap_norm"] == "trained"
    assert detector["weights"].startswith("https://github.com/MzeroMiko/VMamba/releases/download/%23v2det/")


def shown(capsys, monkeypatch, columns, *arguments):
    """Lines as on a terminal of that width, or as in a pipe where it is None."""
    if columns is not None:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
    assert main(list(arguments)) == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()


def test_a_pipe_gets_every_column(capsys, monkeypatch):
    lines = shown(capsys, monkeypatch, None)
    for heading in ("norm", "canvas", "grid", "tokens", "params M", "GFLOPs", "top-1", "loaded", "licence", "weights"):
        assert heading in lines[0]
    for name in ENCODERS:
        assert sum(line.startswith(f"{name} ") for line in lines) == 1
    assert not any("Not shown" in line for line in lines)


@pytest.mark.parametrize("columns", [60, 80, 120, 200])
def test_a_terminal_gets_what_fits(capsys, monkeypatch, columns):
    lines = shown(capsys, monkeypatch, columns)
    own_line = [line for line in lines if "_before_mixers" in line]
    assert max(len(line) for line in lines if line not in own_line) <= columns
    for name in ENCODERS:
        assert sum(line.split(" ")[0] == name for line in lines) == 1
    first = lines[0].split()
    assert first[:3] == ["encoder", "tap", "norm" if columns == 200 else "tokens"][: len(first)]
    assert ("licence" in first) == (columns >= 120) and any("Not shown:" in line for line in lines)


def test_families_stand_together_under_their_name(capsys, monkeypatch):
    lines = shown(capsys, monkeypatch, 120)
    titles = [line.split()[1] for line in lines if line.startswith("──")]
    assert titles == list(dict.fromkeys(titles)) and {"vmamba", "vit", "deit3", "pvt_v2", "swin"} <= set(titles)
    start = lines.index(next(line for line in lines if line.startswith("── deit3")))
    assert lines[start].startswith("── deit3  4 encoders, Apache-2.0, 0 loaded ──")
    assert all(line.startswith("deit3_") for line in lines[start + 1 : start + 5])


def test_how_each_tap_is_normed():
    norms = {name: describe(encoder)["tap_norm"] for name, encoder in ENCODERS.items()}
    assert norms["vit_small_patch16.augreg_in1k_224"] == "none"
    assert norms["swin_tiny.in1k_224"] == norms["convnext_tiny.in1k_224"] == "parameter-free"
    assert norms["pvt_v2_b2.in1k_224"] == norms["vmamba_small_s2l15.coco_maskrcnn_1x"] == "trained"


@pytest.mark.parametrize(("start", "end"), [("digit_", ""), ("vmamba_", ".in1k_224"), ("", "_1x")])
def test_filter(capsys, start, end):
    assert main(["--json", "--filter", f"{start}*{end}"]) == 0
    expected = [name for name in ENCODERS if name.startswith(start) and name.endswith(end)]
    assert [entry["name"] for entry in json.loads(capsys.readouterr().out)] == expected
    assert 1 < len(expected) < len(ENCODERS)


def test_a_filter_that_meets_none(capsys):
    assert main(["--filter", "vmambo*"]) == 1
    assert capsys.readouterr().err == "No encoder's name matches 'vmambo*'; `ssm-vlm encoders` lists all.\n"
