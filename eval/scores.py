"""What a set of answers is worth, and what is worth nothing: scores by kind of question beside their floors."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .grounding import Box, score_grounding
from .tasks import EvalItem
from .vqa_accuracy import textvqa_accuracy, vqa_accuracy

ANSWER_METRICS = {"vqa": vqa_accuracy, "textvqa": textvqa_accuracy}
TASKS = (*ANSWER_METRICS, "grounding")


@dataclass(frozen=True)
class KindScore:
    """Score of the items of one kind."""

    num_items: int
    score: float


@dataclass(frozen=True)
class TaskScore:
    """Scores of one task, from 0 to 1.

    Attributes:
        task: "vqa", "textvqa" or "grounding".
        metric: what `score` is, in words.
        num_items: items scored.
        score: mean over all items.
        kinds: the same for each kind of question or object.
        floors: what can be had without looking: "constant_answer" (the best single answer), "constant_answer_per_kind"
            (the best for each kind), "mean_box", and "blank_image" (the same model, shown a picture of one colour)
            where that was run.
        floor_source: where constants and mean box come from: "other items" (those given for the purpose, say of the
            training set) or "the scored items" themselves, which makes them a little too good.
        invalid_share: for grounding, the share of answers that are no box.
        mean_iou: for grounding, over all items, 0 where the answer is no box.
        box_frame: for grounding, the frame in which true boxes were compared.
        iou_threshold: for grounding, the overlap that counts as right.
    """

    task: str
    metric: str
    num_items: int
    score: float
    kinds: dict[str, KindScore]
    floors: dict[str, float]
    floor_source: str
    invalid_share: float | None = None
    mean_iou: float | None = None
    box_frame: str | None = None
    iou_threshold: float | None = None


@dataclass(frozen=True)
class BoxFrame:
    """How true boxes, in raw pixels, become the normalised boxes that answers are compared with.

    Attributes:
        image_processor: gives the geometry of a picture of a raw size.
        name: a frame of `Geometry.to_frame`.
        sizes: raw (height, width) by item id, for items that do not say it themselves.
    """

    image_processor: Any
    name: str
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def box_of(self, item: EvalItem) -> Box:
        size = item.image_size or self.sizes.get(item.id)
        if size is None:
            raise ValueError(f"The item {item.id!r} has no image_size, so its box cannot be put into a frame.")
        return Box(*self.image_processor.get_geometry(*size).to_frame(item.box, self.name))


def score_answers(
    task: str, items: Sequence[EvalItem], predictions: Mapping[str, str], floor_items: Sequence[EvalItem] | None = None
) -> TaskScore:
    """Scores short answers.

    Args:
        task: the metric, one of `ANSWER_METRICS`.
        items: at least one.
        predictions: what the model said, by item id.
        floor_items: items whose answers the constants are chosen by; None for `items`.
    """
    metric = ANSWER_METRICS[task]
    scores = {item.id: metric(predictions[item.id], item.answers) for item in items}
    source = items if floor_items is None else floor_items
    best_of_all = _best_answer(metric, source)
    best_by_kind = {kind: _best_answer(metric, group) for kind, group in _by_kind(source).items()}
    floors = {
        "constant_answer": _mean(metric(best_of_all, item.answers) for item in items),
        "constant_answer_per_kind": _mean(
            metric(best_by_kind.get(item.kind, best_of_all), item.answers) for item in items
        ),
    }
    return TaskScore(
        task=task,
        metric=f"{task} accuracy against ten answers",
        num_items=len(items),
        score=_mean(scores.values()),
        kinds={
            kind: KindScore(len(group), _mean(scores[item.id] for item in group))
            for kind, group in _by_kind(items).items()
        },
        floors=floors,
        floor_source=_source_name(floor_items),
    )


def score_boxes(
    items: Sequence[EvalItem],
    predictions: Mapping[str, str],
    frame: BoxFrame,
    iou_threshold: float,
    floor_items: Sequence[EvalItem] | None = None,
) -> TaskScore:
    """Scores boxes.

    Args:
        items: at least one.
        predictions: what the model said, by item id.
        frame: the frame the model was taught to give boxes in.
        iou_threshold: see `score_grounding`.
        floor_items: items whose boxes the mean box is taken of; None for `items`.
    """
    truth = {item.id: frame.box_of(item) for item in items}

    def score(group: Sequence[EvalItem]):
        return score_grounding(
            [predictions[item.id] for item in group], [truth[item.id] for item in group], iou_threshold
        )

    source = list(truth.values()) if floor_items is None else [frame.box_of(item) for item in floor_items]
    mean_box = Box(*(_mean(side) for side in zip(*source, strict=True)))
    floor = score_grounding([str(list(mean_box))] * len(items), list(truth.values()), iou_threshold)
    overall = score(items)
    return TaskScore(
        task="grounding",
        metric=f"share of boxes with an overlap (IoU) of at least {iou_threshold:g}",
        num_items=len(items),
        score=overall.accuracy,
        kinds={kind: KindScore(len(group), score(group).accuracy) for kind, group in _by_kind(items).items()},
        floors={"mean_box": floor.accuracy},
        floor_source=_source_name(floor_items),
        invalid_share=overall.invalid_share,
        mean_iou=overall.mean_iou,
        box_frame=frame.name,
        iou_threshold=iou_threshold,
    )


def _best_answer(metric, items: Sequence[EvalItem]) -> str:
    """The one human answer that would score most if it were always given; the first in the alphabet among equals."""
    gains: dict[str, float] = defaultdict(float)
    for item in items:
        for answer in set(item.answers):
            gains[answer] += metric(answer, item.answers)
    return max(sorted(gains), key=gains.__getitem__)


def _by_kind(items: Sequence[EvalItem]) -> dict[str, list[EvalItem]]:
    groups: dict[str, list[EvalItem]] = defaultdict(list)
    for item in items:
        groups[item.kind].append(item)
    return dict(sorted(groups.items()))


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def _source_name(floor_items: Sequence[EvalItem] | None) -> str:
    return "the scored items" if floor_items is None else "other items"
