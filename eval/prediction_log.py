"""The file that a model's answers are kept in while it is evaluated, so that an interrupted run goes on."""

import json
import os
from pathlib import Path
from typing import Any


class PredictionLog:
    """A JSONL file: one line that says what was asked of whom, then one line for each answer.

    Opening a file that is there already goes on with it. A last line that was cut off while it was written is removed.
    Answers to something else are never mixed in: every value of the header must be the same.

    Args:
        path: the file; its folder is made where it is missing.
        header: what the answers depend on, as plain JSON values.

    Raises:
        ValueError: the file holds answers of another run, or is no such file.
    """

    def __init__(self, path: str | os.PathLike, header: dict[str, Any]):
        self.path = Path(path)
        self.answers: dict[str, dict[str, Any]] = {}  # what each line says, by id
        first_line = _line({"predictions": header})
        written = self.path.read_bytes() if self.path.exists() else b""
        whole = written[: written.rfind(b"\n") + 1]
        if not whole:
            if not first_line.startswith(written):
                raise ValueError(f"{self.path} is not a file of predictions; choose another name for them.")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(first_line)
            return
        for number, line in enumerate(whole.splitlines()):
            try:
                content = json.loads(line)
                if number == 0:
                    self._check_header(content["predictions"], header)
                else:
                    self.answers[content["id"]] = content
            except (ValueError, TypeError, KeyError) as error:
                if isinstance(error, _OtherRun):
                    raise
                raise ValueError(
                    f"{self.path}: line {number + 1} is not a line of predictions ({error}); remove the file or "
                    "choose another name."
                ) from error
        if len(whole) < len(written):
            os.truncate(self.path, len(whole))

    def append(self, answers: list[dict[str, Any]]) -> None:
        """Writes answers, each with its "id", to the disk before returning.

        Raises:
            OSError: the disk is full or gone; what was written before is kept.
        """
        try:
            with open(self.path, "ab") as file:
                file.write(b"".join(map(_line, answers)))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot write predictions ({error.strerror}); the {len(self.answers)} that are there are kept, and "
                "the same call goes on after them",
                str(self.path),
            ) from error
        self.answers.update({answer["id"]: answer for answer in answers})

    def _check_header(self, there: dict[str, Any], here: dict[str, Any]) -> None:
        differing = [
            f"{key} ({there.get(key)!r} there, {here.get(key)!r} here)"
            for key in {**here, **there}
            if there.get(key) != here.get(key)
        ]
        if differing:
            raise _OtherRun(
                f"{self.path} holds predictions of another run, which differs in {', '.join(differing)}; remove the "
                "file or choose another name."
            )


class _OtherRun(ValueError):
    """The header is not the expected one."""


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
