"""Boxes in a model's answers: reading them, overlap, and accuracy with unreadable answers counted apart."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
_BOX = re.compile(rf"\[\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,?\s*\]", re.ASCII)


class Box(NamedTuple):
    """Left, top, right and bottom; the unit and the frame are said where a box is used."""

    x1: float
    y1: float
    x2: float
    y2: float


def parse_box(text: str) -> Box | None:
    """The box an answer consists of, or None where it is not one.

    As strict as the paper's scorer (paper_protocol section 5.5): the answer is one list of four numbers in square
    brackets and nothing else but white space, every number lies in [0, 1], x1 < x2 and y1 < y2.
    """
    match = _BOX.fullmatch(text.strip())
    if match is None:
        return None
    box = Box(*map(float, match.groups()))
    return box if 0 <= box.x1 < box.x2 <= 1 and 0 <= box.y1 < box.y2 <= 1 else None


def box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two xyxy boxes in the same frame and unit; 0 where both are empty."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0.0) * max(height, 0.0)
    together = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap
    return overlap / together if together > 0 else 0.0


@dataclass(frozen=True)
class GroundingScore:
    """Outcome of a set of grounding answers.

    Attributes:
        num_items: answers in all; `correct + wrong + invalid`.
        correct: boxes that overlap the true one enough.
        wrong: boxes that do not.
        invalid: answers that are no box: failures of format, not of localisation.
        mean_iou: over all answers, 0 for invalid ones.
        iou_threshold: the overlap, from 0 to 1, that counts as correct.
    """

    num_items: int
    correct: int
    wrong: int
    invalid: int
    mean_iou: float
    iou_threshold: float

    @property
    def accuracy(self) -> float:
        """Share of all answers that are correct: the paper's Loc score, in [0, 1]."""
        return self.correct / self.num_items

    @property
    def invalid_share(self) -> float:
        return self.invalid / self.num_items


def score_grounding(
    predictions: Sequence[str], boxes: Sequence[Sequence[float]], iou_threshold: float = 0.5
) -> GroundingScore:
    """Scores answers against true boxes.

    Args:
        predictions: what the model said, one text an item.
        boxes: the true boxes, normalised xyxy in the frame that the model was taught.
        iou_threshold: RefCOCO counts an overlap of at least 0.5, OCID-Ref of at least 0.25.

    Raises:
        ValueError: no item, lists of different lengths, or a threshold outside (0, 1].
    """
    if len(predictions) != len(boxes) or not boxes:
        raise ValueError(
            f"There are {len(predictions)} predictions and {len(boxes)} true boxes; "
            "there must be one box for each prediction, and at least one."
        )
    if not 0 < iou_threshold <= 1:
        raise ValueError(f"iou_threshold is {iou_threshold}, but must be above 0 and at most 1.")
    parsed = [parse_box(prediction) for prediction in predictions]
    overlaps = [0.0 if box is None else box_iou(box, truth) for box, truth in zip(parsed, boxes, strict=True)]
    invalid = parsed.count(None)
    correct = sum(overlap >= iou_threshold for overlap in overlaps)
    return GroundingScore(
        num_items=len(boxes),
        correct=correct,
        wrong=len(boxes) - correct - invalid,
        invalid=invalid,
        mean_iou=sum(overlaps) / len(boxes),
        iou_threshold=iou_threshold,
    )
