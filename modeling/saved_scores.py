"""Scores that lie beside a saved model: read with a check of every number, since a card publishes them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .intervals import wilson_interval

TASKS = {  # task of a score: what the Hub calls it, what people do
    "vqa": ("visual-question-answering", "Visual question answering"),
    "textvqa": ("visual-question-answering", "Questions about text in pictures"),
    "grounding": ("image-text-to-text", "Localisation of what an expression refers to"),
    "classification": ("image-classification", "Image classification"),
}


@dataclass(frozen=True)
class Evaluation:
    """One score of the model. Scores, floors and shares are from 0 to 1.

    Attributes:
        task: "vqa", "textvqa", "grounding" or "classification".
        metric: what the score is, in words.
        data: what was asked, in words; None where nothing says so.
        items: None where nothing says how many.
        floors: what can be had without looking, by name.
        floor_source: what constants and mean box were chosen on.
        box_frame: of boxes, the frame they were compared in.
        iou_threshold: of boxes, the overlap that counts as right.
        kinds: (items, score) of each kind of question.
    """

    task: str
    metric: str
    score: float
    data: str | None = None
    items: int | None = None
    floors: Mapping[str, float] = field(default_factory=dict)
    floor_source: str | None = None
    box_frame: str | None = None
    iou_threshold: float | None = None
    kinds: Mapping[str, tuple[int, float]] = field(default_factory=dict)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval from the number of items."""
        return None if self.items is None else wilson_interval(self.score, self.items)


def read_scores(file: Path, content: Mapping[str, Any]) -> list[Evaluation]:
    """The scores of a file as `ssm-vlm evaluate` writes it.

    Raises:
        ValueError: something is missing, or a number is none that could be meant; file and key are named.
    """
    if not isinstance(content.get("data"), str | None):
        raise ValueError(f"{file}: data is {content['data']!r}; it must say in words what was asked.")
    try:
        return [_evaluation(file, f"scores.{name}", score, content) for name, score in content["scores"].items()]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} does not hold scores as `ssm-vlm evaluate` writes them ({error}).") from None


def _evaluation(file: Path, key: str, score: Mapping[str, Any], content: Mapping[str, Any]) -> Evaluation:
    if score["task"] not in TASKS:
        raise ValueError(f"{file}: {key}.task is {score['task']!r}; it must be one of {', '.join(TASKS)}.")
    kinds = {
        kind: (
            count(file, f"{key}.kinds.{kind}.num_items", of_kind["num_items"]),
            share(file, f"{key}.kinds.{kind}.score", of_kind["score"]),
        )
        for kind, of_kind in score["kinds"].items()
    }
    return Evaluation(
        task=score["task"],
        metric=score["metric"],
        score=share(file, f"{key}.score", score["score"]),
        data=content.get("data"),
        items=count(file, f"{key}.num_items", score["num_items"]),
        floors={name: share(file, f"{key}.floors.{name}", floor) for name, floor in score["floors"].items()},
        floor_source=score["floor_source"],
        box_frame=score.get("box_frame"),
        iou_threshold=score.get("iou_threshold"),
        kinds=kinds,
    )


def share(file: Path, key: str, value: Any) -> float:
    """The value, or a ValueError that names file and key unless it is a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:  # NaN is in no range
        raise ValueError(f"{file}: {key} is {value!r}; it must be a number from 0 to 1.")
    return value


def count(file: Path, key: str, value: Any) -> int:
    """The value, or a ValueError that names file and key unless it is a number of items."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{file}: {key} is {value!r}; it must be a whole number of at least 1.")
    return value


__all__ = ["TASKS", "Evaluation", "count", "read_scores", "share"]
