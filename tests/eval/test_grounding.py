"""Reading boxes out of answers, overlap, and the count of right, wrong and unreadable ones."""

import ast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ssm_vlm.eval.grounding import Box, box_iou, parse_box, score_grounding

GOOD = {
    "[0.1, 0.2, 0.3, 0.4]": (0.1, 0.2, 0.3, 0.4),
    " [0,0,1,1]\n": (0, 0, 1, 1),
    "[.5, 0., 1e0, 5.0E-1]": (0.5, 0, 1, 0.5),
    "[\n0.25,\n0.5,\n0.75,\n1.0,\n]": (0.25, 0.5, 0.75, 1),
}
BAD = [
    "", "a box", "[]", "[0.1, 0.2, 0.3]", "[0.1, 0.2, 0.3, 0.4, 0.5]", "0.1, 0.2, 0.3, 0.4", "(0.1, 0.2, 0.3, 0.4)",
    "[[0.1, 0.2, 0.3, 0.4]]", "[0.1, 0.2, 0.3, 0.4] [0.1, 0.2, 0.3, 0.4]", "It is at [0.1, 0.2, 0.3, 0.4].",
    "[0.1, 0.2, 0.3, 0.4].", "[0.1, 0.2, 0.3, 0.4", "[0.1 0.2 0.3 0.4]", "[a, b, c, d]", "[0.1, 0.2, 0.3, 1.01]",
    "[-0.1, 0.2, 0.3, 0.4]", "[0.3, 0.2, 0.1, 0.4]", "[0.1, 0.4, 0.3, 0.2]", "[0.1, 0.2, 0.1, 0.4]",
    "[0.1, 0.2, 0.3, 0.2]", "[nan, 0.2, 0.3, 0.4]", "[0.1, 0.2, inf, 0.4]", "[False, 0.2, True, 0.4]",
    "[1 0, 0, 1, 1]", "[٠, 0, 1, 1]",
]  # fmt: skip


@pytest.mark.parametrize("text", GOOD)
def test_good_boxes(text):
    assert parse_box(text) == GOOD[text]
    assert isinstance(parse_box(text), Box)


@pytest.mark.parametrize("text", BAD)
def test_anything_else_is_no_box(text):
    assert parse_box(text) is None


NUMBERS = st.floats(-0.5, 1.5).map(lambda value: round(value, 2))


@given(st.lists(NUMBERS, min_size=3, max_size=5))
@example([0.0, 0.0, 1.0, 1.0])
@example([0.5, 0.5, 0.5, 0.6])
def test_as_the_paper_reads_boxes(numbers):
    """A Python list of four numbers in [0, 1], corners in order."""
    text = str(numbers)
    values = ast.literal_eval(text)
    good = len(values) == 4 and all(0 <= v <= 1 for v in values) and values[0] < values[2] and values[1] < values[3]
    assert (parse_box(text) is not None) == good


@pytest.mark.parametrize(
    "a, b, overlap",
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1),
        ((0, 0, 2, 2), (1, 0, 3, 2), 1 / 3),
        ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7),
        ((0, 0, 4, 4), (1, 1, 2, 3), 1 / 8),
        ((0, 0, 1, 1), (2, 0, 3, 1), 0),
        ((0, 0, 1, 1), (2, 2, 3, 3), 0),
        ((0, 0, 1, 1), (1, 0, 2, 1), 0),
        ((0, 0, 0, 0), (0, 0, 0, 0), 0),
    ],
)
def test_overlap(a, b, overlap):
    assert box_iou(a, b) == box_iou(b, a) == pytest.approx(overlap)


def test_score_counts_wrong_and_invalid_apart():
    truth = (0.0, 0.0, 0.5, 0.5)
    predictions = [
        "[0.0, 0.0, 0.5, 0.5]",
        "[0.0, 0.0, 0.5, 0.25]",
        "[0.5, 0.5, 1.0, 1.0]",
        "there",
        "[0.0, 0.0, 0.5, 0.2]",
    ]
    score = score_grounding(predictions, [truth] * 5)
    assert (score.num_items, score.correct, score.wrong, score.invalid) == (5, 2, 2, 1)
    assert score.accuracy == 0.4 and score.invalid_share == 0.2
    assert score.mean_iou == pytest.approx((1 + 0.5 + 0.4) / 5)
    assert score_grounding(predictions, [truth] * 5, iou_threshold=0.25).correct == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((["a"], []), "1 predictions and 0 true boxes; there must be one box for each"),
        (([], []), "and at least one"),
        ((["a"], [(0, 0, 1, 1)], 0), "iou_threshold is 0, but must be above 0 and at most 1"),
        ((["a"], [(0, 0, 1, 1)], 50), "iou_threshold is 50"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        score_grounding(*arguments)
