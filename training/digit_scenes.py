"""DigitScenes: handwritten digits composed into coloured scenes, written in the formats of the big data sets.

The glyphs are scikit-learn's bundled UCI set (1,797 8x8 greyscale digits); train, val and test scenes use disjoint
glyphs. `write_digit_scenes` writes, deterministically by seed:

| file | format | read by |
|---|---|---|
| `train.json` + `images/train/` | LLaVA conversations about pictures | `LlavaConversations` |
| `text.json` | LLaVA conversations without pictures, for the language model | `LlavaConversations` |
| `vqa_{split}_questions.json`, `vqa_{split}_annotations.json` | VQA v2, ten answers per question | `read_vqa` |
| `refs(digits).json`, `instances.json` | RefCOCO expressions over COCO boxes | `read_refcoco` |
| `classification/{split}/{class}/` | one folder of pictures per class | `ImageFolder` |

Boxes in conversations are `[x1, y1, x2, y2]` with two decimals in the frame of LLaVA's labels: the raw picture padded
to a centred square (`centered_square`).
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..modeling.geometry import make_geometry

COLOURS = {
    "red": (225, 45, 40),
    "green": (40, 165, 65),
    "blue": (45, 85, 230),
    "yellow": (235, 200, 30),
    "purple": (150, 55, 190),
    "white": (245, 245, 245),
}
BACKGROUNDS = [(20, 20, 24), (70, 70, 74), (44, 36, 30), (26, 40, 46)]
GROUNDING_PROMPT = 'Please provide the bounding box coordinate of the region this sentence describes: "{}"'
SHORT_ANSWER = "Answer the question using a single word or phrase."
FORMAT_VERSION = 1


@dataclass(frozen=True)
class DigitScenesConfig:
    """What to write. Two configs that are equal give the same bytes.

    Args:
        train_scenes: pictures in `train.json`.
        text_scenes: scenes described in words only, in `text.json`.
        val_scenes: pictures to choose settings on, with VQA and RefCOCO files.
        test_scenes: pictures to report scores on, likewise.
        classification_train: single-digit pictures to pretrain encoders on.
        classification_val: single-digit pictures to score encoders on.
        canvases: raw sizes (height, width) in pixels, drawn with equal weight.
        max_digits: at most so many digits in a scene.
        digit_pixels: sides that a digit's square may have, in pixels.
        grid: digits stand at multiples of so many pixels. A coarser grid needs less training, above all of a ViT whose
            patches it divides.
        turns: question and answer pairs per training conversation.
        seed: everything is drawn from it.
    """

    train_scenes: int = 10000
    text_scenes: int = 8000
    val_scenes: int = 60
    test_scenes: int = 150
    classification_train: int = 16000
    classification_val: int = 1200
    canvases: tuple[tuple[int, int], ...] = ((64, 64), (64, 64), (64, 48), (48, 64))
    max_digits: int = 4
    digit_pixels: tuple[int, ...] = (20, 24, 28)
    grid: int = 4
    turns: int = 8
    seed: int = 7

    def __post_init__(self) -> None:
        """Raises ValueError where no scene can be drawn so."""
        shortest = min((side for canvas in self.canvases for side in canvas), default=0)
        if not self.digit_pixels or min(self.digit_pixels) < 1 or max(self.digit_pixels) > shortest:
            raise ValueError(
                f"digit_pixels are {list(self.digit_pixels)} and the shortest side of the canvases is {shortest}: "
                "every digit has to fit into every canvas."
            )
        most = 10 * len(COLOURS)
        if not 1 <= self.max_digits <= most:
            raise ValueError(
                f"max_digits is {self.max_digits} but must be from 1 to {most}, all digits in all colours."
            )
        for name, value in asdict(self).items():
            least = 1 if name in ("grid", "turns") else 0
            if isinstance(value, int) and value < least:
                raise ValueError(f"{name} is {value} but must be at least {least}.")


@dataclass(frozen=True)
class PlacedDigit:
    """One digit of a scene; `box` is the tight box of its ink, xyxy in raw pixels."""

    digit: int
    colour: str
    box: tuple[int, int, int, int]
    glyph: np.ndarray = field(repr=False, compare=False)  # [h, w] uint8, opacity
    corner: tuple[int, int] = field(repr=False, compare=False)  # top, left of the glyph

    @property
    def name(self) -> str:
        return f"{self.colour} {self.digit}"


@dataclass(frozen=True)
class Scene:
    height: int
    width: int
    background: tuple[int, int, int]
    digits: tuple[PlacedDigit, ...]

    def render(self) -> Image.Image:
        """Draws the scene as an RGB picture of its raw size."""
        pixels = np.empty((self.height, self.width, 3), np.float32)
        pixels[:] = self.background
        for placed in self.digits:
            top, left = placed.corner
            h, w = placed.glyph.shape
            alpha = placed.glyph[..., None].astype(np.float32) / 255
            region = pixels[top : top + h, left : left + w]
            region += alpha * (np.asarray(COLOURS[placed.colour], np.float32) - region)
        return Image.fromarray(pixels.round().astype(np.uint8))

    def side(self, placed: PlacedDigit) -> tuple[str, str]:
        """Which half of the picture the middle of a digit lies in: ("top" or "bottom", "left" or "right")."""
        x1, y1, x2, y2 = placed.box
        vertical = "top" if y1 + y2 < self.height else "bottom"
        return vertical, "left" if x1 + x2 < self.width else "right"

    def box_text(self, placed: PlacedDigit) -> str:
        """The digit's box as LLaVA writes boxes."""
        geometry = make_geometry("letterbox", self.height, self.width, max(self.height, self.width))
        return "[" + ", ".join(f"{value:.2f}" for value in geometry.to_frame(placed.box, "centered_square")) + "]"


def split_glyphs(seed: int = 7) -> dict[str, dict[int, np.ndarray]]:
    """The UCI digits as opacities, `{split: {digit: [n, 8, 8] uint8}}`; no glyph is in two splits."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    opacity = (digits.images * (255 / 16)).round().astype(np.uint8)
    rng = np.random.default_rng(seed)
    splits: dict[str, dict[int, np.ndarray]] = {"train": {}, "val": {}, "test": {}}
    for digit in range(10):
        mine = rng.permutation(np.flatnonzero(digits.target == digit))
        tenth = len(mine) // 10
        bounds = {"val": mine[:tenth], "test": mine[tenth : 3 * tenth], "train": mine[3 * tenth :]}
        for split, indices in bounds.items():
            splits[split][digit] = opacity[indices]
    return splits


def draw_scene(
    rng: random.Random, glyphs: dict[int, np.ndarray], config: DigitScenesConfig, count: int | None = None
) -> Scene:
    """Draws a scene: digits that do not overlap, no two with the same digit and colour."""
    height, width = rng.choice(config.canvases)
    wanted = count or rng.randint(1, config.max_digits)
    names = rng.sample([(digit, colour) for digit in range(10) for colour in COLOURS], wanted)
    placed: list[PlacedDigit] = []
    for digit, colour in names:
        for _ in range(40):
            side = rng.choice(config.digit_pixels)
            glyph = np.asarray(
                Image.fromarray(glyphs[digit][rng.randrange(len(glyphs[digit]))]).resize(
                    (side, side), Image.Resampling.BICUBIC
                )
            )
            rows, columns = np.flatnonzero((glyph > 48).any(1)), np.flatnonzero((glyph > 48).any(0))
            top, left = (config.grid * rng.randint(0, (length - side) // config.grid) for length in (height, width))
            x1, x2, y1, y2 = (int(value) for value in (columns[0], columns[-1] + 1, rows[0], rows[-1] + 1))
            box = (left + x1, top + y1, left + x2, top + y2)
            if all(_apart(box, other.box) for other in placed):
                placed.append(PlacedDigit(digit, colour, box, glyph, (top, left)))
                break
    return Scene(height, width, rng.choice(BACKGROUNDS), tuple(placed))


def _apart(a: tuple[int, ...], b: tuple[int, ...], gap: int = 1) -> bool:
    return a[2] + gap <= b[0] or b[2] + gap <= a[0] or a[3] + gap <= b[1] or b[3] + gap <= a[1]


# --- questions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


def _count(rng: random.Random, scene: Scene) -> Iterator[Question]:
    yield Question("count", "How many digits are in the image?", str(len(scene.digits)))


def _digit(rng: random.Random, scene: Scene) -> Iterator[Question]:
    for placed in _unique(scene, lambda p: p.colour):
        yield Question("digit", f"Which digit is {placed.colour}?", str(placed.digit))


def _colour(rng: random.Random, scene: Scene) -> Iterator[Question]:
    for placed in _unique(scene, lambda p: p.digit):
        yield Question("colour", f"What colour is the {placed.digit}?", placed.colour)


def _position(rng: random.Random, scene: Scene) -> Iterator[Question]:
    for placed in scene.digits:
        yield Question("position", f"Where is {rng.choice(_plain_names(scene, placed))}?", " ".join(scene.side(placed)))


def _presence(rng: random.Random, scene: Scene) -> Iterator[Question]:
    """One true and one false statement, so that the kind is balanced; some false ones mix two digits' traits (POPE)."""
    present = {trait for p in scene.digits for trait in (str(p.digit), f"{p.colour} digit", p.name)}
    mixed = [f"{a.colour} {b.digit}" for a in scene.digits for b in scene.digits]
    absent = {
        "digit": [str(digit) for digit in range(10)],
        "colour": [f"{colour} digit" for colour in COLOURS],
        "name": [f"{colour} {digit}" for colour in COLOURS for digit in range(10)],
        "mixed": mixed,
    }
    shown = rng.choice(scene.digits)
    kind = rng.choice(list(absent))
    true = {"digit": str(shown.digit), "colour": f"{shown.colour} digit"}.get(kind, shown.name)
    false = [name for name in absent[kind] if name not in present] or [n for n in absent["name"] if n not in present]
    for name, answer in rng.sample([(true, "yes"), (rng.choice(false), "no")], 2):
        yield Question("presence", f"Is there a {name} in the image?", answer)


def _plain_names(scene: Scene, placed: PlacedDigit) -> list[str]:
    """Names by digit, colour or both that fit this digit alone."""
    names = {f"the {placed.digit}": "digit", f"the {placed.colour} digit": "colour", f"the {placed.name}": "name"}
    return [
        name
        for name, trait in names.items()
        if [getattr(p, trait) for p in scene.digits].count(getattr(placed, trait)) == 1
    ]


def referring_expressions(scene: Scene, placed: PlacedDigit) -> list[str]:
    """Expressions that fit this digit alone, shortest first."""
    vertical, horizontal = scene.side(placed)
    digit, colour = f"the {placed.digit}", f"the {placed.colour} digit"
    placed_where: list[tuple[str, Callable[[PlacedDigit], bool]]] = [
        (f"{digit} on the {horizontal}", lambda p: p.digit == placed.digit and scene.side(p)[1] == horizontal),
        (f"{colour} at the {vertical}", lambda p: p.colour == placed.colour and scene.side(p)[0] == vertical),
        (f"the {placed.name} on the {horizontal}", lambda p: p.name == placed.name),
    ]
    return _plain_names(scene, placed) + [text for text, fits in placed_where if sum(map(fits, scene.digits)) == 1]


def _unique(scene: Scene, trait: Callable[[PlacedDigit], object]) -> list[PlacedDigit]:
    traits = [trait(placed) for placed in scene.digits]
    return [placed for placed, value in zip(scene.digits, traits, strict=True) if traits.count(value) == 1]


QUESTION_KINDS = {"count": _count, "digit": _digit, "colour": _colour, "presence": _presence, "position": _position}


def ask_all(rng: random.Random, scene: Scene) -> list[Question]:
    """Every VQA question this scene admits, in the order of `QUESTION_KINDS`."""
    return [question for kind in QUESTION_KINDS.values() for question in kind(rng, scene)]


def ask_boxes(rng: random.Random, scene: Scene) -> list[Question]:
    """One referring expression for each digit, answered by its box."""
    return [
        Question("box", rng.choice(referring_expressions(scene, placed)), scene.box_text(placed))
        for placed in scene.digits
    ]


def describe(rng: random.Random, scene: Scene) -> str:
    """The scene in words: what stands where, boxes included."""
    digits = rng.sample(scene.digits, len(scene.digits))
    return "; ".join(f"{p.name} {' '.join(scene.side(p))} {scene.box_text(p)}" for p in digits) + "."


def training_turns(rng: random.Random, scene: Scene, turns: int) -> list[tuple[str, str]]:
    """Prompt and answer pairs of one conversation: a box, every kind the scene admits, then more at random."""
    asked = ask_all(rng, scene)
    first = [rng.choice([q for q in asked if q.kind == kind]) for kind in sorted({q.kind for q in asked})]
    rest = [question for question in asked if question not in first]
    chosen = [rng.choice(ask_boxes(rng, scene)), *first][:turns]
    chosen += rng.sample(rest, min(turns - len(chosen), len(rest)))
    rng.shuffle(chosen)
    return [
        (GROUNDING_PROMPT.format(q.text) if q.kind == "box" else f"{q.text}\n{SHORT_ANSWER}", q.answer) for q in chosen
    ]


# --- files -----------------------------------------------------------------------------------------------------------


def write_digit_scenes(
    root: str | Path, config: DigitScenesConfig | None = None, progress: Callable[[str], None] = lambda line: None
) -> Path:
    """Writes the data set into `root`, or returns at once when it is already there with the same config.

    The files are written beside `root` and moved into place whole, so an interrupted call leaves nothing half-made.

    Args:
        root: folder to create.
        config: what to write; the defaults make the embedded study's data.
        progress: called with a line of text as each part begins.

    Raises:
        ValueError: `root` holds something that this function did not write with the same config.
    """
    root, config = Path(root), config or DigitScenesConfig()
    info = json.loads(json.dumps({"format_version": FORMAT_VERSION, **asdict(config)}))
    if root.exists():
        stamp = root / "digit_scenes.json"
        if stamp.is_file() and json.loads(stamp.read_text()) == info:
            return root
        raise ValueError(
            f"{root} exists and was not written with this DigitScenes config; remove it or name another folder"
        )
    partial = root.with_name(root.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_parts(partial, config, progress)
        (partial / "digit_scenes.json").write_text(json.dumps(info, indent=1))
        partial.rename(root)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return root


def _write_parts(root: Path, config: DigitScenesConfig, progress: Callable[[str], None]) -> None:
    glyphs = split_glyphs(config.seed)
    progress(f"{config.train_scenes} training scenes")
    _write_train(root, config, glyphs["train"])
    progress(f"{config.text_scenes} scenes in words")
    _write_text(root, config, glyphs["train"])
    progress(f"{config.val_scenes + config.test_scenes} scenes to evaluate on")
    _write_eval(root, config, {split: glyphs[split] for split in ("val", "test")})
    progress(f"{config.classification_train + config.classification_val} pictures to classify")
    _write_classification(root, config, glyphs)


def _write_train(root: Path, config: DigitScenesConfig, glyphs: dict[int, np.ndarray]) -> None:
    (root / "images" / "train").mkdir(parents=True)
    rng, rows = random.Random(f"{config.seed}-train"), []
    for index in range(config.train_scenes):
        scene = draw_scene(rng, glyphs, config)
        name = f"train/{index:06d}.png"
        scene.render().save(root / "images" / name, compress_level=1)
        turns = training_turns(rng, scene, config.turns)
        turns[0] = (f"<image>\n{turns[0][0]}", turns[0][1])
        rows.append({"id": f"train-{index:06d}", "image": name, "conversations": _llava(turns)})
    _write_json(root / "train.json", rows)


def _write_text(root: Path, config: DigitScenesConfig, glyphs: dict[int, np.ndarray]) -> None:
    rng, rows = random.Random(f"{config.seed}-text"), []
    for index in range(config.text_scenes):
        scene = draw_scene(rng, glyphs, config)
        turns = training_turns(rng, scene, config.turns)
        turns[0] = (f"{describe(rng, scene)}\n{turns[0][0]}", turns[0][1])
        rows.append({"id": f"text-{index:06d}", "conversations": _llava(turns)})
    _write_json(root / "text.json", rows)


def _llava(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [
        message
        for prompt, answer in turns
        for message in ({"from": "human", "value": prompt}, {"from": "gpt", "value": answer})
    ]


def _write_eval(root: Path, config: DigitScenesConfig, glyphs: dict[str, dict[int, np.ndarray]]) -> None:
    """VQA v2 and RefCOCO files; image ids are unique over the splits, as in COCO."""
    (root / "images" / "eval").mkdir(parents=True)
    images: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    refs: list[dict[str, Any]] = []
    scenes = {"val": config.val_scenes, "test": config.test_scenes}
    for split, number in scenes.items():
        rng = random.Random(f"{config.seed}-{split}")
        questions: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for _ in range(number):
            image_id = len(images) + 1
            scene = draw_scene(rng, glyphs[split], config)
            file_name = f"DigitScenes_{split}_{image_id:012d}.png"
            scene.render().save(root / "images" / "eval" / file_name, compress_level=1)
            images.append({"id": image_id, "file_name": file_name, "height": scene.height, "width": scene.width})
            for question in ask_all(rng, scene):
                question_id = image_id * 1000 + len(questions) % 1000
                questions.append({"image_id": image_id, "question": question.text, "question_id": question_id})
                annotations.append(_vqa_annotation(question, image_id, question_id))
            for placed in scene.digits:
                x1, y1, x2, y2 = placed.box
                box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
                ids = {"id": len(boxes) + 1, "image_id": image_id, "category_id": placed.digit + 1}
                boxes.append(ids | box)
                sentence = rng.choice(referring_expressions(scene, placed))
                refs.append(_ref(sentence, ref_id=len(refs) + 1, box=ids, file_name=file_name, split=split))
        head = {"data_type": "digitscenes", "data_subtype": split, "license": {"name": "CC BY 4.0"}}
        _write_json(root / f"vqa_{split}_questions.json", head | {"task_type": "Open-Ended", "questions": questions})
        _write_json(root / f"vqa_{split}_annotations.json", head | {"annotations": annotations})
    categories = [{"id": digit + 1, "name": str(digit), "supercategory": "digit"} for digit in range(10)]
    _write_json(root / "instances.json", {"images": images, "annotations": boxes, "categories": categories})
    _write_json(root / "refs(digits).json", refs)


def _vqa_annotation(question: Question, image_id: int, question_id: int) -> dict:
    answer_type = {"count": "number", "digit": "number", "presence": "yes/no"}.get(question.kind, "other")
    return {
        "question_id": question_id,
        "image_id": image_id,
        "question_type": question.kind,
        "answer_type": answer_type,
        "multiple_choice_answer": question.answer,
        "answers": [{"answer": question.answer, "answer_confidence": "yes", "answer_id": n} for n in range(1, 11)],
    }


def _ref(sentence: str, ref_id: int, box: dict[str, int], file_name: str, split: str) -> dict:
    return {
        "ref_id": ref_id,
        "ann_id": box["id"],
        "category_id": box["category_id"],
        "image_id": box["image_id"],
        "file_name": file_name,
        "split": split,
        "sent_ids": [ref_id],
        "sentences": [{"sent_id": ref_id, "sent": sentence, "raw": sentence, "tokens": sentence.split()}],
    }


def _write_classification(root: Path, config: DigitScenesConfig, glyphs: dict[str, dict[int, np.ndarray]]) -> None:
    """Pictures of a single digit; the class is its colour and digit, 60 classes in all."""
    for split, number in {"train": config.classification_train, "val": config.classification_val}.items():
        rng = random.Random(f"{config.seed}-classification-{split}")
        for digit in range(10):
            for colour in COLOURS:
                (root / "classification" / split / f"{colour}_{digit}").mkdir(parents=True)
        for index in range(number):
            scene = draw_scene(rng, glyphs[split], config, count=1)
            folder = scene.digits[0].name.replace(" ", "_")
            scene.render().save(root / "classification" / split / folder / f"{index:06d}.png", compress_level=1)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, separators=(",", ":")))
