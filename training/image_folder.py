"""Classification pictures: one folder of pictures per class."""

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from ..modeling.image_processing_llava_style import LlavaStyleImageProcessor

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class ImageFolder(Dataset):
    """Pictures of `root/CLASS/*.png` (ImageNet's layout), classes in alphabetical order.

    Args:
        root: the folder of class folders.
        image_processor: turns a picture into pixels.
        classes: class names in order; those of `root` by default. A validation set takes those of its training set.

    Raises:
        ValueError: no class folders, a class that is not in `classes`, or no picture at all.
    """

    def __init__(self, root: str | Path, image_processor: LlavaStyleImageProcessor, classes: list[str] | None = None):
        self.root, self.image_processor = Path(root), image_processor
        found = sorted(folder.name for folder in self.root.iterdir() if folder.is_dir()) if self.root.is_dir() else []
        if not found:
            raise ValueError(f"{self.root} must be a folder that holds one folder of pictures per class.")
        self.classes = classes or found
        unknown = set(found) - set(self.classes)
        if unknown:
            raise ValueError(f"{self.root} has the class {sorted(unknown)[0]!r}, which the training set lacks.")
        self.samples = [
            (path, self.classes.index(name))
            for name in found
            for path in sorted((self.root / name).iterdir())
            if path.suffix.lower() in SUFFIXES
        ]
        if not self.samples:
            raise ValueError(f"{self.root} holds no picture ({', '.join(sorted(SUFFIXES))}).")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, label = self.samples[index]
        pixels = self.image_processor(path, return_tensors="pt")["pixel_values"][0]  # [3, H, W]
        return {"id": str(path.relative_to(self.root)), "pixel_values": pixels, "labels": label}


def collate_images(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows of an `ImageFolder` -> `pixel_values` [B, 3, H, W], `labels` [B], `sample_ids`."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
        "sample_ids": [row["id"] for row in rows],
    }
