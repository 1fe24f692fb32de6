"""What a study leaves for people: the table as JSON and Markdown, a picture of samples, a one-page HTML report."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .evaluate import Result
from .study_table import StudyRow, markdown_table
from .tasks import EvalItem


def write_report(
    folder: Path,
    rows: list[StudyRow],
    results: dict[str, Result],
    items: list[EvalItem],
    settings: dict[str, Any],
    seconds: dict[str, float],
) -> None:
    """Writes `table.json` and `table.md` into `folder`."""
    table = {"rows": [asdict(row) for row in rows], "settings": settings, "seconds": seconds}
    (folder / "table.json").write_text(json.dumps(table, indent=1))
    (folder / "table.md").write_text(markdown_table(rows))
