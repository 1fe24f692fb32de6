"""Scores by kind, and the floors that stand beside them."""

import pytest

from ssm_vlm import LlavaStyleImageProcessor
from ssm_vlm.eval.grounding import Box
from ssm_vlm.eval.scores import BoxFrame, KindScore, score_answers, score_boxes
from ssm_vlm.eval.tasks import EvalItem

PROCESSOR = LlavaStyleImageProcessor(geometry="letterbox", size=16, downsampling=[[8, "floor"]])


def vqa(number, kind, answer, others=()):
    answers = (*[answer] * (10 - len(others)), *others)
    return EvalItem(f"q{number}", f"{number}.png", f"question {number}", "vqa", kind, answers=answers)


ITEMS = [vqa(0, "how many", "2"), vqa(1, "how many", "2"), vqa(2, "how many", "3", ["4"]), vqa(3, "is it", "yes")]


def test_answers_by_kind_and_their_floors():
    predictions = {"q0": "2", "q1": "five", "q2": "Three.", "q3": "no"}
    score = score_answers("vqa", ITEMS, predictions)
    assert (score.num_items, score.score) == (4, 0.5)
    assert score.kinds == {"how many": KindScore(3, pytest.approx(2 / 3)), "is it": KindScore(1, 0.0)}
    assert score.floors == {"constant_answer": 0.5, "constant_answer_per_kind": 0.75}
    assert score.floor_source == "the scored items"
    assert list(score_answers("vqa", ITEMS[::-1], predictions).kinds) == ["how many", "is it"]
    assert score.box_frame is score.invalid_share is None


def test_constants_from_other_items():
    """A kind they lack gets their best answer of all."""
    training = [vqa(0, "is it", "no"), vqa(1, "is it", "no"), vqa(2, "is it", "yes"), vqa(3, "what", "cat")]
    scored = [vqa(4, "is it", "yes"), vqa(5, "is it", "no"), vqa(6, "what", "cat"), vqa(7, "where", "no")]
    score = score_answers("vqa", scored, {item.id: "" for item in scored}, training)
    assert score.floors == {"constant_answer": 0.5, "constant_answer_per_kind": 0.75}
    assert score.floor_source == "other items" and score.score == 0


def test_best_constant_counts_degrees_of_agreement():
    """The word "cat" is never the first choice, but three people say it every time."""
    items = [vqa(n, "what", answer, ["cat"] * 4) for n, answer in enumerate(["dog", "bird", "fish"])]
    score = score_answers("vqa", items, {item.id: "" for item in items})
    assert score.floors["constant_answer"] == 1


def test_textvqa_has_its_own_rule():
    items = [vqa(0, "text", "yes")]
    assert score_answers("textvqa", items, {"q0": "Yes."}).score == 1
    assert score_answers("vqa", items, {"q0": "Yes."}).score == 0


def box(number, kind, xyxy, size=None):
    return EvalItem(f"r{number}", f"{number}.png", "where", "grounding", kind, box=Box(*xyxy), image_size=size)


# A picture 20 high and 40 wide: in the centred square of side 40, its rows start at 10.
WIDE = [
    box(0, "cat", (0, 0, 20, 20), (20, 40)),
    box(1, "dog", (20, 0, 40, 20)),
    box(2, "dog", (20, 0, 40, 20), (20, 40)),
]
SIZES = {"r1": (20, 40)}
CENTRED = {"r0": "[0, 0.25, 0.5, 0.75]", "r1": "[0.5, 0.25, 1, 0.75]", "r2": "a dog"}
RAW = {"r0": "[0, 0, 0.5, 1]", "r1": "[0.5, 0, 1, 1]", "r2": "[0, 0, 0.5, 1]"}


def test_boxes_in_the_frame_they_were_taught_in():
    score = score_boxes(WIDE, CENTRED, BoxFrame(PROCESSOR, "centered_square", SIZES), 0.6)
    assert score.score == pytest.approx(2 / 3) == score.mean_iou
    assert score.kinds == {"cat": KindScore(1, 1.0), "dog": KindScore(2, 0.5)}
    assert score.invalid_share == pytest.approx(1 / 3)
    assert (score.box_frame, score.iou_threshold) == ("centered_square", 0.6)
    assert score_boxes(WIDE, CENTRED, BoxFrame(PROCESSOR, "raw", SIZES), 0.6).score == 0
    assert score_boxes(WIDE, RAW, BoxFrame(PROCESSOR, "raw", SIZES), 0.6).score == pytest.approx(2 / 3)
    assert score_boxes(WIDE, CENTRED, BoxFrame(PROCESSOR, "canvas", SIZES), 0.6).score == pytest.approx(2 / 3)


def test_mean_box():
    frame = BoxFrame(PROCESSOR, "raw", SIZES)
    assert score_boxes(WIDE, RAW, frame, 0.3).floors == {"mean_box": pytest.approx(2 / 3)}  # [1/3, 0, 5/6, 1]
    other = score_boxes(WIDE, RAW, frame, 0.3, [box(9, "cat", (0, 0, 20, 20), (20, 40))])
    assert other.floors == {"mean_box": pytest.approx(1 / 3)} and other.floor_source == "other items"


def test_a_box_needs_the_size_of_its_picture():
    with pytest.raises(ValueError, match="The item 'r1' has no image_size, so its box cannot be put into a frame"):
        score_boxes(WIDE, RAW, BoxFrame(PROCESSOR, "raw"), 0.5)
