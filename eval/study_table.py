"""The study's table: one row an encoder, floors and warnings at the foot."""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from .evaluate import Result
from .scores import TaskScore

MARGIN = 0.05  # a score this little above a floor counts as not above it
_GUESSING = {"vqa": ("constant_answer_per_kind", "blank_image"), "grounding": ("mean_box", "blank_image")}
TOY_NOTE = "Ten symbols on plain canvases prove the plumbing, not the science."


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
        warnings: floors that the model does not beat.
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
            warnings=(*_not_beaten(vqa), *_not_beaten(boxes)),
            kinds={kind: score.score for kind, score in vqa.kinds.items()},
            mean_iou=boxes.mean_iou or 0.0,
            box_frame=boxes.box_frame or "",
            iou_threshold=boxes.iou_threshold or 0.0,
        )


def _not_beaten(score: TaskScore) -> list[str]:
    names = [name for name in _GUESSING[score.task] if score.score < score.floors[name] + MARGIN]
    return [
        f"{score.task} {score.score:.3f} is not above its floor {name.replace('_', ' ')} {score.floors[name]:.3f}"
        for name in names
    ]


COLUMNS = {
    "encoder": lambda row: row.encoder,
    "params": lambda row: f"{row.parameters / 1e6:.3f} M",
    "FLOPs": lambda row: f"{row.flops / 1e6:.0f} M",
    "tokens": lambda row: str(row.tokens),
    "cls acc": lambda row: f"{100 * row.accuracy:.1f}",
    "VQA": lambda row: f"{100 * row.vqa:.1f}",
    "Loc": lambda row: f"{100 * row.localisation:.1f}",
    "Overall": lambda row: f"{100 * row.overall:.1f}",
    "bad boxes": lambda row: f"{100 * row.invalid_boxes:.1f}",
    "seconds": lambda row: f"{row.seconds:.0f}",
}
"""Heading -> cell; one list for terminal, Markdown and HTML."""


def foot(rows: list[StudyRow]) -> list[str]:
    """What a reader must know to read the table, and every model that has not learned."""
    first = rows[0]
    lines = [
        f"Per cent but for params, FLOPs, tokens and seconds; params and FLOPs (multiply + add = 2) to the tap. "
        f"VQA: {first.vqa_items} questions. Loc: {first.localisation_items} expressions, accuracy at "
        f"IoU {first.iou_threshold:g} in the frame {first.box_frame}. Overall: weighted by items.",
    ]
    for row in rows:
        floors = ", ".join(f"{name.replace('_', ' ')} {100 * value:.1f}" for name, value in row.floors.items())
        lines.append(f"Floors of {row.encoder}: {floors}.")
    lines += [f"WARNING: {row.encoder} HAS NOT LEARNED: {warning}." for row in rows for warning in row.warnings]
    return [*lines, TOY_NOTE]


def print_table(rows: list[StudyRow], console: Console) -> None:
    """The table in the terminal; warnings in red."""
    table = Table(title="Which encoder?", title_justify="left")
    for heading in COLUMNS:
        table.add_column(heading, justify="left" if heading == "encoder" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(cell(row) for cell in COLUMNS.values()), style="red" if row.warnings else None)
    console.print(table)
    for line in foot(rows):
        console.print(line, style="bold white on red" if line.startswith("WARNING") else "dim", highlight=False)


def markdown_table(rows: list[StudyRow]) -> str:
    """The same table for a README."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
    lines += ["| " + " | ".join(cell(row) for cell in COLUMNS.values()) + " |" for row in rows]
    return "\n".join([*lines, "", *(f"{line}\n" for line in foot(rows))])
