"""Readers of VQA v2 and RefCOCO files, as published and as DigitScenes writes them."""

import json
import os
import pickle

import pytest

from ssm_vlm.eval.grounding import Box
from ssm_vlm.eval.tasks import EvalItem, read_refcoco, read_vqa, slim


def vqa_files():
    """Two questions in the files' published form."""
    head = {
        "info": {"description": "This is v2.0 of the VQA dataset.", "version": "2.0"},
        "license": {"url": "http://creativecommons.org/licenses/by/4.0/"},
        "data_subtype": "val2014",
        "data_type": "mscoco",
    }
    questions = [
        {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000},
        {"image_id": 42, "question": "How many {curly} cats?", "question_id": 42001},
    ]
    annotations = [
        {
            "question_type": kind,
            "multiple_choice_answer": "2",
            "answers": [{"answer": f"a{n}", "answer_confidence": "yes", "answer_id": n + 1} for n in range(10)],
            "image_id": question["image_id"],
            "answer_type": "number",
            "question_id": question["question_id"],
        }
        for kind, question in zip(["where is the", "how many"], questions, strict=True)
    ]
    return head | {"task_type": "Open-Ended", "questions": questions}, head | {"annotations": annotations}


def ref_files():
    """Two refs in the files' published form; the image name in `instances` is the picture's, that in `refs` is not."""
    refs = [
        {
            "sent_ids": [0, 1],
            "file_name": "COCO_train2014_000000581857_16.jpg",
            "ann_id": 1719310,
            "ref_id": 0,
            "image_id": 581857,
            "split": "val",
            "sentences": [
                {"tokens": ["the", "lady"], "raw": "THE LADY", "sent_id": 0, "sent": "the lady"},
                {"tokens": ["woman"], "raw": "woman!", "sent_id": 1, "sent": "woman"},
            ],
            "category_id": 1,
        },
        {
            "sent_ids": [2],
            "file_name": "COCO_train2014_000000098304_0.jpg",
            "ann_id": 3,
            "ref_id": 1,
            "image_id": 98304,
            "split": "testA",
            "sentences": [{"tokens": ["bear"], "raw": "bear", "sent_id": 2, "sent": "bear"}],
            "category_id": 23,
        },
    ]
    instances = {
        "images": [
            {"id": 581857, "file_name": "COCO_train2014_000000581857.jpg", "height": 427, "width": 640},
            {"id": 98304, "file_name": "COCO_train2014_000000098304.jpg", "height": 424, "width": 640},
        ],
        "annotations": [
            {"id": 1719310, "image_id": 581857, "category_id": 1, "bbox": [103.93, 299.99, 134.22, 127.42]},
            {"id": 3, "image_id": 98304, "category_id": 23, "bbox": [0, 0, 640, 424]},
        ],
        "categories": [{"id": 1, "name": "person"}, {"id": 23, "name": "bear"}],
    }
    return refs, instances


@pytest.fixture
def vqa(tmp_path):
    """Writes question and annotation files, after a change, and reads them."""

    def read(change=lambda questions, annotations: None, **options):
        contents = vqa_files()
        change(*contents)
        for name, content in zip("qa", contents, strict=True):
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return read_vqa(tmp_path / "q.json", tmp_path / "a.json", "val2014", **options)

    return read


@pytest.fixture
def refcoco(tmp_path):
    """Writes refs and instances files, after a change, and reads them."""

    def read(change=lambda refs, instances: None, split="val", pickled=False):
        refs, instances = ref_files()
        change(refs, instances)
        path = tmp_path / ("refs(unc).p" if pickled else "refs(unc).json")
        path.write_bytes(pickle.dumps(refs, protocol=pickled) if pickled else json.dumps(refs).encode())
        (tmp_path / "instances.json").write_text(json.dumps(instances))
        return read_refcoco(path, tmp_path / "instances.json", "train2014", split)

    return read


def test_vqa_v2(vqa):
    first, second = vqa()
    assert first == EvalItem(
        id="vqa-262148000",
        image=os.path.join("val2014", "COCO_val2014_000000262148.jpg"),
        prompt="Where is he looking?\nAnswer the question using a single word or phrase.",
        task="vqa",
        kind="where is the",
        answers=tuple(f"a{n}" for n in range(10)),
    )
    assert second.prompt.startswith("How many {curly} cats?\n") and second.kind == "how many"


@pytest.mark.parametrize(
    "data_type, pattern, name",
    [
        ("digitscenes", None, "DigitScenes_val2014_000000000042.png"),
        ("abstract_v002", None, "abstract_v002_val2014_000000000042.png"),
        ("mine", "{image_id:012d}.jpg", "000000000042.jpg"),
        ("mine", "{data_type}/{data_subtype}/{image_id}.webp", "mine/val2014/42.webp"),
    ],
)
def test_image_names(vqa, data_type, pattern, name):
    items = vqa(lambda questions, _: questions.update(data_type=data_type), image_pattern=pattern)
    assert items[1].image == os.path.join("val2014", name)


def test_a_part_of_the_questions_and_another_prompt(vqa):
    items = vqa(lambda questions, _: questions["questions"].pop(0), prompt="Q: {question} A:")
    assert [item.prompt for item in items] == ["Q: How many {curly} cats? A:"]


VQA_ERRORS = {
    "unknown images": (
        lambda q, a: q.update(data_type="mine"),
        r"q.json: images of data_type 'mine' have no known file names \(known are mscoco, .*\); give an image_pattern",
    ),
    "no annotation": (lambda q, a: a["annotations"].pop(), r"q.json: question 42001 has no annotation in .*a.json"),
    "no question text": (
        lambda q, a: q["questions"][1].pop("question"),
        r"question 42001: the key 'question' is missing",
    ),
    "no question id": (
        lambda q, a: q["questions"][1].pop("question_id"),
        r"question 1: the key 'question_id' is missing",
    ),
    "nine answers": (
        lambda q, a: a["annotations"][1]["answers"].pop(),
        r"a.json: annotation of question 42001 has 9 answers, but VQA v2 has 10",
    ),
    "twice": (lambda q, a: q["questions"].append(q["questions"][1]), r"q.json: question 42001 comes twice"),
    "other image": (
        lambda q, a: a["annotations"][1].update(image_id=7),
        r"question 42001 is about image 42, but its annotation about 7",
    ),
    "questions no list": (lambda q, a: q.update(questions={}), r"q.json: the key 'questions' holds no list"),
    "no annotations": (lambda q, a: a.pop("annotations"), r"a.json: the key 'annotations' is missing"),
    "a text for a question": (lambda q, a: q["questions"].append("x"), r"q.json: question 2: is 'x', not an object"),
    "image id is text": (
        lambda q, a: (q["questions"][1].update(image_id="x"), a["annotations"][1].update(image_id="x")),
        r"question 42001: the image pattern 'COCO_.*' cannot be filled in with image_id 'x'",
    ),
}


@pytest.mark.parametrize("change, message", VQA_ERRORS.values(), ids=VQA_ERRORS.keys())
def test_bad_vqa_files(vqa, change, message):
    with pytest.raises(ValueError, match=message):
        vqa(change)


@pytest.mark.parametrize("pickled", [False, 2, 4])
def test_refcoco(refcoco, pickled):
    first, second = refcoco(pickled=pickled)
    assert first == EvalItem(
        id="ref-0",
        image=os.path.join("train2014", "COCO_train2014_000000581857.jpg"),
        prompt='Please provide the bounding box coordinate of the region this sentence describes: "the lady"',
        task="grounding",
        kind="person",
        box=Box(103.93, 299.99, 103.93 + 134.22, 299.99 + 127.42),
        image_size=(427, 640),
    )
    assert second.prompt.endswith('"woman"') and second.box == first.box
    assert [item.kind for item in refcoco(split="testA", pickled=pickled)] == ["bear"]


def test_refs_pickled_by_python_2(refcoco, tmp_path):
    """Byte strings of the oldest protocol, one of them not ASCII."""
    refcoco()
    sentence = b"(dS'sent_id'\nI5\nsS'sent'\nS'caf\\xc3\\xa9'\ns"
    (tmp_path / "refs(google).p").write_bytes(
        b"(l(dS'ref_id'\nL7L\nsS'ann_id'\nI3\nsS'image_id'\nI98304\nsS'split'\nVval\nsS'sentences'\n(l"
        + sentence
        + b"asa."
    )
    (item,) = read_refcoco(tmp_path / "refs(google).p", tmp_path / "instances.json", "", "val")
    assert item.id == "ref-5" and item.prompt.endswith('"café"')


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_pickle_cannot_run_code(refcoco, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"refs\(unc\).p: cannot be read as a pickle of plain data \(it asks for .*mkdir"
    ):
        refcoco(lambda refs, _: refs.append(Bomb()), pickled=2)
    assert not (tmp_path / "exploded").exists()
    (tmp_path / "refs(unc).p").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="cannot be read as a pickle of plain data"):
        read_refcoco(tmp_path / "refs(unc).p", tmp_path / "instances.json", "", "val")


def box_of(instances, *bbox):
    instances["annotations"][0].update(bbox=list(bbox))


REF_ERRORS = {
    "split": (
        lambda r, i: [ref.update(split="train") for ref in r],
        r"no sentence in the split 'val'; its splits are train",
    ),
    "no annotation": (
        lambda r, i: i["annotations"].pop(0),
        r"ref 0: .*instances.json has no annotation with id 1719310",
    ),
    "no image": (lambda r, i: i["images"].pop(0), r"ref 0: .*instances.json has no image with id 581857"),
    "no ref id": (lambda r, i: r[0].pop("ref_id"), r"refs\(unc\).json: ref 0: the key 'ref_id' is missing"),
    "no sentences": (lambda r, i: r[0].pop("sentences"), r"ref 0: the key 'sentences' is missing"),
    "sentence twice": (lambda r, i: r.append(r[0]), r"ref 0: the sentence 0 comes twice"),
    "no size": (lambda r, i: i["images"][0].pop("width"), r"instances.json: image 581857: the key 'width' is missing"),
    "box outside": (
        lambda r, i: box_of(i, 600, 10, 50, 50),
        r"annotation 1719310: the bbox \[600, 10, 50, 50\] .* sticks out of its image, which is 427 pixels high",
    ),
    "box above": (lambda r, i: box_of(i, 0, -5, 50, 50), r"annotation 1719310: the bbox .* sticks out"),
    "box too low": (lambda r, i: box_of(i, 0, 400, 50, 50), r"annotation 1719310: the bbox .* sticks out"),
    "empty box": (lambda r, i: box_of(i, 10, 10, 0, 5), r"annotation 1719310: the bbox .* is empty"),
    "three numbers": (lambda r, i: box_of(i, 1, 2, 3), r"annotation 1719310: the bbox \[1, 2, 3\] is not x, y, width"),
    "no categories": (lambda r, i: i.pop("categories"), r"instances.json: the key 'categories' is missing"),
}


@pytest.mark.parametrize("change, message", REF_ERRORS.values(), ids=REF_ERRORS.keys())
def test_bad_refcoco_files(refcoco, change, message):
    with pytest.raises(ValueError, match=message):
        refcoco(change)


def test_boxes_may_stick_out_by_rounding(refcoco):
    assert refcoco(lambda _, instances: box_of(instances, -0.5, 0, 641, 427.4))[0].box == Box(-0.5, 0, 640.5, 427.4)


def test_files_that_are_missing_or_no_json(tmp_path):
    for name in ("refs.json", "refs.p"):
        with pytest.raises(FileNotFoundError, match=f"{name}: no such file"):
            read_refcoco(tmp_path / name, "", "", "val")
    (tmp_path / "q.json").write_text("[1,")
    with pytest.raises(ValueError, match="q.json: is not valid JSON"):
        read_vqa(tmp_path / "q.json", tmp_path / "q.json", "")
    (tmp_path / "q.json").write_text("[1]")
    with pytest.raises(ValueError, match="q.json: is not a JSON object"):
        read_vqa(tmp_path / "q.json", tmp_path / "q.json", "")
    (tmp_path / "refs.p").write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match="refs.p: holds no list of refs"):
        read_refcoco(tmp_path / "refs.p", "", "", "val")


def test_slim_is_a_fixed_choice(vqa):
    items = [EvalItem(str(n), "", "", "vqa", "") for n in range(100)]
    few = slim(items, 10)
    assert len(few) == 10 and few == slim(items, 10) and few == slim(items, 20)[:10]
    assert few != items[:10] and few != slim(items, 10, seed=22)
    assert len(slim(items, 1000)) == 100
    with pytest.raises(ValueError, match="number is 0, but must be at least 1"):
        slim(items, 0)
