"""LlavaConversations: LLaVA's format as it is published, every kind of bad row, and files read in pieces."""

import json
import os
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ssm_vlm.training.datasets import LlavaConversations, _iterate_array


def turns(*texts):
    """Human and gpt in turns."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def text_row(**changes):
    return {"id": "t", "conversations": turns("Hello?", "Hi."), **changes}


# Rows as mix665k has them: with an image, several turns, text only, an image named last, an integer id.
REAL_ROWS = [
    {
        "id": "000000033471",
        "image": "coco/train2017/000000033471.jpg",
        "conversations": turns("<image>\nWhat are the colors?", "White and red.", "What is it?", "A bus."),
    },
    {"id": "wgByO4Y_0", "model": "", "conversations": turns("Write a poem about a café.", "Once …")},
    {"id": 2409, "image": "vg/VG_100K/2409.jpg", "conversations": turns("Where?\n<image>", "[0.1, 0.2, 0.3, 0.4]")},
]


@pytest.fixture
def write(tmp_path):
    """Writes rows (as .json, or .jsonl) beside a folder of images; returns the file and the folder."""
    for name in ("coco/train2017/000000033471.jpg", "vg/VG_100K/2409.jpg", "a.png", "b.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3)).save(path)

    def write_rows(rows, name="rows.json"):
        path = tmp_path / name
        lines = name.endswith(".jsonl")
        path.write_text("\n\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, indent=1))
        return path, tmp_path / "images"

    return write_rows


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_real_rows(write, name):
    path, images = write(REAL_ROWS, name)
    data = LlavaConversations(path, images)
    assert len(data) == 3
    assert data[0] == {
        "id": "000000033471",
        "image": os.path.join(images, "coco/train2017/000000033471.jpg"),
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What are the colors?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "White and red."}]},
            {"role": "user", "content": [{"type": "text", "text": "What is it?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A bus."}]},
        ],
    }
    assert data[1]["image"] is None and data[1]["messages"][1]["content"][0]["text"] == "Once …"
    assert data[2]["id"] == "2409" and data[2] == data[-1]
    assert data[2]["messages"][0]["content"] == [{"type": "image"}, {"type": "text", "text": "Where?"}]
    assert data.is_multimodal.tolist() == [True, False, True]
    assert data.word_counts.tolist() == [12, 8, 5]
    assert data.lengths(100).tolist() == [112, 8, 105]
    with pytest.raises(IndexError):
        data[3]


def test_system_turn_leading_gpt_turn_and_several_images(write):
    several = {"image": ["a.png", "b.png"], "conversations": turns("<image> or <image>?", "The second.")}
    shared = {"id": "s", "conversations": [{"from": "gpt", "value": "Welcome!"}, *turns("Q", "A")]}
    system = {"id": "y", "conversations": [{"from": "system", "value": "Be brief."}, *turns("Q", "A", "and")]}
    path, images = write([several, shared, system])
    data = LlavaConversations(path, images)
    assert data[0]["id"] == "row 0"
    assert data[0]["image"] == [os.path.join(images, "a.png"), os.path.join(images, "b.png")]
    assert data[0]["messages"][0]["content"] == [{"type": "image"}] * 2 + [{"type": "text", "text": "or ?"}]
    assert [message["role"] for message in data[1]["messages"]] == ["user", "assistant"]
    assert [message["role"] for message in data[2]["messages"]] == ["system", "user", "assistant", "user"]


BAD_ROWS = {
    "no gpt turn": (text_row(conversations=turns("Hello?")), r"there is no gpt turn after a human turn to learn from"),
    "only gpt": (text_row(conversations=[{"from": "gpt", "value": "x"}]), r"there is no gpt turn after a human turn"),
    "empty": (text_row(conversations=[]), r"there is no gpt turn"),
    "no conversations": ({"id": "t"}, r'key "conversations": is missing, not a list of turns'),
    "unknown speaker": (
        text_row(conversations=[{"from": "bard", "value": "x"}]),
        r"turn 0, key \"from\": 'bard' is unknown; known are human, gpt, system",
    ),
    "no value": (text_row(conversations=[{"from": "human"}]), r'turn 0, key "value": is missing, not text'),
    "turn is text": (text_row(conversations=["Hello?"]), r'turn 0: is text, not an object with "from" and "value"'),
    "two in a row": (
        text_row(conversations=turns("Q", "A") + turns("Q2", "A2")[1:]),
        r"turn 2: two assistant turns follow each other; human and gpt must take turns",
    ),
    "late system": (
        text_row(conversations=[*turns("Q", "A"), {"from": "system", "value": "x"}]),
        r"turn 2: a system turn may only be the first",
    ),
    "placeholder without image": (
        text_row(conversations=turns("<image>\nQ", "A")),
        r'hold 1 <image> placeholder\(s\), but the key "image" names 0 image\(s\)',
    ),
    "image without placeholder": (text_row(image="a.png"), r"hold 0 <image> placeholder.* names 1 image"),
    "placeholder in an answer": (
        text_row(image="a.png", conversations=turns("Q", "<image>")),
        r"may only stand in a human turn, but this one is from 'gpt'",
    ),
    "image is a number": (text_row(image=3), r'key "image": 3 is not a path'),
    "image is empty": (text_row(image=""), r"key \"image\": '' is not a path"),
    "row is a list": ([1], r"rows.json: row 1: is a list, not an object"),
}


@pytest.mark.parametrize("bad, message", BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_bad_rows(write, bad, message, caplog):
    path, images = write([text_row(id="first"), bad, text_row(id="last")])
    with pytest.raises(ValueError, match=message) as error:
        LlavaConversations(path, images)
    assert str(path) in str(error.value) and "row 1" in str(error.value)
    assert "(id 't')" in str(error.value) or isinstance(bad, list)

    data = LlavaConversations(path, images, on_bad_row="skip")
    assert [data[0]["id"], data[1]["id"]] == ["first", "last"] and len(data) == 2
    assert "left out 1 of 3 rows; the first: " + str(error.value) in caplog.text


def test_missing_images_are_found_late_or_beforehand(write):
    gone = text_row(id="g", image="gone.png", conversations=turns("<image>", "A"))
    path, images = write([*REAL_ROWS, gone, gone])
    data = LlavaConversations(path, images)
    assert data[0]["id"] == "000000033471"
    message = rf"row 3 \(id 'g'\), key \"image\": there is no file {images}/gone.png"
    with pytest.raises(FileNotFoundError, match=message):
        data[3]
    with pytest.raises(FileNotFoundError, match=message + r" \(2 of 4 images are missing\)"):
        data.check_images()
    LlavaConversations(write(REAL_ROWS)[0], images).check_images()


def test_rows_keep_their_numbers_when_others_are_skipped(write):
    nameless = {"image": "gone.png", "conversations": turns("<image>", "A")}
    data = LlavaConversations(*write([{}, nameless]), on_bad_row="skip")
    with pytest.raises(FileNotFoundError, match=r"rows.json: row 1, key \"image\": there is no file"):
        data[0]


BAD_FILES = {
    "object": (b'{"a": 1}', r"is not a JSON array of rows \(for one object a line, name the file .jsonl\)"),
    "empty file": (b"", r"is not a JSON array"),
    "no rows": (b"[]", r"holds no conversation\."),
    "broken row": (b'[{"id": }]', r"row 0 is not valid JSON"),
    "cut off in a row": (json.dumps([text_row()]).encode()[:-9], r"row 0 is not valid JSON"),
    "cut off after a row": (json.dumps([text_row()]).encode()[:-1], r"no comma or \] after row 0; is the file cut off"),
    "trailing comma": (json.dumps([text_row()]).encode()[:-1] + b",]", r"row 1 is not valid JSON"),
    "two arrays": (json.dumps([text_row()]).encode() * 2, r"more text after the \] that ends the array"),
    "not UTF-8": (b'[{"id": "\xff"}]', r"is not UTF-8 text"),
}


@pytest.mark.parametrize("content, message", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        LlavaConversations(path, None)
    assert str(path) in str(error.value)


def test_bad_line_and_bad_arguments(write, tmp_path):
    path, images = write([text_row()], "rows.jsonl")
    with open(path, "a") as file:
        file.write('\n{"id": ')
    with pytest.raises(ValueError, match=r"rows.jsonl: line 2 is not valid JSON"):
        LlavaConversations(path, images)
    with pytest.raises(FileNotFoundError, match=r"none.json: no such file of conversations"):
        LlavaConversations(tmp_path / "none.json", images)
    with pytest.raises(FileNotFoundError, match=r"none: no such folder of images"):
        LlavaConversations(path, tmp_path / "none")
    with pytest.raises(ValueError, match=r'on_bad_row is \'ignore\', but must be "raise" or "skip"'):
        LlavaConversations(path, images, on_bad_row="ignore")
    with pytest.raises(ValueError, match=r"there is an image, but image_root is None"):
        LlavaConversations(write(REAL_ROWS)[0], None)
    with pytest.raises(ValueError, match=r"holds no conversation that can be used"):
        LlavaConversations(write([{}], "bad.json")[0], images, on_bad_row="skip")


def test_a_changed_file_is_noticed(write):
    path, images = write(REAL_ROWS)
    data = LlavaConversations(path, images)
    path.write_text(path.read_text() + " ")
    with pytest.raises(ValueError, match="the file has changed since it was opened"):
        data[0]


def test_reaches_workers_small(write):
    """Only places and counts travel to a worker, not the rows."""
    path, images = write([text_row(conversations=turns("word " * 5000, "A"))] * 20)
    data = LlavaConversations(path, images)
    parcel = pickle.dumps(data)
    assert len(parcel) < 4000
    assert pickle.loads(parcel)[7] == data[7]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=3),
    max_leaves=6,
)


@given(
    rows=st.lists(JSON_VALUES, max_size=6), ascii_only=st.booleans(), indent=st.none() | st.just(2), bom=st.booleans()
)
@pytest.mark.parametrize("bytes_per_read", [1, 7, 1 << 20])
def test_reading_in_pieces_finds_every_row_and_its_bytes(
    tmp_path_factory, rows, ascii_only, indent, bom, bytes_per_read
):
    path = tmp_path_factory.mktemp("pieces") / "rows.json"
    content = json.dumps(rows, ensure_ascii=ascii_only, indent=indent).encode()
    path.write_bytes(b"\xef\xbb\xbf" * bom + content + b"\n")
    found = list(_iterate_array(path, bytes_per_read))
    assert [row for _, _, row in found] == rows
    raw = path.read_bytes()
    assert [json.loads(raw[start:end]) for start, end, _ in found] == rows


def test_counts_are_arrays(write):
    path, images = write(REAL_ROWS)
    data = LlavaConversations(path, images)
    assert data.lengths(0).dtype == np.int64 and data.lengths(0).shape == (3,)
