"""The same few questions put to every model: what each said, beside what is right, and as one picture."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from ..modeling.image_processing_llava_style import load_image
from .drawing import (
    PREDICTED_COLOUR,
    TRUE_COLOUR,
    Colour,
    LabelledBox,
    draw_boxes,
    drawn_size,
    font_for,
    shorten,
    text_width,
    wrap,
)
from .grounding import Box, box_iou, parse_box
from .scores import ANSWER_METRICS
from .study_table import short_names
from .tasks import GROUNDING_PROMPT, VQA_PROMPT, EvalItem, slim

RIGHT, PARTLY, WRONG = (10, 120, 50), (170, 100, 0), (190, 20, 30)
_INK, _FAINT, _PAPER, _RULE = (25, 27, 31), (95, 100, 110), (255, 255, 255), (216, 220, 226)
_TEXT, _SMALL, _ANSWER = 18, 15, 24  # sizes of letters, in pixels as all below
_PAD, _HEADING, _FOOT, _CAPTION, _INDENT = 12, 48, 36, 34, 14
_PICTURE = {"vqa": 128, "textvqa": 128, "grounding": 192}  # longer side
_COLUMN, _QUESTION = 230, 250  # widths
_MOST_LINES = 3


@dataclass(frozen=True)
class Answer:
    """What a model said to one item.

    Attributes:
        text: as it was said.
        score: from 0 to 1.
        verdict: in a few words.
        box: for localisation, in raw pixels; None where the answer is no box.
    """

    text: str
    score: float
    verdict: str
    box: Box | None = None

    @property
    def colour(self) -> Colour:
        return RIGHT if self.score >= 1 else PARTLY if self.score > 0 else WRONG


def read_predictions(path: Path) -> dict[str, str]:
    """What a model said by item id, from the file that `evaluate` keeps.

    Raises:
        FileNotFoundError: no such file.
    """
    with open(path, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return {row["id"]: row["prediction"] for row in rows if "prediction" in row}


def choose_samples(items: Sequence[EvalItem], answers: int = 6, boxes: int = 4) -> list[EvalItem]:
    """Samples of each kind of question, then of localisation; the same for the same items, whatever models say."""
    shuffled = slim(items, len(items))
    by_kind: dict[str, list[EvalItem]] = {item.kind: [] for item in items if item.task in ANSWER_METRICS}
    for item in shuffled:
        if item.task in ANSWER_METRICS:
            by_kind[item.kind].append(item)
    in_turn = [item for turn in zip_longest(*by_kind.values()) for item in turn if item is not None]
    order = list(by_kind)
    return [
        *sorted(in_turn[:answers], key=lambda item: order.index(item.kind)),
        *[item for item in shuffled if item.task == "grounding"][:boxes],
    ]


def judge(item: EvalItem, prediction: str, image_processor: Any, box_frame: str, iou_threshold: float) -> Answer:
    """Scores one answer as `evaluate` does.

    Args:
        image_processor: the model's, which knows the geometry.
        box_frame: the frame the model gives boxes in.
        iou_threshold: the overlap that counts as right.
    """
    if item.task in ANSWER_METRICS:
        score = ANSWER_METRICS[item.task](prediction, item.answers)
        return Answer(prediction, score, "right" if score >= 1 else f"{score:.1f} right" if score > 0 else "wrong")
    picture = load_image(item.image)
    geometry = image_processor.get_geometry(picture.height, picture.width)
    said = parse_box(prediction)
    if said is None:
        return Answer(prediction, 0.0, "no box")
    overlap = box_iou(said, geometry.to_frame(item.box, box_frame))
    right = overlap >= iou_threshold
    verdict = f"{'right' if right else 'wrong'}, IoU {overlap:.2f}"
    return Answer(prediction, float(right), verdict, Box(*geometry.from_frame(said, box_frame)))


def question_of(item: EvalItem) -> str:
    """The question, without the words that every prompt of its task has."""
    for template, blank in ((VQA_PROMPT, "{question}"), (GROUNDING_PROMPT, "{sentence}")):
        before, _, after = template.partition(blank)
        if item.prompt.startswith(before) and item.prompt.endswith(after):
            return item.prompt[len(before) : len(item.prompt) - len(after)]
    return item.prompt


def true_answer(item: EvalItem) -> str:
    """The answer most people gave; of equals, the one given first."""
    return max(item.answers, key=item.answers.count)


def draw_samples(samples: Sequence[EvalItem], answers: Mapping[str, Sequence[Answer]]) -> Image.Image:
    """A picture with a row for each sample and a column for each model.

    Args:
        samples: the items.
        answers: by model, one for each sample.
    """
    left = _PICTURE["vqa"] + _QUESTION + 3 * _PAD  # where the models' columns start
    width = left + (_COLUMN + _PAD) * len(answers)
    heights = [_height(item) for item in samples]
    sheet = Image.new("RGB", (width, _HEADING + sum(heights) + _FOOT), _PAPER)
    pen = ImageDraw.Draw(sheet)
    _write(pen, (_PAD, _PAD), "question", _TEXT + 2, _FAINT)
    columns = {model: left + place * (_COLUMN + _PAD) for place, model in enumerate(answers)}
    for model, name in short_names(list(answers)).items():
        _write(pen, (columns[model], _PAD), shorten(name, _COLUMN, _TEXT + 2), _TEXT + 2)
    top = _HEADING
    for place, (item, height) in enumerate(zip(samples, heights, strict=True)):
        pen.line((0, top, width, top), fill=_RULE, width=1)
        _ask(sheet, pen, top + _PAD, item)
        for model, x in columns.items():
            answer = answers[model][place]
            pen.rectangle((x, top + _PAD, x + 3, top + height - _PAD), fill=answer.colour)
            _CELLS[item.task](sheet, pen, x + _INDENT, top + _PAD, item, answer)
        top += height
    pen.line((0, top, width, top), fill=_RULE, width=1)
    _legend(pen, (_PAD, top + _PAD // 2))
    return sheet


def _height(item: EvalItem) -> int:
    """Pixels that a row takes."""
    side = _PICTURE[item.task]
    if item.task == "grounding":
        return drawn_size(load_image(item.image), side, side)[0] + _CAPTION + 2 * _PAD
    return side + 2 * _PAD


def _answer_cell(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, x: int, top: int, item: EvalItem, answer: Answer
) -> None:
    """What a model said, and whether it is right."""
    for line in wrap(answer.text, _COLUMN - _INDENT, _ANSWER)[:_MOST_LINES] or ["(nothing)"]:
        _write(pen, (x, top), line, _ANSWER)
        top += _ANSWER + 6
    _pill(pen, (x, top + 4), answer)


def _box_cell(sheet: Image.Image, pen: ImageDraw.ImageDraw, x: int, top: int, item: EvalItem, answer: Answer) -> None:
    """The picture with the true box and the model's own."""
    boxes = [] if item.box is None else [LabelledBox(item.box, colour=TRUE_COLOUR)]
    if answer.box is not None:
        boxes.append(LabelledBox(answer.box, colour=PREDICTED_COLOUR, dashed=True))
    side = _PICTURE["grounding"]
    picture = draw_boxes(load_image(item.image), boxes, enlarge_to=side, shrink_to=side)
    sheet.paste(picture, (x, top))
    top += picture.height + 8
    end = _pill(pen, (x, top), answer)
    if answer.box is None:
        room = x + _COLUMN - _INDENT - end - 8
        _write(pen, (end + 8, top + 3), shorten(answer.text, room, _SMALL), _SMALL, _FAINT)


_CELLS = dict.fromkeys(ANSWER_METRICS, _answer_cell) | {"grounding": _box_cell}


def _ask(sheet: Image.Image, pen: ImageDraw.ImageDraw, top: int, item: EvalItem) -> None:
    """The picture, the kind of question, the question, and, where it is a text, the true answer."""
    side = _PICTURE["vqa"]
    picture = draw_boxes(load_image(item.image), [], enlarge_to=side, shrink_to=side)
    sheet.paste(picture, (_PAD + (side - picture.width) // 2, top))
    x, y = side + 2 * _PAD, top
    kind = "localisation" if item.task == "grounding" else item.kind
    _write(pen, (x, y), shorten(kind, _QUESTION, _SMALL), _SMALL, _FAINT)
    y += _SMALL + 8
    for line in wrap(question_of(item), _QUESTION, _TEXT)[:_MOST_LINES]:
        _write(pen, (x, y), line, _TEXT)
        y += _TEXT + 6
    if item.answers:
        _write(pen, (x, y + 4), shorten(f"true: {true_answer(item)}", _QUESTION, _TEXT), _TEXT, RIGHT)


def _pill(pen: ImageDraw.ImageDraw, corner: tuple[float, float], answer: Answer) -> float:
    """The verdict on its colour; returns where it ends."""
    x, y = corner
    end = x + text_width(answer.verdict, _SMALL) + 14
    pen.rounded_rectangle((x, y, end, y + _SMALL + 8), radius=6, fill=answer.colour)
    _write(pen, (x + 7, y + 3), answer.verdict, _SMALL, _PAPER)
    return end


def _legend(pen: ImageDraw.ImageDraw, corner: tuple[int, int]) -> None:
    x, y = corner
    for colour, dashed, text in ((TRUE_COLOUR, False, "true box"), (PREDICTED_COLOUR, True, "the model's box")):
        for start in range(0, 40, 10 if dashed else 5):
            pen.line((x + start, y + 10, x + start + 5, y + 10), fill=colour, width=4)
        _write(pen, (x + 50, y), text, _SMALL)
        x += 60 + round(text_width(text, _SMALL)) + 2 * _PAD
    _write(pen, (x, y), "Samples are drawn by lot, not by what was said.", _SMALL, _FAINT)


def _write(pen: ImageDraw.ImageDraw, corner: tuple[float, float], text: str, size: int, colour: Colour = _INK) -> None:
    pen.text(corner, text, font=font_for(text, size), fill=colour)
