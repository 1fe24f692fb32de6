"""Readers of benchmark files: what to ask about which image, and what is right."""

import io
import json
import os
import pickle
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .grounding import Box
from .vqa_accuracy import NUMBER_OF_ANSWERS

VQA_PROMPT = "{question}\nAnswer the question using a single word or phrase."
GROUNDING_PROMPT = 'Please provide the bounding box coordinate of the region this sentence describes: "{sentence}"'

# File name of an image by the "data_type" that a VQA questions file says it is about.
VQA_IMAGE_PATTERNS = {
    "mscoco": "COCO_{data_subtype}_{image_id:012d}.jpg",
    "abstract_v002": "abstract_v002_{data_subtype}_{image_id:012d}.png",
    "digitscenes": "DigitScenes_{data_subtype}_{image_id:012d}.png",
}
_BOX_TOLERANCE = 1.0  # pixels: boxes in COCO are rounded and may stick out of the image by less


@dataclass(frozen=True)
class EvalItem:
    """One thing to ask a model.

    Attributes:
        id: unique within a list of items.
        image: path of the picture.
        prompt: the user's message, without the picture.
        task: "vqa" (scored against `answers`) or "grounding" (scored against `box`).
        kind: the question type or object category: what scores and floors are split by.
        answers: the ten human answers.
        box: the true box, xyxy in raw pixels.
        image_size: (height, width) of the picture in raw pixels, where the data set says.
    """

    id: str
    image: str
    prompt: str
    task: str
    kind: str
    answers: tuple[str, ...] = ()
    box: Box | None = None
    image_size: tuple[int, int] | None = None


def read_vqa(
    questions_path: str | os.PathLike,
    annotations_path: str | os.PathLike,
    image_root: str | os.PathLike,
    *,
    image_pattern: str | None = None,
    prompt: str = VQA_PROMPT,
) -> list[EvalItem]:
    """Reads a VQA v2 question file and its annotation file.

    Args:
        questions_path: `{"data_type", "data_subtype", "questions": [{"question_id", "image_id", "question"}, ...]}`.
        annotations_path: `{"annotations": [{"question_id", "image_id", "question_type", "answers": [{"answer"}, ten
            of them]}, ...]}`; it may hold more questions than are asked.
        image_root: the folder of the images.
        image_pattern: name of an image below `image_root`, with {image_id}, {data_type} and {data_subtype} (for
            example "{image_id:012d}.jpg"); None for the name that the data type has in `VQA_IMAGE_PATTERNS`.
        prompt: the user's message, {question} in the place of the question (paper_protocol section 5.3).

    Raises:
        ValueError: naming the file, the question and what is wrong with it.
        FileNotFoundError: no such file.
    """
    asked, answered = _read_json(questions_path), _read_json(annotations_path)
    questions = _list_in(asked, "questions", questions_path)
    annotations = {
        _get(row, "question_id", f"{annotations_path}: annotation {number}"): row
        for number, row in enumerate(_list_in(answered, "annotations", annotations_path))
    }
    names = {"data_type": asked.get("data_type"), "data_subtype": asked.get("data_subtype")}
    if image_pattern is None:
        if names["data_type"] not in VQA_IMAGE_PATTERNS:
            raise ValueError(
                f"{questions_path}: images of data_type {names['data_type']!r} have no known file names "
                f"(known are {', '.join(VQA_IMAGE_PATTERNS)}); give an image_pattern."
            )
        image_pattern = VQA_IMAGE_PATTERNS[names["data_type"]]

    items: dict[str, EvalItem] = {}
    for number, row in enumerate(questions):
        question_id = _get(row, "question_id", f"{questions_path}: question {number}")
        where = f"{questions_path}: question {question_id}"
        if question_id not in annotations:
            raise ValueError(f"{where} has no annotation in {annotations_path}.")
        annotation, annotated = annotations[question_id], f"{annotations_path}: annotation of question {question_id}"
        image_id = _get(row, "image_id", where)
        if annotation.get("image_id", image_id) != image_id:
            raise ValueError(f"{where} is about image {image_id}, but its annotation about {annotation['image_id']}.")
        answers = tuple(_get(answer, "answer", annotated) for answer in _get(annotation, "answers", annotated))
        if len(answers) != NUMBER_OF_ANSWERS:
            raise ValueError(f"{annotated} has {len(answers)} answers, but VQA v2 has {NUMBER_OF_ANSWERS}.")
        item = EvalItem(
            id=f"vqa-{question_id}",
            image=os.path.join(image_root, _fill(image_pattern, where, image_id=image_id, **names)),
            prompt=prompt.replace("{question}", _get(row, "question", where)),
            task="vqa",
            kind=str(annotation.get("question_type", "")),
            answers=answers,
        )
        if item.id in items:
            raise ValueError(f"{where} comes twice.")
        items[item.id] = item
    return list(items.values())


def read_refcoco(
    refs_path: str | os.PathLike,
    instances_path: str | os.PathLike,
    image_root: str | os.PathLike,
    split: str,
    *,
    prompt: str = GROUNDING_PROMPT,
) -> list[EvalItem]:
    """Reads referring expressions in RefCOCO's format; one item for each sentence.

    Args:
        refs_path: `refs(SPLITBY).p`, read without running any code in it, or the same content as `.json`: a list of
            `{"ref_id", "ann_id", "image_id", "split", "sentences": [{"sent_id", "sent"}, ...]}`.
        instances_path: COCO's `instances.json` with "images", "annotations" (boxes as x, y, width, height in pixels)
            and "categories".
        image_root: the folder of the images, whose names are those in `instances.json`.
        split: "val", "testA", ...
        prompt: the user's message, {sentence} in the place of the expression (paper_protocol section 5.3).

    Raises:
        ValueError: naming the file, the ref and what is wrong with it; among others a box outside its image.
        FileNotFoundError: no such file.
    """
    refs = _read_pickle(refs_path) if Path(refs_path).suffix == ".p" else _read_json(refs_path, list)
    if not isinstance(refs, list):
        raise ValueError(f"{refs_path}: holds no list of refs.")
    instances = _read_json(instances_path)
    tables = {
        name: {
            _get(row, "id", f"{instances_path}: {name} {number}"): row
            for number, row in enumerate(_list_in(instances, name, instances_path))
        }
        for name in ("images", "annotations", "categories")
    }

    items: dict[str, EvalItem] = {}
    splits: set[str] = set()
    for number, ref in enumerate(refs):
        where = f"{refs_path}: ref {_get(ref, 'ref_id', f'{refs_path}: ref {number}')}"
        splits.add(_get(ref, "split", where))
        if ref["split"] != split:
            continue
        found = {}
        for name, key in (("annotations", "ann_id"), ("images", "image_id")):
            if _get(ref, key, where) not in tables[name]:
                raise ValueError(f"{where}: {instances_path} has no {name[:-1]} with id {ref[key]}.")
            found[name] = tables[name][ref[key]]
        annotation, image = found["annotations"], found["images"]
        named = f"{instances_path}: image {ref['image_id']}"
        size = (_get(image, "height", named), _get(image, "width", named))
        box = _read_box(annotation, size, f"{instances_path}: annotation {ref['ann_id']}")
        category = tables["categories"].get(annotation.get("category_id"), {})
        for sentence in _get(ref, "sentences", where):
            item = EvalItem(
                id=f"ref-{_get(sentence, 'sent_id', where)}",
                image=os.path.join(image_root, _get(image, "file_name", named)),
                prompt=prompt.replace("{sentence}", _get(sentence, "sent", where)),
                task="grounding",
                kind=str(category.get("name", "")),
                box=box,
                image_size=size,
            )
            if item.id in items:
                raise ValueError(f"{where}: the sentence {sentence['sent_id']} comes twice.")
            items[item.id] = item
    if not items:
        known = ", ".join(sorted(map(str, splits))) or "none"
        raise ValueError(f"{refs_path}: has no sentence in the split {split!r}; its splits are {known}.")
    return list(items.values())


def slim(items: Sequence[EvalItem], number: int, seed: int = 21) -> list[EvalItem]:
    """The first `number` items after a shuffle by `seed`; the same items for the same list (paper_protocol 5.2)."""
    if number < 1:
        raise ValueError(f"number is {number}, but must be at least 1.")
    order = list(items)
    random.Random(seed).shuffle(order)
    return order[:number]


def _read_box(annotation: dict, size: tuple[int, int], where: str) -> Box:
    """COCO's x, y, width, height -> xyxy, held to the image."""
    bbox = _get(annotation, "bbox", where)
    try:
        x, y, width, height = map(float, bbox)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: the bbox {bbox!r} is not x, y, width and height in pixels.") from error
    box = Box(x, y, x + width, y + height)
    inside = min(box.x1, box.y1) >= -_BOX_TOLERANCE
    inside &= box.x2 <= size[1] + _BOX_TOLERANCE and box.y2 <= size[0] + _BOX_TOLERANCE
    if not (width > 0 and height > 0 and inside):
        raise ValueError(
            f"{where}: the bbox {bbox!r} (x, y, width, height) is empty or sticks out of its image, "
            f"which is {size[0]} pixels high and {size[1]} wide."
        )
    return box


def _fill(pattern: str, where: str, **values: Any) -> str:
    try:
        return pattern.format(**values)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"{where}: the image pattern {pattern!r} cannot be filled in with "
            f"{', '.join(f'{name} {value!r}' for name, value in values.items())}."
        ) from error


def _get(row: Any, key: str, where: str) -> Any:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: is {row!r:.60}, not an object.")
    if key not in row:
        raise ValueError(f"{where}: the key {key!r} is missing.")
    return row[key]


def _list_in(content: dict, key: str, path: str | os.PathLike) -> list:
    rows = _get(content, key, str(path))
    if not isinstance(rows, list):
        raise ValueError(f"{path}: the key {key!r} holds no list.")
    return rows


def _read_json(path: str | os.PathLike, kind: type = dict) -> Any:
    try:
        content = json.loads(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file.") from error
    except ValueError as error:
        raise ValueError(f"{path}: is not valid JSON ({error}).") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path}: is not a JSON {'object' if kind is dict else 'array'}.")
    return content


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers, text and numbers, and refuses everything that would need a class or function."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, but only containers, text and numbers are read")


def _read_pickle(path: str | os.PathLike) -> Any:
    """RefCOCO's refs were pickled by Python 2, so its byte strings are read as UTF-8."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file.") from error
    try:
        return _PlainUnpickler(io.BytesIO(data), encoding="utf-8", errors="replace").load()
    except Exception as error:  # a broken pickle can raise almost anything
        raise ValueError(f"{path}: cannot be read as a pickle of plain data ({error}).") from error
