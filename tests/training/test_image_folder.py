"""Folders of pictures, one per class or per combination of attributes."""

import pytest
import torch
from PIL import Image

from ssm_vlm import LlavaStyleImageProcessor
from ssm_vlm.training.image_folder import ImageFolder, collate_images

PROCESSOR = LlavaStyleImageProcessor(geometry="letterbox", size=8, downsampling=[[8, "floor"]])


@pytest.fixture
def folder(tmp_path):
    """Makes pictures at paths, each of its own grey."""

    def make(*paths: str):
        for value, path in enumerate(paths):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (10 * value,) * 3).save(tmp_path / path)
        return tmp_path

    return make


def test_classes_are_the_folders_in_alphabetical_order(folder):
    root = folder("dog/b.png", "cat/a.jpg", "dog/A.PNG", "ant/x.webp")
    (root / "dog" / "notes.txt").write_text("no picture")
    (root / "list.csv").write_text("no folder")
    data = ImageFolder(root, PROCESSOR)
    assert data.label_names == ["ant", "cat", "dog"] and data.groups == [["ant", "cat", "dog"]]
    assert [(row["id"], row["labels"]) for row in data] == [
        ("ant/x.webp", [0]),
        ("cat/a.jpg", [1]),
        ("dog/A.PNG", [2]),
        ("dog/b.png", [2]),
    ]
    assert len(data) == 4


def test_pixels_are_those_of_the_image_processor(folder):
    data = ImageFolder(folder("a/0.png", "b/1.png"), PROCESSOR)
    expected = PROCESSOR(Image.new("RGB", (8, 8), (10, 10, 10)), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(data[1]["pixel_values"], expected)


def test_attributes_are_groups_of_labels_of_their_own(folder):
    data = ImageFolder(folder("red_7/0.png", "blue_7/1.png", "red_3/2.png"), PROCESSOR, attributes=True)
    assert data.groups == [["blue", "red"], ["3", "7"]] and data.label_names == ["blue", "red", "3", "7"]
    assert {row["id"]: row["labels"] for row in data} == {
        "red_7/0.png": [1, 1],
        "blue_7/1.png": [0, 1],
        "red_3/2.png": [1, 0],
    }


def test_an_underscore_is_part_of_a_name_without_attributes(folder):
    assert ImageFolder(folder("red_7/0.png", "cat/1.png"), PROCESSOR).label_names == ["cat", "red_7"]


def test_a_validation_set_takes_the_labels_of_its_training_set(folder):
    root = folder("train/a/0.png", "train/b/1.png", "train/c/2.png", "val/c/3.png", "other/d/4.png")
    train = ImageFolder(root / "train", PROCESSOR)
    val = ImageFolder(root / "val", PROCESSOR, groups=train.groups)
    assert val[0]["labels"] == [2] and val.label_names == ["a", "b", "c"]
    with pytest.raises(ValueError, match="has the class 'd', which the training set lacks"):
        ImageFolder(root / "other", PROCESSOR, groups=train.groups)


def test_bad_folders_are_told_what_would_be_right(folder):
    root = folder("mixed/red_7/0.png", "mixed/blue/1.png")
    (root / "empty" / "cat").mkdir(parents=True)
    for place in ("missing", "mixed/blue", "mixed/blue/1.png"):
        with pytest.raises(ValueError, match=f"{place} must be a folder that holds one folder of pictures per class"):
            ImageFolder(root / place, PROCESSOR)
    with pytest.raises(ValueError, match="every folder must have as many attributes, joined by '_', as 'blue'"):
        ImageFolder(root / "mixed", PROCESSOR, attributes=True)
    with pytest.raises(ValueError, match="empty holds no picture"):
        ImageFolder(root / "empty", PROCESSOR)


def test_a_picture_that_will_not_decode_is_named(folder):
    root = folder("a/good.png")
    (root / "a" / "bad.png").write_bytes(b"no picture")
    data = ImageFolder(root, PROCESSOR)
    with pytest.raises(ValueError, match="bad.png"):
        data[0]


def test_a_batch(folder):
    data = ImageFolder(folder("red_7/0.png", "blue_7/1.png"), PROCESSOR, attributes=True)
    batch = collate_images(list(data))
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert torch.equal(batch["pixel_values"][1], data[1]["pixel_values"])
    assert batch["labels"].tolist() == [[0, 0], [1, 0]]
    assert batch["sample_ids"] == ["blue_7/1.png", "red_7/0.png"]
