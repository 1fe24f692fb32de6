"""What a study leaves for people: the table as JSON and Markdown, a picture of samples, a one-page HTML report."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoImageProcessor

from ..training.recipe import RECIPE_FILE, RunDirectory
from .evaluate import Result
from .report_page import Bar, KindChart, Page, render_page
from .samples import choose_samples, draw_samples, judge, read_predictions
from .scores import score_answers
from .study_table import FLOOR_NAMES, StudyRow, markdown_table, notes, warnings
from .tasks import EvalItem

_PACKAGES = ("ssm-vlm", "torch", "transformers", "accelerate", "numpy", "pillow")


def write_report(
    folder: Path,
    rows: Sequence[StudyRow],
    results: Mapping[str, Result],
    items: Sequence[EvalItem],
    settings: Mapping[str, Any],
    seconds: Mapping[str, float],
    vlms: Mapping[str, RunDirectory],
) -> None:
    """Writes `table.json`, `table.md`, `samples.png` and `report.html` into `folder`.

    Args:
        folder: must exist.
        rows: one for each encoder.
        results: scores by encoder.
        items: what was asked.
        settings: of the study.
        seconds: by step.
        vlms: the finished run of each encoder's VLM.
    """
    predictions = {row.encoder: read_predictions(results[row.encoder].predictions) for row in rows}
    kinds = kind_charts(rows, results, items, predictions)
    versions = software_versions()
    table = {
        "rows": [asdict(row) for row in rows],
        "kinds": [asdict(kind) for kind in kinds],
        "warnings": warnings(rows),
        "notes": notes(rows),
        "settings": dict(settings),
        "seconds": dict(seconds),
        "versions": versions,
    }
    (folder / "table.json").write_text(json.dumps(table, indent=1) + "\n")
    (folder / "table.md").write_text(markdown_table(rows))

    samples = choose_samples(items)
    answers = {}
    for row in rows:
        image_processor = AutoImageProcessor.from_pretrained(vlms[row.encoder].path)
        answers[row.encoder] = [
            judge(item, predictions[row.encoder][item.id], image_processor, row.box_frame, row.iou_threshold)
            for item in samples
        ]
    draw_samples(samples, answers).save(folder / "samples.png", optimize=True)

    common, differing = compare_recipes({row.encoder: _recipe(vlms[row.encoder]) for row in rows})
    page = Page(
        rows=rows,
        kinds=kinds,
        losses={row.encoder: loss_curve(vlms[row.encoder].summary) for row in rows},
        seconds=seconds,
        settings=settings,
        recipe=common,
        differing=differing,
        versions=versions,
        samples_png=(folder / "samples.png").read_bytes(),
    )
    (folder / "report.html").write_text(render_page(page), encoding="utf-8")


def kind_charts(
    rows: Sequence[StudyRow],
    results: Mapping[str, Result],
    items: Sequence[EvalItem],
    predictions: Mapping[str, Mapping[str, str]],
) -> list[KindChart]:
    """Scores of every kind of question, and of localisation, beside what can be had without looking.

    Args:
        predictions: by encoder, then by item id.
    """
    blank = {row.encoder: _blank_predictions(results[row.encoder].predictions) for row in rows}
    by_kind: dict[str, list[EvalItem]] = {}
    for item in items:
        if item.task == "vqa":
            by_kind.setdefault(item.kind, []).append(item)
    charts = []
    for kind, of_kind in by_kind.items():
        scores = {row.encoder: score_answers("vqa", of_kind, predictions[row.encoder]) for row in rows}
        without = {
            name: None if said is None else score_answers("vqa", of_kind, said).score for name, said in blank.items()
        }
        charts.append(
            KindChart(
                title=kind,
                items=len(of_kind),
                floor=scores[rows[0].encoder].floors["constant_answer"],
                floor_name="best constant answer",
                bars=[Bar(name, score.score, without[name]) for name, score in scores.items()],
            )
        )
    boxes = {row.encoder: results[row.encoder].scores["grounding"] for row in rows}
    charts.append(
        KindChart(
            title="localisation",
            items=rows[0].localisation_items,
            floor=boxes[rows[0].encoder].floors["mean_box"],
            floor_name=FLOOR_NAMES["mean_box"],
            bars=[Bar(name, score.score, score.floors.get("blank_image")) for name, score in boxes.items()],
        )
    )
    return charts


def _blank_predictions(predictions: Path) -> dict[str, str] | None:
    """What the model said to blank pictures, from the file that `evaluate` writes beside the other, if it did."""
    path = predictions.with_suffix(f".blank{predictions.suffix}")
    return read_predictions(path) if path.is_file() else None


def loss_curve(summary: Mapping[str, Any]) -> list[tuple[int, float]]:
    """(step, loss) as the Trainer logged them; a run shorter than `logging_steps` has none."""
    return [(int(entry["step"]), float(entry["loss"])) for entry in summary.get("log", ())]


def _recipe(run: RunDirectory) -> dict[str, Any]:
    return yaml.safe_load((run.path / RECIPE_FILE).read_text())


def compare_recipes(recipes: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What all recipes have in common, and, by key, what each has that is not the same in all."""
    keys = sorted({key for recipe in recipes.values() for key in recipe})
    common: dict[str, Any] = {}
    differing: dict[str, dict[str, Any]] = {}
    for key in keys:
        values = {name: recipe.get(key) for name, recipe in recipes.items()}
        first, *others = values.values()
        if all(key in recipe for recipe in recipes.values()) and all(other == first for other in others):
            common[key] = first
        else:
            differing[key] = values
    return common, differing


def software_versions() -> dict[str, str]:
    """Of Python, the packages that compute, and the device."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}, "device": device}
