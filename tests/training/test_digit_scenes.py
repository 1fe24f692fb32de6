"""DigitScenes: drawn right, asked right, written in formats that the readers of the big sets read.

Answers are derived anew here from what the files say of a scene, or from its pixels, never by the code that wrote them.
"""

import dataclasses
import hashlib
import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssm_vlm import LlavaStyleImageProcessor, make_geometry
from ssm_vlm.eval.grounding import parse_box
from ssm_vlm.eval.tasks import read_refcoco, read_vqa
from ssm_vlm.training import digit_scenes
from ssm_vlm.training.datasets import LlavaConversations
from ssm_vlm.training.digit_scenes import (
    BACKGROUNDS,
    COLOURS,
    GROUNDING_PROMPT,
    SHORT_ANSWER,
    DigitScenesConfig,
    draw_scene,
    split_glyphs,
    training_turns,
    write_digit_scenes,
)
from ssm_vlm.training.image_folder import ImageFolder

CONFIG = DigitScenesConfig(
    train_scenes=30,
    text_scenes=150,
    val_scenes=25,
    test_scenes=40,
    classification_train=40,
    classification_val=20,
    turns=6,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_digit_scenes(tmp_path_factory.mktemp("digit_scenes") / "data", CONFIG)


@pytest.fixture(scope="module")
def glyphs():
    return split_glyphs()


@pytest.fixture(scope="module")
def drawn(glyphs):
    rng = random.Random(3)
    return [draw_scene(rng, glyphs["train"], DigitScenesConfig()) for _ in range(300)]


# --- an independent account of scenes ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Seen:
    """A digit as a file or a picture shows it; `place` is such as ("top", "left")."""

    digit: str
    colour: str
    place: tuple[str, str]
    box: tuple[float, ...]


def place_of(box, height, width) -> tuple[str, str]:
    x1, y1, x2, y2 = box
    return ("top" if (y1 + y2) / 2 < height / 2 else "bottom", "left" if (x1 + x2) / 2 < width / 2 else "right")


def colour_in(picture: np.ndarray, box) -> str:
    """The colour whose ink lies in the box: that of the pixel that is farthest from the background."""
    x1, y1, x2, y2 = box
    region = picture[y1:y2, x1:x2].reshape(-1, 3).astype(int)
    ink = region[np.abs(region - picture[0, 0]).sum(1).argmax()]
    return min(COLOURS, key=lambda name: np.abs(ink - COLOURS[name]).sum())


def answer(question: str, seen: list[Seen]) -> str:
    """The answer to a VQA question; an error where it has none or several."""
    if question == "How many digits are in the image?":
        return str(len(seen))
    if match := re.fullmatch(r"Which digit is (\w+)\?", question):
        (one,) = [item.digit for item in seen if item.colour == match[1]]
        return one
    if match := re.fullmatch(r"What colour is the (\d)\?", question):
        (one,) = [item.colour for item in seen if item.digit == match[1]]
        return one
    if match := re.fullmatch(r"Where is (.+)\?", question):
        (one,) = meant(match[1], seen)
        return " ".join(one.place)
    match = re.fullmatch(r"Is there a (.+) in the image\?", question)
    return "yes" if meant(f"the {match[1]}", seen) else "no"


def meant(expression: str, seen: list[Seen]) -> list[Seen]:
    """All digits that an expression fits."""
    match = re.fullmatch(r"the (?:(\d)|(\w+) digit|(\w+) (\d))(?: (?:on|at) the (left|right|top|bottom))?", expression)
    digit, colour, where = match[1] or match[4], match[2] or match[3], match[5]
    return [
        item
        for item in seen
        if digit in (None, item.digit) and colour in (None, item.colour) and (where is None or where in item.place)
    ]


# --- drawing -------------------------------------------------------------------------------------------------------


def test_every_handwritten_digit_is_in_one_split_alone(glyphs):
    from sklearn.datasets import load_digits

    data = load_digits()
    opacity = (data.images * 255 / 16).round().astype(np.uint8)
    known = Counter((int(digit), image.tobytes()) for digit, image in zip(data.target, opacity, strict=True))
    split_of = Counter(
        (digit, image.tobytes()) for pool in glyphs.values() for digit, images in pool.items() for image in images
    )
    assert split_of == known and max(known.values()) == 1, "no image comes twice, so none is in two splits"
    sizes = {split: sum(map(len, pool.values())) for split, pool in glyphs.items()}
    assert sum(sizes.values()) == 1797 and sizes["train"] > 1200 and sizes["val"] > 150 and sizes["test"] > 300
    assert all(set(pool) == set(range(10)) for pool in glyphs.values())
    other = split_glyphs(8)
    assert not np.array_equal(other["train"][0], glyphs["train"][0]), "another seed splits in another way"


def test_every_part_is_drawn_from_its_own_split(tmp_path, monkeypatch, glyphs):
    used = Counter()
    names = {pool[0].tobytes(): split for split, pool in glyphs.items()}

    def note(rng, pool, config, count=None):
        used[names[pool[0].tobytes()]] += 1
        return draw_scene(rng, pool, config, count)

    monkeypatch.setattr(digit_scenes, "draw_scene", note)
    write_digit_scenes(tmp_path / "data", DigitScenesConfig(3, 5, 7, 11, 13, 17))
    assert used == {"train": 3 + 5 + 13, "val": 7 + 17, "test": 11}


def test_scenes_are_drawn_as_configured(drawn):
    config = DigitScenesConfig()
    counts = Counter(len(scene.digits) for scene in drawn)
    assert set(counts) == {1, 2, 3, 4} and min(counts.values()) > 10
    assert {(scene.height, scene.width) for scene in drawn} == set(config.canvases)
    assert {scene.background for scene in drawn} == set(BACKGROUNDS)
    placed = [digit for scene in drawn for digit in scene.digits]
    assert {digit.digit for digit in placed} == set(range(10)) and {d.colour for d in placed} == set(COLOURS)
    assert {digit.glyph.shape for digit in placed} == {(side, side) for side in config.digit_pixels}
    assert all(edge % config.grid == 0 for digit in placed for edge in digit.corner)
    assert all(len({digit.name for digit in scene.digits}) == len(scene.digits) for scene in drawn)


def test_boxes_are_inside_and_apart(drawn):
    for scene in drawn:
        for digit in scene.digits:
            x1, y1, x2, y2 = digit.box
            assert 0 <= x1 < x2 <= scene.width and 0 <= y1 < y2 <= scene.height
        free = np.ones((scene.height, scene.width), bool)
        for digit in scene.digits:
            x1, y1, x2, y2 = digit.box
            assert free[y1:y2, x1:x2].all(), "boxes overlap"
            free[max(0, y1 - 1) : y2 + 1, max(0, x1 - 1) : x2 + 1] = False  # with a gap of a pixel


def opacity_seen(scene, colour: str) -> np.ndarray:
    """[H, W] how much of the way from the background to the colour each pixel of the picture goes."""
    background, ink = np.float64(scene.background), np.float64(COLOURS[colour])
    pixels = np.asarray(scene.render(), np.float64)
    return (pixels - background) @ (ink - background) / ((ink - background) ** 2).sum()


def test_boxes_are_tight_around_the_ink(drawn):
    threshold, rounding = 48 / 255, 0.01
    single = [scene for scene in drawn if len(scene.digits) == 1]
    assert len(single) > 30
    for scene in single:
        (digit,) = scene.digits
        x1, y1, x2, y2 = digit.box
        seen = opacity_seen(scene, digit.colour)
        inside = seen[y1:y2, x1:x2]
        for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
            assert edge.max() > threshold - rounding, "a box reaches past its ink"
        assert inside.max() > 0.9
        seen[y1:y2, x1:x2] = 0
        assert seen.max() <= threshold + rounding, "there is ink outside the box"


def test_a_picture_shows_every_digit_in_its_colour(drawn):
    for scene in drawn:
        picture = np.asarray(scene.render())
        assert picture.shape == (scene.height, scene.width, 3)
        for digit in scene.digits:
            assert colour_in(picture, digit.box) == digit.colour


# --- questions -----------------------------------------------------------------------------------------------------


def test_a_conversation_has_a_box_and_every_kind_of_question(drawn):
    rng = random.Random(0)
    for scene in drawn[:100]:
        turns = training_turns(rng, scene, turns=8)
        boxes = [answer for prompt, answer in turns if prompt.startswith(GROUNDING_PROMPT.partition('"')[0])]
        assert len(boxes) == 1 and parse_box(boxes[0]) is not None
        short = [prompt for prompt, _ in turns if prompt.endswith(f"\n{SHORT_ANSWER}")]
        assert len(short) == len(turns) - 1 <= 7 and len(set(short)) == len(short)
        kinds = {prompt.split()[0] + prompt.split()[1] for prompt in short}
        assert {"Howmany", "Isthere", "Whereis"} <= kinds
        assert len(training_turns(rng, scene, turns=2)) == 2


def read_description(text: str) -> list[Seen]:
    """Digits in a description such as `red 7 top left [0.10, 0.20, 0.30, 0.40]; ... .`"""
    assert text.endswith(".")
    seen = []
    for part in text[:-1].split("; "):
        colour, digit, vertical, horizontal, box = re.fullmatch(r"(\w+) (\d) (\w+) (\w+) (\[.*\])", part).groups()
        seen.append(Seen(digit, colour, (vertical, horizontal), tuple(parse_box(box))))
    return seen


def test_answers_in_words_follow_from_the_descriptions(folder):
    kinds = Counter()
    for row in json.loads((folder / "text.json").read_text()):
        assert "image" not in row
        messages = row["conversations"]
        assert [m["from"] for m in messages] == ["human", "gpt"] * (len(messages) // 2)
        description, _, messages[0]["value"] = messages[0]["value"].partition("\n")
        seen = read_description(description)
        for item in seen:
            assert meant(f"the {item.colour} {item.digit}", seen) == [item]
        for prompt, said in zip(messages[::2], messages[1::2], strict=True):
            question = prompt["value"].removesuffix(f"\n{SHORT_ANSWER}")
            if question == prompt["value"]:
                (expression,) = re.findall('"(.*)"', question)
                assert question == GROUNDING_PROMPT.format(expression)
                (one,) = meant(expression, seen)
                assert tuple(parse_box(said["value"])) == one.box
                kinds["box"] += 1
            else:
                assert said["value"] == answer(question, seen), (description, question)
                kinds[" ".join(question.split()[:2])] += 1
    assert set(kinds) == {"box", "How many", "Which digit", "What colour", "Where is", "Is there"}
    assert kinds["box"] == CONFIG.text_scenes and min(kinds.values()) > 50


def facts(folder: Path) -> dict[int, tuple[str, list[Seen], dict[int, Seen]]]:
    """By image id: split, digits, and digits by annotation id, from COCO's boxes and the pictures' pixels."""
    coco = json.loads((folder / "instances.json").read_text())
    names = {category["id"]: category["name"] for category in coco["categories"]}
    assert names == {digit + 1: str(digit) for digit in range(10)}
    known = {}
    for image in coco["images"]:
        picture = np.asarray(Image.open(folder / "images" / "eval" / image["file_name"]))
        assert picture.shape == (image["height"], image["width"], 3)
        by_id = {}
        for mark in (mark for mark in coco["annotations"] if mark["image_id"] == image["id"]):
            x, y, width, height = mark["bbox"]
            box = (x, y, x + width, y + height)
            place = place_of(box, image["height"], image["width"])
            by_id[mark["id"]] = Seen(names[mark["category_id"]], colour_in(picture, box), place, box)
            assert mark["area"] == width * height
        known[image["id"]] = (image["file_name"].split("_")[1], list(by_id.values()), by_id)
    return known


def test_answers_about_pictures_follow_from_pixels_and_boxes(folder):
    known, kinds, ids = facts(folder), Counter(), []
    for split in ("val", "test"):
        questions = json.loads((folder / f"vqa_{split}_questions.json").read_text())["questions"]
        annotations = json.loads((folder / f"vqa_{split}_annotations.json").read_text())["annotations"]
        assert [q["question_id"] for q in questions] == [a["question_id"] for a in annotations]
        ids += [q["question_id"] for q in questions]
        for question, annotation in zip(questions, annotations, strict=True):
            of_split, seen, _ = known[question["image_id"]]
            assert of_split == split and annotation["image_id"] == question["image_id"]
            answers = [given["answer"] for given in annotation["answers"]]
            assert answers == [answer(question["question"], seen)] * 10
            assert annotation["multiple_choice_answer"] == answers[0]
            kinds[annotation["question_type"]] += 1
    assert len(set(ids)) == len(ids)
    assert set(kinds) == {"count", "digit", "colour", "presence", "position"}
    assert kinds["count"] == len(known) == CONFIG.val_scenes + CONFIG.test_scenes


def test_expressions_fit_one_digit_alone(folder):
    known, forms = facts(folder), Counter()
    refs = json.loads((folder / "refs(digits).json").read_text())
    assert sorted(ref["ann_id"] for ref in refs) == sorted(i for _, _, by_id in known.values() for i in by_id)
    for ref in refs:
        split, seen, by_id = known[ref["image_id"]]
        (sentence,) = ref["sentences"]
        assert meant(sentence["sent"], seen) == [by_id[ref["ann_id"]]] and ref["split"] == split
        forms[len(sentence["sent"].split())] += 1
    assert {2, 3, 5, 6} <= set(forms), "short names and names with a place"


def test_presence_is_balanced_whatever_is_asked_about(drawn):
    """So that always saying yes, or judging by the words, is right half of the time."""
    rng, said = random.Random(1), {"digit": Counter(), "colour": Counter(), "both": Counter()}
    for scene in drawn * 3:
        questions = [q for q in digit_scenes.ask_all(rng, scene) if q.kind == "presence"]
        assert sorted(q.answer for q in questions) == ["no", "yes"]
        for question in questions:
            words = re.fullmatch(r"Is there a (.+) in the image\?", question.text)[1].split()
            kind = "digit" if len(words) == 1 else "colour" if words[1] == "digit" else "both"
            said[kind][question.answer] += 1
    for kind, counts in said.items():
        assert sum(counts.values()) > 200 and 0.4 < counts["yes"] / sum(counts.values()) < 0.6, kind


def test_order_of_the_two_presence_questions_tells_nothing(drawn):
    rng = random.Random(1)
    first = [[q.answer for q in digit_scenes.ask_all(rng, scene) if q.kind == "presence"][0] for scene in drawn]
    assert 0.4 < first.count("yes") / len(first) < 0.6


# --- boxes in text -------------------------------------------------------------------------------------------------


def test_boxes_in_text_are_in_the_frame_of_llava_and_lead_back_to_the_pixels(drawn):
    for scene in drawn:
        side = max(scene.height, scene.width)
        geometry = make_geometry("letterbox", scene.height, scene.width, 64)  # as a model would see it
        for digit in scene.digits:
            text = scene.box_text(digit)
            assert re.fullmatch(r"\[(0\.\d\d|1\.00)(, (0\.\d\d|1\.00)){3}\]", text)
            box = parse_box(text)
            left, top = (side - scene.width) / 2, (side - scene.height) / 2
            expected = np.add(digit.box, [left, top, left, top]) / side
            assert np.abs(np.subtract(tuple(box), expected)).max() <= 0.005 + 1e-9
            back = geometry.from_frame(box, "centered_square")
            assert np.abs(np.subtract(tuple(back), digit.box)).max() <= 0.005 * side + 1e-6


# --- files ---------------------------------------------------------------------------------------------------------


def test_conversations_are_read_by_the_reader_of_llava(folder):
    data = LlavaConversations(folder / "train.json", folder / "images")
    data.check_images()
    assert len(data) == CONFIG.train_scenes and data.is_multimodal.all()
    row = data[0]
    assert row["messages"][0]["content"][0] == {"type": "image"} and Path(row["image"]).is_file()
    assert sum(message["role"] == "assistant" for message in row["messages"]) == CONFIG.turns
    assert "<image>" not in json.dumps(row["messages"])
    text = LlavaConversations(folder / "text.json", None)
    assert len(text) == CONFIG.text_scenes and not text.is_multimodal.any()
    raw = json.loads((folder / "train.json").read_text())
    assert all(r["conversations"][0]["value"].startswith("<image>\n") for r in raw)
    assert len({r["id"] for r in raw}) == len({r["image"] for r in raw}) == len(raw)


@pytest.mark.parametrize("split", ["val", "test"])
def test_questions_and_expressions_are_read_by_the_readers_of_vqa_and_refcoco(folder, split):
    images = folder / "images" / "eval"
    vqa = read_vqa(folder / f"vqa_{split}_questions.json", folder / f"vqa_{split}_annotations.json", images)
    boxes = read_refcoco(folder / "refs(digits).json", folder / "instances.json", images, split)
    asked = json.loads((folder / f"vqa_{split}_questions.json").read_text())["questions"]
    assert len(vqa) == len(asked) and all(Path(item.image).is_file() and split in item.image for item in vqa)
    assert vqa[0].prompt == f"{asked[0]['question']}\n{SHORT_ANSWER}"
    assert {item.kind for item in vqa} == {"count", "digit", "colour", "presence", "position"}
    assert boxes and len({item.id for item in [*vqa, *boxes]}) == len(vqa) + len(boxes)
    known = {seen.box for of_split, digits, _ in facts(folder).values() if of_split == split for seen in digits}
    assert {tuple(item.box) for item in boxes} == known
    trained = json.loads((folder / "train.json").read_text())[0]["conversations"]
    (prompt,) = [m["value"] for m in trained if "bounding box" in m["value"]]
    assert boxes[0].prompt.partition('"')[0] == prompt.removeprefix("<image>\n").partition('"')[0], (
        "the model is asked in the words it was taught"
    )


def test_classification_is_read_as_folders_of_attributes(folder):
    processor = LlavaStyleImageProcessor(geometry="letterbox", size=64, downsampling=[[8, "floor"]])
    train = ImageFolder(folder / "classification" / "train", processor, attributes=True)
    val = ImageFolder(folder / "classification" / "val", processor, attributes=True, groups=train.groups)
    assert train.groups == [sorted(COLOURS), list("0123456789")]
    assert (len(train), len(val)) == (CONFIG.classification_train, CONFIG.classification_val)
    for path, labels in train.samples:
        picture = np.asarray(Image.open(path))
        assert colour_in(picture, (0, 0, picture.shape[1], picture.shape[0])) == train.groups[0][labels[0]]


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_config_writes_the_same_bytes(folder, tmp_path):
    again = write_digit_scenes(tmp_path / "again", dataclasses.replace(CONFIG))
    assert contents(again) == contents(folder)
    other = contents(write_digit_scenes(tmp_path / "other", dataclasses.replace(CONFIG, seed=8)))
    assert other.keys() != contents(folder).keys() or all(
        other[name] != content for name, content in contents(folder).items() if name.endswith(".json")
    )


def test_more_scenes_leave_the_first_ones_as_they_are(folder, tmp_path):
    """Each part has a random generator of its own, so parts do not depend on the size of another."""
    more = write_digit_scenes(tmp_path / "more", dataclasses.replace(CONFIG, train_scenes=33, classification_train=44))
    before, after = contents(folder), contents(more)
    changed = {name for name in before if before[name] != after.get(name)}
    assert changed == {"train.json", "digit_scenes.json"}


def test_what_is_there_already_is_not_written_again(folder, monkeypatch):
    monkeypatch.setattr(digit_scenes, "_write_parts", None)
    assert write_digit_scenes(str(folder), CONFIG) == folder


def test_another_folder_is_refused_and_left_alone(folder, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    message = "exists and was not written with this DigitScenes config; remove it or name another folder"
    with pytest.raises(ValueError, match=message):
        write_digit_scenes(tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    before = contents(folder)
    with pytest.raises(ValueError, match=message):
        write_digit_scenes(folder, dataclasses.replace(CONFIG, seed=8))
    assert contents(folder) == before


@pytest.mark.parametrize("part", ["_write_train", "_write_eval", "_write_classification"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_call_leaves_nothing(part, error, tmp_path, monkeypatch):
    def interrupted(root, *args):
        (root / "half").mkdir()
        (root / "half" / "file").write_text("half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(digit_scenes, part, interrupted)
        with pytest.raises(error):
            write_digit_scenes(tmp_path / "deep" / "data", CONFIG)
    assert list((tmp_path / "deep").iterdir()) == []


def test_leftovers_of_a_killed_call_do_no_harm(folder, tmp_path):
    (tmp_path / "data.partial" / "images" / "train").mkdir(parents=True)
    (tmp_path / "data.partial" / "images" / "train" / "old.png").write_text("old")
    assert contents(write_digit_scenes(tmp_path / "data", CONFIG)) == contents(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"digit_pixels": (20, 70)}, r"digit_pixels are \[20, 70\] and the shortest side of the canvases is 48"),
        ({"digit_pixels": ()}, "every digit has to fit into every canvas"),
        ({"canvases": ()}, "the shortest side of the canvases is 0"),
        ({"max_digits": 0}, "max_digits is 0 but must be from 1 to 60"),
        ({"max_digits": 61}, "max_digits is 61 but must be from 1 to 60"),
        ({"grid": 0}, "grid is 0 but must be at least 1"),
        ({"turns": 0}, "turns is 0 but must be at least 1"),
        ({"train_scenes": -1}, "train_scenes is -1 but must be at least 0"),
    ],
)
def test_configs_that_cannot_be_drawn_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DigitScenesConfig(**fields)


def test_a_config_from_yaml_is_the_same_config(folder):
    """YAML has lists where the defaults are tuples."""
    values = json.loads(json.dumps(dataclasses.asdict(CONFIG)))
    assert write_digit_scenes(folder, DigitScenesConfig(**values)) == folder


@pytest.mark.parametrize("side", DigitScenesConfig().digit_pixels)
def test_every_handwritten_digit_has_ink_at_every_size(glyphs, side):
    config = DigitScenesConfig(digit_pixels=(side,), canvases=((64, 64),))
    rng = random.Random(0)
    for pool in glyphs.values():
        for digit, images in pool.items():
            for image in images:
                scene = draw_scene(rng, dict.fromkeys(range(10), image[None]), config, count=1)
                x1, y1, x2, y2 = scene.digits[0].box
                assert x2 - x1 >= 3 and y2 - y1 >= side // 2, digit


def test_crowded_scenes_still_end(glyphs):
    scene = draw_scene(random.Random(0), glyphs["val"], DigitScenesConfig(max_digits=60), count=60)
    assert 2 <= len(scene.digits) < 60
    assert {q.kind for q in digit_scenes.ask_all(random.Random(0), scene)} >= {"count", "presence", "position"}
