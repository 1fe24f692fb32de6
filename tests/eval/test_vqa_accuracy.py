"""VQA and TextVQA accuracy against the scores of the reference evaluators."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssm_vlm.eval.vqa_accuracy import _CONTRACTIONS, normalize_answer, textvqa_accuracy, vqa_accuracy

GOLDEN = json.loads((Path(__file__).parents[1] / "fixtures" / "vqa_scores.json").read_text())
METRICS = {"vqa_accuracy": vqa_accuracy, "textvqa_accuracy": textvqa_accuracy}


@pytest.mark.parametrize("name", METRICS)
def test_reference_scores(name):
    items = GOLDEN[name]
    assert len(items) >= 150 and len({item["score"] for item in items}) >= 5
    wrong = {
        (item["prediction"], *item["answers"]): (METRICS[name](item["prediction"], item["answers"]), item["score"])
        for item in items
        if abs(METRICS[name](item["prediction"], item["answers"]) - item["score"]) > 1e-6
    }
    assert not wrong


@given(st.integers(0, 10), st.sampled_from(list(METRICS.values())))
def test_leave_one_out(matches, metric):
    """The definition, said slowly."""
    answers = ["cat"] * matches + ["dog", "bird", *["fish"] * 8][: 10 - matches]
    others = [answers[:left_out] + answers[left_out + 1 :] for left_out in range(10)]
    slowly = sum(min(1, nine.count("cat") / 3) for nine in others) / 10
    assert metric("cat", answers) == pytest.approx(slowly, abs=1e-12)
    assert metric("horse", answers) == 0


@pytest.mark.parametrize(
    "text, normal",
    [
        ("The T-shirt.", "t shirt"),
        ("red, white", "red white"),
        ("a,b", "b"),
        ("1,000", "1000"),
        ("1,000 t-shirts", "1000 tshirts"),  # a number with a comma takes every mark away
        ("t-shirt - red", "tshirt red"),  # so does a mark that touches a space somewhere
        ("black / white", "black white"),
        ("3.5.", "3.5"),
        ("none of TEN", "0 of 10"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("somebody'd", "somebodyd"),
        ("its", "its"),
        ("12:30", "12:30"),
        ("." * 40, "." * 8),
        ("an", ""),
    ],
)
def test_normal_form(text, normal):
    assert normalize_answer(text) == normal


def test_contractions_are_those_of_the_reference():
    """The reference has six more: four in capitals, which never match, and two that change nothing."""
    assert len(_CONTRACTIONS) == 114
    assert _CONTRACTIONS["ow's'at"] == _CONTRACTIONS["'ow'sat"] == "'ow's'at"
    assert not {"im", "id've", "let's", "she's", "shed", "wed", "its"} & set(_CONTRACTIONS)


def test_ten_same_answers_switch_normalisation_off():
    assert vqa_accuracy("Yes.", ["yes"] * 10) == 0
    assert vqa_accuracy("Yes.", ["yes"] * 9 + ["no"]) == 1
    assert textvqa_accuracy("Yes.", ["yes"] * 10) == 1


def test_textvqa_takes_genitives_apart():
    assert textvqa_accuracy("mcdonald 's", ["McDonald's"] * 10) == 1
    assert vqa_accuracy("mcdonald 's", ["McDonald's"] * 9 + ["kfc"]) == 0


@pytest.mark.parametrize("metric", METRICS.values())
def test_wrong_number_of_answers(metric):
    with pytest.raises(ValueError, match="defined on 10 human answers, but got 3 answers"):
        metric("a", ["a"] * 3)
    with pytest.raises(ValueError, match="but got the text 'abcdefghij'"):
        metric("a", "abcdefghij")
