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
        attributes: folder names are attributes joined by `_`, such as `red_7`; each attribute is a class of its own,
            one of its group (here the colours and the digits).
        groups: [groups][classes] names in order; found in `root` by default. A validation set takes those of its
            training set.

    Raises:
        ValueError: no class folders, folders with unequal numbers of attributes, a class that is not in `groups`, or
            no picture at all.
    """

    def __init__(
        self,
        root: str | Path,
        image_processor: LlavaStyleImageProcessor,
        *,
        attributes: bool = False,
        groups: list[list[str]] | None = None,
    ):
        self.root, self.image_processor = Path(root), image_processor
        folders = sorted(folder.name for folder in self.root.iterdir() if folder.is_dir()) if self.root.is_dir() else []
        if not folders:
            raise ValueError(f"{self.root} must be a folder that holds one folder of pictures per class.")
        names = {folder: tuple(folder.split("_")) if attributes else (folder,) for folder in folders}
        if len({len(parts) for parts in names.values()}) > 1:
            raise ValueError(
                f"{self.root}: every folder must have as many attributes, joined by '_', as {folders[0]!r}."
            )
        self.groups = groups or [sorted(set(group)) for group in zip(*names.values(), strict=True)]
        self.samples: list[tuple[Path, list[int]]] = []
        for folder, parts in names.items():
            try:
                labels = [group.index(part) for group, part in zip(self.groups, parts, strict=True)]
            except ValueError:
                raise ValueError(f"{self.root} has the class {folder!r}, which the training set lacks.") from None
            pictures = sorted(path for path in (self.root / folder).iterdir() if path.suffix.lower() in SUFFIXES)
            self.samples += [(path, labels) for path in pictures]
        if not self.samples:
            raise ValueError(f"{self.root} holds no picture ({', '.join(sorted(SUFFIXES))}).")

    @property
    def label_names(self) -> list[str]:
        """Names of all labels, group after group."""
        return [name for group in self.groups for name in group]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, labels = self.samples[index]
        prepared = self.image_processor(path, return_tensors="pt")  # type: ignore[arg-type]  # ours takes paths, too
        pixels = prepared["pixel_values"][0]  # [3, H, W]
        return {"id": str(path.relative_to(self.root)), "pixel_values": pixels, "labels": labels}


def collate_images(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows of an `ImageFolder` -> `pixel_values` [B, 3, H, W], `labels` [B, groups], `sample_ids`."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
        "sample_ids": [row["id"] for row in rows],
    }
