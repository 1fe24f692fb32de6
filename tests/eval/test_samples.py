"""The sheet of samples: which are chosen, how answers are judged and shown."""

import json

import numpy as np
import pytest
from PIL import Image

from ssm_vlm import LlavaStyleImageProcessor
from ssm_vlm.eval.drawing import PREDICTED_COLOUR, TRUE_COLOUR
from ssm_vlm.eval.grounding import Box
from ssm_vlm.eval.samples import (
    PARTLY,
    RIGHT,
    WRONG,
    choose_samples,
    draw_samples,
    judge,
    question_of,
    read_predictions,
    true_answer,
)
from ssm_vlm.eval.tasks import GROUNDING_PROMPT, VQA_PROMPT, EvalItem

PROCESSOR = LlavaStyleImageProcessor(geometry="letterbox", size=64, downsampling=[[8, "floor"]])
GREY = (60, 60, 60)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A picture 32 high and 64 wide: in the centred square of side 64, its rows start at 16."""
    path = tmp_path_factory.mktemp("pictures") / "wide.png"
    Image.new("RGB", (64, 32), GREY).save(path)
    return str(path)


def vqa(number, kind, image="x.png", answers=("2",) * 10, question="How many?"):
    return EvalItem(f"q{number}", image, VQA_PROMPT.replace("{question}", question), "vqa", kind, answers=answers)


def box(number, image="x.png", xyxy=(16, 0, 32, 16), kind="7", size=(32, 64)):
    prompt = GROUNDING_PROMPT.replace("{sentence}", "the red 7")
    return EvalItem(f"r{number}", image, prompt, "grounding", kind, box=Box(*xyxy), image_size=size)


def test_every_kind_is_among_the_samples():
    items = [vqa(n, kind) for n, kind in enumerate(["count"] * 50 + ["colour"] * 3 + ["digit"] * 20)]
    items += [box(n, kind=str(n % 10)) for n in range(30)]
    chosen = choose_samples(items, answers=7, boxes=4)
    assert [item.kind for item in chosen[:7]] == ["count"] * 3 + ["colour"] * 2 + ["digit"] * 2
    assert [item.task for item in chosen[7:]] == ["grounding"] * 4
    assert len({item.id for item in chosen}) == 11
    assert choose_samples(items, 7, 4) == chosen, "always the same"
    assert [item.id for item in chosen[:3]] != ["q0", "q1", "q2"], "by lot"


def test_fewer_items_than_samples():
    items = [vqa(0, "count"), vqa(1, "count"), box(0)]
    assert sorted(item.id for item in choose_samples(items)) == ["q0", "q1", "r0"]
    assert choose_samples([vqa(0, "count")]) == [vqa(0, "count")]


@pytest.mark.parametrize(
    ("said", "score", "verdict", "colour"),
    [
        ("2", 1.0, "right", RIGHT),
        ("Two.", 1.0, "right", RIGHT),
        ("3", 0.6, "0.6 right", PARTLY),
        ("", 0, "wrong", WRONG),
    ],
)
def test_answers(said, score, verdict, colour):
    answer = judge(vqa(0, "count", answers=("2",) * 8 + ("3",) * 2), said, PROCESSOR, "centered_square", 0.5)
    assert (answer.score, answer.verdict, answer.colour, answer.box) == (pytest.approx(score), verdict, colour, None)


@pytest.mark.parametrize(
    ("frame", "said", "verdict", "colour", "drawn"),
    [
        ("centered_square", "[0.25, 0.25, 0.5, 0.5]", "right, IoU 1.00", RIGHT, (16, 0, 32, 16)),
        ("raw", "[0.25, 0.0, 0.5, 0.5]", "right, IoU 1.00", RIGHT, (16, 0, 32, 16)),
        ("centered_square", "[0.375, 0.25, 0.625, 0.5]", "wrong, IoU 0.33", WRONG, (24, 0, 40, 16)),
        ("centered_square", "[0.25, 0.0, 0.5, 0.2]", "wrong, IoU 0.00", WRONG, (16, -16, 32, -3.2)),
        ("centered_square", "on the left", "no box", WRONG, None),
    ],
)
def test_boxes_are_put_back_on_the_raw_picture(wide, frame, said, verdict, colour, drawn):
    answer = judge(box(0, wide), said, PROCESSOR, frame, 0.5)
    assert (answer.verdict, answer.colour) == (verdict, colour)
    assert answer.box == (None if drawn is None else pytest.approx(drawn))


def test_threshold_counts():
    said = "[0.25, 0.25, 0.5, 0.375]"  # half of the true box
    item = box(0, __file__)
    verdicts = []
    for threshold in (0.5, 0.51):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ssm_vlm.eval.samples.load_image", lambda path: Image.new("RGB", (64, 32)))
            verdicts.append(judge(item, said, PROCESSOR, "centered_square", threshold).verdict)
    assert verdicts == ["right, IoU 0.50", "wrong, IoU 0.50"]


def test_questions_without_the_words_of_every_prompt():
    assert question_of(vqa(0, "count")) == "How many?"
    assert question_of(box(0)) == "the red 7"
    assert question_of(EvalItem("x", "x.png", "Just this", "vqa", "")) == "Just this"
    assert true_answer(vqa(0, "count", answers=("a", "b", "b", "a"))) == "a"
    assert true_answer(vqa(0, "count", answers=("a", "b", "b"))) == "b"


def test_predictions_of_evaluate(tmp_path):
    lines = [{"predictions": {"model": "x"}}, {"id": "q0", "prediction": "2\u2028é"}, {"id": "q1", "prediction": ""}]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    assert read_predictions(path) == {"q0": "2\u2028é", "q1": ""}


def pixels(picture, colour):
    return int((np.asarray(picture) == colour).all(-1).sum())


@pytest.mark.parametrize("models", [1, 2, 5])
def test_sheet(wide, models):
    samples = [vqa(0, "count", wide), box(0, wide)]
    said = [
        judge(samples[0], "2", PROCESSOR, "raw", 0.5),
        judge(samples[1], "[0, 0, 0.5, 0.9]", PROCESSOR, "raw", 0.5),
    ]
    sheet = draw_samples(samples, {f"model_{n}.toy": said for n in range(models)})
    right_answer = judge(samples[1], "[0.25, 0, 0.5, 0.5]", PROCESSOR, "raw", 0.5)
    other = draw_samples(samples, {f"model_{n}.toy": [said[0], right_answer] for n in range(models)})
    assert sheet.size == other.size
    assert sheet.width == draw_samples(samples, {"a": said}).width + (models - 1) * 242
    legend = 40 * 5  # pixels, at most
    assert pixels(sheet, TRUE_COLOUR) - legend > models * 100
    assert pixels(sheet, PREDICTED_COLOUR) - legend > models * 80
    assert pixels(other, RIGHT) > pixels(sheet, RIGHT)
    assert pixels(sheet, WRONG) > 0 == pixels(other, WRONG)


def test_sheet_survives_odd_answers_and_pictures(tmp_path):
    samples = []
    for number, size in enumerate([(1, 1), (3, 900), (900, 3), (640, 480)]):
        Image.new("RGB", size, GREY).save(tmp_path / f"{number}.png")
        path = str(tmp_path / f"{number}.png")
        samples += [
            vqa(number, "k" * 200, path, question="why " * 100, answers=("word" * 50,) * 10),
            box(number, path, (0, 0, *size), size=size[::-1]),
        ]
    said = [judge(item, "\ufffd" * 300 + "\n[[1", PROCESSOR, "raw", 0.5) for item in samples]
    empty = [judge(item, "", PROCESSOR, "raw", 0.5) for item in samples]
    sheet = draw_samples(samples, {"a" * 100: said, "b": empty})
    assert sheet.height < 8 * 260
