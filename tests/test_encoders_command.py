"""`ssm-vlm encoders`."""

import json

import pytest

from ssm_vlm.configuration.named_encoders import ENCODERS
from ssm_vlm.encoders_command import main


def test_json_names_every_encoder_with_its_cost(capsys):
    assert main(["--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(ENCODERS)
    (detector,) = (row for row in rows if row["name"] == "vmamba_small_s2l15.coco_maskrcnn_1x")
    assert detector["grid"] == [50, 84] and detector["tokens"] == 4200 and detector["tap"] == "stage3"
    assert detector["parameters"] == ENCODERS[detector["name"]].parameters
    assert detector["weights"].startswith("https://github.com/MzeroMiko/VMamba/releases/download/%23v2det/")


def test_table_shows_every_column_in_full(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    for name in ENCODERS:
        assert f" {name} " in shown
    assert "50x84 = 4200" in shown and "letterbox_corner" in shown and "Apache-2.0" in shown and "…" not in shown


@pytest.mark.parametrize(("pattern", "count"), [("digit_*", 6), ("vmamba_*.in1k_224", 9), ("*_1x", 7)])
def test_filter(capsys, pattern, count):
    assert main(["--json", "--filter", pattern]) == 0
    assert len(json.loads(capsys.readouterr().out)) == count


def test_a_filter_that_meets_none(capsys):
    assert main(["--filter", "vmambo*"]) == 1
    assert capsys.readouterr().err == "No encoder's name matches 'vmambo*'; `ssm-vlm encoders` lists all.\n"
