"""Reader of conversations in LLaVA's JSON format (mix665k and everything written like it)."""

import codecs
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from torch.utils.data import Dataset

logger = logging.getLogger(__name__)

IMAGE_PLACEHOLDER = "<image>"
ROLE_OF_SPEAKER = {"human": "user", "gpt": "assistant", "system": "system"}
_JSON_SPACE = " \t\n\r"
_JSON_DECODER = json.JSONDecoder()
_BYTE_ORDER_MARK = "\ufeff"
_BYTES_PER_READ = 1 << 22


class LlavaConversations(Dataset):
    """Conversations of one LLaVA-format file as Hugging Face chat messages, one row parsed at a time.

    The file is a JSON array (`.json`) or one object a line (`.jsonl`) of rows like::

        {"id": "000000033471", "image": "coco/train2017/000000033471.jpg",
         "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A bus."}]}

    Opening a file reads it once, in pieces: every row is checked, and only its place in the file, its number of words
    and its number of images are kept, so that mix665k (about 1 GB of JSON) costs some 30 MB in each worker. A row is
    read again when it is asked for.

    What LLaVA's own loader does to a conversation is done here: placeholders leave the text and the images stand first
    in their turn, and `gpt` turns before the first `human` turn are dropped. The text is otherwise kept as it is.

    Args:
        json_path: the `.json` or `.jsonl` file.
        image_root: the folder that `image` paths are relative to; None for a file without images.
        on_bad_row: "raise" (default), or "skip" to leave bad rows out and log how many there were and why.

    Raises:
        ValueError: a row that cannot be trained on; the message names the file, the row (counted from 0), its id and
            the key.
        FileNotFoundError: no such JSON file (at once), or no such image (when the row is asked for, or by
            `check_images`).
    """

    def __init__(
        self,
        json_path: str | os.PathLike,
        image_root: str | os.PathLike | None,
        *,
        on_bad_row: Literal["raise", "skip"] = "raise",
    ):
        if on_bad_row not in ("raise", "skip"):
            raise ValueError(f'on_bad_row is {on_bad_row!r}, but must be "raise" or "skip".')
        self.json_path = Path(json_path)
        self.image_root = None if image_root is None else Path(image_root)
        if not self.json_path.is_file():
            raise FileNotFoundError(f"{self.json_path}: no such file of conversations.")
        if self.image_root is not None and not self.image_root.is_dir():
            raise FileNotFoundError(f"{self.image_root}: no such folder of images (for {self.json_path}).")
        self._stamp = _stamp(self.json_path.stat())

        row_numbers, places, words, images, skipped = [], [], [], [], []
        number = -1
        for number, (start, end, row) in enumerate(_iterate_rows(self.json_path)):
            try:
                paths, messages = self._read_row(number, row)
            except ValueError as error:
                if on_bad_row == "raise":
                    raise
                skipped.append(str(error))
                continue
            row_numbers.append(number)
            places.append((start, end))
            words.append(sum(_count_words(message) for message in messages))
            images.append(len(paths))
        if skipped:
            logger.warning("%s: left out %d of %d rows; the first: %s", json_path, len(skipped), number + 1, skipped[0])
        if not places:
            raise ValueError(f"{self.json_path}: holds no conversation{' that can be used' if skipped else ''}.")
        self._row_numbers = np.array(row_numbers, dtype=np.int64)
        self._places = np.array(places, dtype=np.int64)  # [rows, 2] first byte and the byte after the last
        self.word_counts = np.array(words, dtype=np.int64)  # [rows] words in all turns
        self.image_counts = np.array(images, dtype=np.int64)  # [rows]

    @property
    def is_multimodal(self) -> np.ndarray:
        """[rows] bool: whether the row has an image."""
        return self.image_counts > 0

    def lengths(self, tokens_per_image: int) -> np.ndarray:
        """[rows] approximate length of each row, in words of text plus image tokens: what the sampler groups by."""
        return self.word_counts + self.image_counts * tokens_per_image

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns row `index`.

        Returns:
            "id" (str), "image" (path as str; None for a row of text; a list of paths where the file has a list) and
            "messages" (`[{"role": ..., "content": [{"type": "image"}, {"type": "text", "text": ...}]}, ...]`).
        """
        index = range(len(self))[index]
        number, row = int(self._row_numbers[index]), self._load(index)
        paths, messages = self._read_row(number, row)
        for path in paths:
            if not os.path.isfile(path):
                raise FileNotFoundError(f'{self._name(number, row)}, key "image": there is no file {path}.')
        image = paths if isinstance(row.get("image"), list) else (paths[0] if paths else None)
        return {"id": _row_id(number, row), "image": image, "messages": messages}

    def check_images(self) -> None:
        """Looks for every image on the disk, so that a run does not find one missing after a day.

        Raises:
            FileNotFoundError: naming the first missing image and how many are missing.
        """
        missing, first = 0, ""
        for index in np.flatnonzero(self.is_multimodal).tolist():
            number, row = int(self._row_numbers[index]), self._load(index)
            for path in self._image_paths(number, row):
                if not os.path.isfile(path):
                    missing += 1
                    first = first or f'{self._name(number, row)}, key "image": there is no file {path}'
        if missing:
            raise FileNotFoundError(f"{first} ({missing} of {int(self.image_counts.sum())} images are missing).")

    def _load(self, index: int) -> dict:
        start, end = self._places[index].tolist()
        with open(self.json_path, "rb", buffering=0) as file:
            if _stamp(os.fstat(file.fileno())) != self._stamp:
                raise ValueError(f"{self.json_path}: the file has changed since it was opened; open it again.")
            file.seek(start)
            return json.loads(file.read(end - start))

    def _name(self, number: int, row: Any) -> str:
        """How messages name a row."""
        named = f" (id {row['id']!r})" if isinstance(row, dict) and "id" in row else ""
        return f"{self.json_path}: row {number}{named}"

    def _image_paths(self, number: int, row: dict) -> list[str]:
        names = row.get("image")
        names = [] if names is None else names if isinstance(names, list) else [names]
        for name in names:
            if not isinstance(name, str) or not name:
                raise ValueError(
                    f'{self._name(number, row)}, key "image": {name!r} is not a path; '
                    "give a path below the image folder, a list of them, or leave the key out."
                )
        if not names:
            return []
        if self.image_root is None:
            raise ValueError(f'{self._name(number, row)}, key "image": there is an image, but image_root is None.')
        return [os.path.join(self.image_root, name) for name in names]

    def _read_row(self, number: int, row: Any) -> tuple[list[str], list[dict]]:
        """Checks one row and returns its image paths and chat messages."""
        name = self._name(number, row)
        if not isinstance(row, dict):
            raise ValueError(f"{name}: is {_kind_of(row)}, not an object with a list of conversations.")
        turns = row.get("conversations")
        if not isinstance(turns, list):
            raise ValueError(f'{name}, key "conversations": is {_kind_of(turns)}, not a list of turns.')
        paths = self._image_paths(number, row)
        messages: list[dict[str, Any]] = []
        placeholders = 0
        for position, turn in enumerate(turns):
            where = f'{name}, key "conversations", turn {position}'
            role, text = _read_turn(where, turn)
            if role == "assistant" and all(message["role"] == "system" for message in messages):
                continue  # nothing was asked yet; LLaVA drops such a turn as well
            _check_order(where, role, messages)
            found = text.count(IMAGE_PLACEHOLDER)
            if found and role != "user":
                raise ValueError(
                    f"{where}: an {IMAGE_PLACEHOLDER} placeholder may only stand in a human turn, "
                    f"but this one is from {turn['from']!r}."
                )
            placeholders += found
            if found:
                text = text.replace(IMAGE_PLACEHOLDER, "").strip()
            messages.append({"role": role, "content": [{"type": "image"}] * found + [{"type": "text", "text": text}]})
        if not any(message["role"] == "assistant" for message in messages):
            raise ValueError(f'{name}, key "conversations": there is no gpt turn after a human turn to learn from.')
        if placeholders != len(paths):
            raise ValueError(
                f"{name}: the human turns hold {placeholders} {IMAGE_PLACEHOLDER} placeholder(s), but the key "
                f'"image" names {len(paths)} image(s); there must be one placeholder an image.'
            )
        return paths, messages


def _read_turn(where: str, turn: Any) -> tuple[str, str]:
    """Role and text of one turn."""
    if not isinstance(turn, dict):
        raise ValueError(f'{where}: is {_kind_of(turn)}, not an object with "from" and "value".')
    speaker, text = turn.get("from"), turn.get("value")
    if not isinstance(speaker, str) or speaker not in ROLE_OF_SPEAKER:
        raise ValueError(f'{where}, key "from": {speaker!r} is unknown; known are {", ".join(ROLE_OF_SPEAKER)}.')
    if not isinstance(text, str):
        raise ValueError(f'{where}, key "value": is {_kind_of(text)}, not text.')
    return ROLE_OF_SPEAKER[speaker], text


def _check_order(where: str, role: str, messages: list[dict]) -> None:
    """Human and gpt take turns, and a system turn can only come first."""
    previous = messages[-1]["role"] if messages else "system"
    if role == "system" and messages:
        raise ValueError(f"{where}: a system turn may only be the first turn.")
    if role == previous and role != "system":
        raise ValueError(f"{where}: two {role} turns follow each other; human and gpt must take turns.")


def _iterate_rows(path: Path) -> Iterator[tuple[int, int, Any]]:
    """Yields (first byte, byte after the last, parsed row) for each row of a `.json` array or a `.jsonl` file."""
    return _iterate_lines(path) if path.suffix == ".jsonl" else _iterate_array(path, _BYTES_PER_READ)


def _iterate_lines(path: Path) -> Iterator[tuple[int, int, Any]]:
    start = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            if line.strip():
                try:
                    yield start, start + len(line), json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}: line {number + 1} is not valid JSON ({error}).") from error
            start += len(line)


def _iterate_array(path: Path, bytes_per_read: int) -> Iterator[tuple[int, int, Any]]:
    """Walks a JSON array whose text need not fit into memory."""
    with open(path, "rb") as file:
        window = _TextWindow(path, file, bytes_per_read)
        if window.next_character() == _BYTE_ORDER_MARK:
            window.skip(1)
        if window.next_character() != "[":
            raise ValueError(f"{path}: is not a JSON array of rows (for one object a line, name the file .jsonl).")
        window.skip(1)
        number = 0
        while window.next_character() != "]":
            if number:
                if window.next_character() != ",":
                    raise ValueError(f"{path}: there is no comma or ] after row {number - 1}; is the file cut off?")
                window.skip(1)
                window.next_character()
            start = window.start
            row = window.take_row(number)
            yield start, window.start, row
            number += 1
        window.skip(1)
        if window.next_character():
            raise ValueError(f"{path}: there is more text after the ] that ends the array.")


class _TextWindow:
    """The part of a JSON file that is in memory: `text`, whose first character is byte `start` of the file."""

    def __init__(self, path: Path, file: BinaryIO, bytes_per_read: int):
        self.path, self.file, self.bytes_per_read = path, file, bytes_per_read
        self.text, self.position, self.start = "", 0, 0  # `start` is the byte of text[position]
        self.to_text = codecs.getincrementaldecoder("utf-8")()

    def read_more(self, size: int) -> bool:
        """Drops what was skipped and reads on; False at the end of the file."""
        data = self.file.read(size)
        try:
            self.text, self.position = self.text[self.position :] + self.to_text.decode(data, final=not data), 0
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: is not UTF-8 text ({error}).") from error
        return bool(data)

    def skip(self, characters: int) -> None:
        self.start += len(self.text[self.position : self.position + characters].encode())
        self.position += characters

    def next_character(self) -> str:
        """Goes to the next character that is not white space and returns it; "" at the end of the file."""
        while True:
            here = self.position
            while here < len(self.text) and self.text[here] in _JSON_SPACE:
                here += 1
            self.skip(here - self.position)
            if here < len(self.text):
                return self.text[here]
            if not self.read_more(self.bytes_per_read):
                return ""

    def take_row(self, number: int) -> Any:
        """Parses the row that begins here and goes past it.

        Each time the text in memory ends before the row does, twice as much is read, so that even a broken file is
        read in linear time.
        """
        size, at_end = self.bytes_per_read, False
        while True:
            try:
                row, end = _JSON_DECODER.raw_decode(self.text, self.position)
                if at_end or end < len(self.text):
                    self.skip(end - self.position)
                    return row
            except ValueError as error:
                if at_end:
                    raise ValueError(f"{self.path}: row {number} is not valid JSON ({error}).") from error
            at_end = not self.read_more(size)
            size *= 2


def _row_id(number: int, row: dict) -> str:
    return str(row.get("id", f"row {number}"))


def _count_words(message: dict) -> int:
    return sum(len(part["text"].split()) for part in message["content"] if part["type"] == "text")


def _kind_of(value: Any) -> str:
    """The JSON name of a value's type, for messages."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "missing"}
    return names.get(type(value), "a number")


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns
