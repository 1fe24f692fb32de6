"""The study's table: one row an encoder, floors and warnings at the foot; for the terminal and as Markdown."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..modeling.intervals import wilson_interval
from .evaluate import Result
from .scores import TaskScore

MARGIN = 0.05  # a score this little above a floor counts as not above it
_GUESSING = {"vqa": ("constant_answer_per_kind", "blank_image"), "grounding": ("mean_box", "blank_image")}
TASK_NAMES = {"vqa": "VQA", "grounding": "Loc"}
FLOOR_NAMES = {
    "constant_answer": "best constant",
    "constant_answer_per_kind": "best constant per kind",
    "mean_box": "mean box",
    "blank_image": "blank pictures",
}
TOY_NOTE = "Ten symbols on plain canvases prove the plumbing, not the science."
_OF_ONE_MODEL = "blank_image"  # the floor that the model itself sets; the others are the data's


@dataclass(frozen=True)
class StudyRow:
    """What is known of one encoder. Scores and shares are from 0 to 1.

    Attributes:
        parameters: of the encoder, up to the tap.
        flops: for one picture, up to the tap; a multiply and an add are two.
        tokens: image tokens of one picture.
        accuracy: of the encoder's own classification.
        overall: mean over all items of both tasks, that is VQA and Loc weighted by their number of items.
        invalid_boxes: share of answers to localisation that are no box.
        seconds: for pretraining the encoder, training the VLM and evaluating it.
        floors: by "task: floor".
        floor_source: what constants and mean box were chosen on.
        warnings: floors that the model does not beat, one text for each task.
    """

    encoder: str
    parameters: int
    flops: int
    tokens: int
    accuracy: float
    vqa: float
    localisation: float
    overall: float
    invalid_boxes: float
    seconds: float
    vqa_items: int
    localisation_items: int
    floors: dict[str, float]
    floor_source: str
    warnings: tuple[str, ...]
    kinds: dict[str, float]
    mean_iou: float
    box_frame: str
    iou_threshold: float

    @classmethod
    def of(
        cls, encoder: str, *, parameters: int, flops: int, tokens: int, accuracy: float, result: Result, seconds: float
    ) -> "StudyRow":
        """A row from the costs of an encoder and the scores of its VLM."""
        vqa, boxes = result.scores["vqa"], result.scores["grounding"]
        items = vqa.num_items + boxes.num_items
        floors = {f"{score.task}: {name}": floor for score in (vqa, boxes) for name, floor in score.floors.items()}
        return cls(
            encoder=encoder,
            parameters=parameters,
            flops=flops,
            tokens=tokens,
            accuracy=accuracy,
            vqa=vqa.score,
            localisation=boxes.score,
            overall=(vqa.score * vqa.num_items + boxes.score * boxes.num_items) / items,
            invalid_boxes=boxes.invalid_share or 0.0,
            seconds=seconds,
            vqa_items=vqa.num_items,
            localisation_items=boxes.num_items,
            floors=floors,
            floor_source=vqa.floor_source,
            warnings=(*_not_beaten(vqa), *_not_beaten(boxes)),
            kinds={kind: score.score for kind, score in vqa.kinds.items()},
            mean_iou=boxes.mean_iou or 0.0,
            box_frame=boxes.box_frame or "",
            iou_threshold=boxes.iou_threshold or 0.0,
        )


def _not_beaten(score: TaskScore) -> list[str]:
    """One text that names every floor of the task that is not beaten by `MARGIN`, or none."""
    floors = [
        f"{100 * score.floors[name]:.1f} ({FLOOR_NAMES[name]})"
        for name in _GUESSING[score.task]
        if name in score.floors and not score.score >= score.floors[name] + MARGIN
    ]
    if not floors:
        return []
    return [
        f"{TASK_NAMES[score.task]} {100 * score.score:.1f} is not {100 * MARGIN:g} points above {' or '.join(floors)}"
    ]


@dataclass(frozen=True)
class Column:
    """A column of numbers.

    Attributes:
        heading: short words, the unit last; "- " where a narrow heading may be broken.
        value: the number.
        form: number -> text.
        better: of two models that learned, the better one has the larger (max) or smaller (min) value; None where
            there is no better.
    """

    heading: str
    value: Callable[[StudyRow], float]
    form: Callable[[float], str] = str
    better: Callable[[Sequence[float]], float] | None = None


def columns(rows: Sequence[StudyRow]) -> list[Column]:
    """What every form of the table shows beside the encoders' names, with the unit of FLOPs that suits all rows."""
    unit, size = ("G", 1e9) if min(row.flops for row in rows) >= 1e9 else ("M", 1e6)
    return [
        Column("params M", lambda row: row.parameters / 1e6, _three_digits),
        Column(f"{unit}FLOPs", lambda row: row.flops / size, lambda value: f"{value:.0f}"),
        Column("tokens", lambda row: row.tokens),
        Column("cls acc", lambda row: row.accuracy, _per_cent, max),
        Column("VQA", lambda row: row.vqa, _per_cent, max),
        Column("Loc", lambda row: row.localisation, _per_cent, max),
        Column("Over- all", lambda row: row.overall, _per_cent, max),
        Column("bad boxes", lambda row: row.invalid_boxes, _per_cent, min),
        Column("min", lambda row: row.seconds / 60, lambda value: f"{value:.1f}"),
    ]


def _three_digits(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _per_cent(value: float) -> str:
    return f"{100 * value:.1f}"


@dataclass(frozen=True)
class Cell:
    """What stands in the table, and whether it is the best of its column."""

    text: str
    best: bool = False


def headings(rows: Sequence[StudyRow]) -> list[str]:
    """Of all columns, the encoders' first."""
    return ["encoder", *(column.heading.replace("- ", "") for column in columns(rows))]


def cells(rows: Sequence[StudyRow]) -> list[list[Cell]]:
    """The table's cells, row by row.

    The best of a column, as it is printed, is marked among the models without a warning, if they differ.
    """
    names = short_names([row.encoder for row in rows])
    learned = [row for row in rows if not row.warnings]
    table: list[list[Cell]] = [[Cell(names[row.encoder])] for row in rows]
    for column in columns(rows):
        texts = [column.form(column.value(row)) for row in rows]
        of_learned = {column.form(column.value(row)) for row in learned}
        best = None
        if column.better and len(of_learned) > 1:
            best = column.form(column.better([column.value(row) for row in learned]))
        for row, line, text in zip(rows, table, texts, strict=True):
            line.append(Cell(text, best=text == best and not row.warnings))
    return table


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Encoder name -> the name without its `.tag`, where all have the same tag; else the name itself."""
    if len({name.partition(".")[2] for name in names}) == 1:
        return {name: name.partition(".")[0] for name in names}
    return {name: name for name in names}


def notes(rows: Sequence[StudyRow]) -> list[str]:
    """What a reader must know to read the table."""
    first, names = rows[0], short_names([row.encoder for row in rows])
    tag = first.encoder.partition(".")[2]
    lines = [
        f"VQA: {first.vqa_items} questions. Loc: {first.localisation_items} expressions, IoU >= "
        f"{first.iou_threshold:g}, frame {first.box_frame}.",
        "Scores in per cent; params and FLOPs (multiply + add = 2) to the tap, no heads.",
        *_floor_notes(rows, names),
        f"95 % interval from the number of items alone: {_chance(rows)}.",
    ]
    if any(cell.best for row in cells(rows) for cell in row):
        lines.append("Bold: best of its column among the models without a warning.")
    if tag and names[first.encoder] != first.encoder:
        lines.append(f"Every encoder's name ends in .{tag}.")
    return [*lines, TOY_NOTE]


def _floor_notes(rows: Sequence[StudyRow], names: dict[str, str]) -> list[str]:
    """Floors of the data once, where they are the same for all models; what each model says to blank pictures apart."""
    parts = {
        f"Floors, from {rows[0].floor_source}": lambda name: name != _OF_ONE_MODEL,
        "Blank pictures": lambda name: name == _OF_ONE_MODEL,
    }
    lines = []
    for title, wanted in parts.items():
        encoders_by_text: dict[str, list[str]] = {}
        for row in rows:
            encoders_by_text.setdefault(_floors_text(row, wanted), []).append(names[row.encoder])
        encoders_by_text.pop("", None)
        one = len(encoders_by_text) == 1
        texts = [text if one else f"{', '.join(of)} {text}" for text, of in encoders_by_text.items()]
        lines += [f"{title}: {'; '.join(texts)}."] if texts else []
    return lines


def _floors_text(row: StudyRow, wanted: Callable[[str], bool]) -> str:
    """For example "VQA 38.8 (best constant per kind), 12.2 (best constant), Loc 9.1 (mean box)"."""
    by_task: dict[str, list[str]] = {}
    for key, value in sorted(row.floors.items(), key=lambda pair: -pair[1]):
        task, _, name = key.partition(": ")
        if wanted(name):
            by_task.setdefault(TASK_NAMES[task], []).append(f"{100 * value:.1f}{_in_brackets(name)}")
    return ", ".join(f"{task} {', '.join(by_task[task])}" for task in TASK_NAMES.values() if task in by_task)


def _in_brackets(floor: str) -> str:
    return "" if floor == _OF_ONE_MODEL else f" ({FLOOR_NAMES[floor]})"


def _chance(rows: Sequence[StudyRow]) -> str:
    """The widest 95 % interval among the models, as if items were independent and right or wrong (Wilson, 1927)."""

    def widest(scores: list[float], items: int) -> float:
        intervals = [wilson_interval(score, items) for score in scores]
        return max(50 * (high - low) for low, high in intervals)

    vqa = widest([row.vqa for row in rows], rows[0].vqa_items)
    boxes = widest([row.localisation for row in rows], rows[0].localisation_items)
    return f"VQA ±{vqa:.1f}, Loc ±{boxes:.1f}"


def warnings(rows: Sequence[StudyRow]) -> list[str]:
    """One line for every model that does not beat guessing."""
    names = short_names([row.encoder for row in rows])
    return [
        f"WARNING: {names[row.encoder]} HAS NOT LEARNED: {'; '.join(row.warnings)}." for row in rows if row.warnings
    ]


def print_table(rows: Sequence[StudyRow], console: Console) -> None:
    """The table in the terminal, 80 columns are enough: names are folded, numbers never; warnings in red."""
    narrow = ["encoder", *(column.heading.replace("- ", "-\n").replace(" ", "\n") for column in columns(rows))]
    lines = cells(rows)
    widths = [
        max(map(len, [*heading.split("\n"), *(line[place].text for line in lines)]))
        for place, heading in enumerate(narrow)
    ]
    room = max(8, console.width - sum(widths[1:]) - len(widths) - 1)
    table = Table(title="Which encoder?", title_justify="left", box=SIMPLE_HEAD, padding=0)
    for place, heading in enumerate(narrow):
        table.add_column(heading, justify="right" if place else "left", no_wrap=True, vertical="bottom")
    for row, (name, *numbers) in zip(rows, lines, strict=True):
        texts = [Text(cell.text, style="bold green" if cell.best else "") for cell in numbers]
        table.add_row(_fold(name.text, room), *texts, style="red" if row.warnings else None)
    console.print(table)
    for line in notes(rows):
        console.print(line, style="dim", highlight=False, markup=False)
    for line in warnings(rows):
        console.print(line, style="bold white on red", highlight=False, markup=False)


def _fold(name: str, width: int) -> str:
    """A name in lines of at most `width` characters, broken after its dot if that will do, else after `_` or `-`."""
    parts = re.findall(r"[^.]*\.|[^.]+", name)
    if max(map(len, parts)) > width:
        parts = re.findall(r"[^_.-]*[_.-]|[^_.-]+", name)
    lines = [""]
    for part in parts:
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
        while len(lines[-1]) > width:
            lines[-1:] = [lines[-1][:width], lines[-1][width:]]
    return "\n".join(lines)


def markdown_table(rows: Sequence[StudyRow]) -> str:
    """The same table for a README."""
    lines = ["| " + " | ".join(headings(rows)) + " |", "|---" + "|---:" * len(columns(rows)) + "|"]
    for row in cells(rows):
        lines.append("| " + " | ".join(f"**{cell.text}**" if cell.best else cell.text for cell in row) + " |")
    lines += ["", *(f"> **{line}**\n" for line in warnings(rows)), *(f"{line}\n" for line in notes(rows))]
    return "\n".join(lines)
