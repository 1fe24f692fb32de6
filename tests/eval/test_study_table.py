"""The study's table in the terminal and in Markdown: numbers, floors, warnings, and that all of it can be read."""

from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from ssm_vlm.eval.evaluate import Result
from ssm_vlm.eval.scores import KindScore, TaskScore
from ssm_vlm.eval.study_table import (
    TOY_NOTE,
    StudyRow,
    cells,
    headings,
    markdown_table,
    notes,
    print_table,
    short_names,
    warnings,
)

VQA_FLOORS = {"constant_answer": 0.12, "constant_answer_per_kind": 0.4, "blank_image": 0.3}
BOX_FLOORS = {"mean_box": 0.1, "blank_image": 0.05}


def result(vqa=0.9, boxes=0.6, vqa_floors=VQA_FLOORS, box_floors=BOX_FLOORS):
    kinds = {"count": KindScore(300, vqa)}
    return Result(
        scores={
            "vqa": TaskScore("vqa", "accuracy", 300, vqa, kinds, vqa_floors, "the scored items"),
            "grounding": TaskScore(
                "grounding", "overlap", 100, boxes, {}, box_floors, "the scored items", 0.025, 0.55, "raw", 0.5
            ),
        },
        num_items=400,
        blank_images=False,
        predictions=Path("answers.jsonl"),
    )


def row(name="digit_vit.toy", *, flops=81_000_000, parameters=443_210, accuracy=0.983, seconds=312.0, **scores):
    return StudyRow.of(
        name,
        parameters=parameters,
        flops=flops,
        tokens=64,
        accuracy=accuracy,
        result=result(**scores),
        seconds=seconds,
    )


def printed(rows, width=80, colour=False):
    out = StringIO()
    print_table(
        rows, Console(file=out, width=width, force_terminal=colour, color_system="standard" if colour else None)
    )
    return out.getvalue()


def test_row_of_a_result():
    of = row(vqa=0.8, boxes=0.4)
    assert of.overall == pytest.approx((0.8 * 300 + 0.4 * 100) / 400)
    assert (of.vqa_items, of.localisation_items, of.box_frame, of.iou_threshold) == (300, 100, "raw", 0.5)
    assert of.floors["grounding: mean_box"] == 0.1 and of.floors["vqa: blank_image"] == 0.3
    assert (of.invalid_boxes, of.mean_iou, of.kinds) == (0.025, 0.55, {"count": 0.8})
    assert of.warnings == ()


def test_cells_of_a_row():
    assert headings([row()]) == [
        *("encoder", "params M", "MFLOPs", "tokens", "cls acc", "VQA", "Loc", "Overall", "bad boxes", "min"),
    ]
    texts = [cell.text for cell in cells([row()])[0]]
    assert texts == ["digit_vit", "0.443", "81", "64", "98.3", "90.0", "60.0", "82.5", "2.5", "5.2"]


def test_large_encoders_are_counted_in_larger_units():
    large = row("vmamba_small_s2l15.in1k_224", flops=17_400_000_000, parameters=44_123_456)
    assert headings([large])[2] == "GFLOPs"
    assert [cell.text for cell in cells([large])[0]][1:3] == ["44.1", "17"]
    assert headings([large, row()])[2] == "MFLOPs", "one unit for all"


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["a.x", "b.x"], ["a", "b"]),
        (["a.x", "b.y"], ["a.x", "b.y"]),
        (["a.x", "a.y"], ["a.x", "a.y"]),
        (["a.x.y", "b.x.y"], ["a", "b"]),
        (["a", "b"], ["a", "b"]),
        (["a.x", "a"], ["a.x", "a"]),
    ],
)
def test_common_tags_are_dropped(names, short):
    assert list(short_names(names).values()) == short
    told = any("name ends in" in note for note in notes([row(name) for name in names]))
    assert told == (names != short)


NAMES = [
    ["digit_vmamba.digitscenes_64", "digit_vit.digitscenes_64"],
    ["digit_window_attention.digitscenes_64", "digit_global_attention.digitscenes_64"],
    ["vmamba_small_s2l15.in1k_224", "vit_small_patch16.augreg_in1k_224", "swin_small.in1k_224"],
    ["x" * 90, "y.z"],
]


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("large", [False, True])
def test_fits_80_columns_and_nothing_is_cut(names, large):
    costs = {"flops": 123_000_000_000, "parameters": 303_000_000} if large else {"flops": 9_990_000_000}
    rows = [row(name, vqa=1.0, boxes=1.0, accuracy=1.0, seconds=59_994, **costs) for name in names[:-1]] + [
        row(names[-1], vqa=0.0, boxes=0.0, **costs)
    ]
    text = printed(rows)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text and "..." not in text
    table = text.partition("VQA: 300")[0]
    for line in cells(rows):
        for cell in line[1:]:
            assert f" {cell.text} " in table
    squeezed = "".join(line.split("  ")[0].strip() for line in table.splitlines() if line.strip())
    for name in short_names(names).values():
        assert name in squeezed


def test_names_are_folded_only_where_they_must():
    names = ["vmamba_small_s2l15.in1k_224", "vit_small_patch16.augreg_in1k_224"]
    assert all(name in printed([row(name) for name in names], width=120) for name in names)
    narrow = printed([row(name) for name in names], width=80)
    assert " vit_small_patch16. " in narrow and " augreg_in1k_224 " in narrow, "at the dot, where that will do"


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({"vqa": 0.46, "boxes": 0.16}, []),
        ({"vqa": 0.44}, ["VQA 44.0 is not 5 points above 40.0 (best constant per kind)"]),
        ({"boxes": 0.14}, ["Loc 14.0 is not 5 points above 10.0 (mean box)"]),
        (
            {"vqa": 0.2, "boxes": 0.0},
            [
                "VQA 20.0 is not 5 points above 40.0 (best constant per kind) or 30.0 (blank pictures)",
                "Loc 0.0 is not 5 points above 10.0 (mean box) or 5.0 (blank pictures)",
            ],
        ),
        (
            {"vqa": 0.9, "vqa_floors": VQA_FLOORS | {"blank_image": 0.88}},
            ["VQA 90.0 is not 5 points above 88.0 (blank pictures)"],
        ),
        ({"vqa": 0.2, "vqa_floors": {"constant_answer_per_kind": 0.1}}, []),
        ({"vqa": float("nan")}, None),
    ],
)
def test_floors_that_are_not_beaten(scores, expected):
    found = row(**scores).warnings
    if expected is None:
        assert found, "a score that is no number beats nothing"
    else:
        assert list(found) == expected


def test_warnings_are_loud():
    rows = [row("good.toy"), row("poor.toy", vqa=0.1, boxes=0.0)]
    assert len(warnings(rows)) == 1
    assert warnings(rows)[0].startswith("WARNING: poor HAS NOT LEARNED: VQA 10.0 is not")
    text = printed(rows, colour=True)
    alarm = next(line for line in text.splitlines() if "HAS NOT LEARNED" in line)
    assert "\x1b[1;37;41m" in alarm, "bold white on red"
    poor, good = (next(line for line in text.splitlines() if name in line) for name in ("poor", "good"))
    assert "\x1b[31m" in poor and "\x1b[31m" not in good
    assert text.rstrip().splitlines()[-1].strip().endswith("\x1b[0m"), "the warning comes last"
    markdown = markdown_table(rows)
    assert f"> **{warnings(rows)[0]}**" in markdown


def test_no_warning_without_a_reason():
    assert warnings([row()]) == []
    assert "WARNING" not in printed([row()]) and "WARNING" not in markdown_table([row()])


def best_of(rows):
    return [[name for name, cell in zip(headings(rows), line, strict=True) if cell.best] for line in cells(rows)]


def test_best_is_marked():
    a, b = row("a.toy", vqa=0.9, boxes=0.5, accuracy=0.9), row("b.toy", vqa=0.8, boxes=0.7, accuracy=0.9)
    b = replace(b, invalid_boxes=0.1, parameters=1, flops=1, seconds=1)
    assert best_of([a, b]) == [["VQA", "Overall", "bad boxes"], ["Loc"]]
    assert "| **90.0** |" in markdown_table([a, b]) and "90.0 | 80.0 | **70.0**" in markdown_table([a, b])


def test_what_prints_the_same_is_equally_good():
    rows = [row("a.toy", vqa=0.90001), row("b.toy", vqa=0.9), row("c.toy", vqa=0.8)]
    assert [("VQA" in best) for best in best_of(rows)] == [True, True, False]


def test_a_model_that_has_not_learned_is_never_the_best():
    rows = [row("a.toy", vqa=0.8), row("b.toy", vqa=0.7), row("c.toy", vqa=0.9, boxes=0.0)]
    assert [("VQA" in best) for best in best_of(rows)] == [True, False, False]
    rows[2] = row("c.toy", vqa=0.8, boxes=0.0)
    assert [("VQA" in best) for best in best_of(rows)] == [True, False, False]
    assert best_of([row("a.toy")]) == [[]]
    assert not any("Bold" in note for note in notes([row("a.toy")]))


def test_floors_of_the_data_are_said_once():
    rows = [row(f"{name}.toy") for name in "abc"]
    text = " ".join(notes(rows))
    assert text.count("40.0 (best constant per kind), 12.0 (best constant), Loc 10.0 (mean box)") == 1
    assert "Blank pictures: VQA 30.0, Loc 5.0." in text


def test_blank_pictures_are_said_for_each_encoder():
    rows = [row("a.toy"), row("b.toy", vqa_floors=VQA_FLOORS | {"blank_image": 0.21})]
    text = " ".join(notes(rows))
    assert text.count("best constant per kind") == 1
    assert "Blank pictures: a VQA 30.0, Loc 5.0; b VQA 21.0, Loc 5.0." in text


def test_blank_pictures_that_were_not_shown_are_not_mentioned():
    bare = row(vqa_floors={"constant_answer": 0.1, "constant_answer_per_kind": 0.2}, box_floors={"mean_box": 0.1})
    assert "Blank" not in " ".join(notes([bare]))


def test_notes_say_what_scores_rest_on():
    text = " ".join(notes([row(vqa=0.5, boxes=0.2)]))
    assert "VQA: 300 questions. Loc: 100 expressions, IoU >= 0.5, frame raw." in text
    assert "VQA ±5.6, Loc ±7.8" in text, "Wilson intervals of 0.5 of 300 and 0.2 of 100"
    assert "VQA ±0.6" in " ".join(notes([row(vqa=0.0)])), "nothing right of 300 is still no certainty"
    assert "from the scored items" in text and TOY_NOTE in text


def test_square_brackets_are_no_markup():
    assert "[red]" in printed([row("[red].toy", vqa=0.0)]).partition("WARNING")[2]


def test_markdown_is_a_table():
    rows = [row("a.toy"), row("b.toy", vqa=0.7)]
    lines = markdown_table(rows).splitlines()
    assert lines[0].startswith("| encoder | params M | MFLOPs |") and "Overall" in lines[0]
    assert {line.count("|") for line in lines[:4]} == {11}
    assert lines[3].startswith("| b | 0.443 |")
