"""`ssm-vlm card`: writes the model card of a saved model."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .modeling.model_card import CARD_FILE, render_card, write_card


def main(argv: Sequence[str] | None = None) -> int:
    """Renders the card and says what is in it; returns the exit status.

    Raises:
        ValueError: a card of somebody's own is there, or the folder holds something else than a model.
        FileNotFoundError: there is no saved model.
    """
    parser = argparse.ArgumentParser(prog="ssm-vlm card", description="Write the model card of a saved model.")
    parser.add_argument("folder", help="a folder with a saved model: a training run, a converted checkpoint, ...")
    parser.add_argument("--repo", help="the repository that the model goes to, for the card's lines of code")
    parser.add_argument("--force", action="store_true", help="write over a card that somebody wrote or changed")
    options = parser.parse_args(argv)
    file = Path(options.folder) / CARD_FILE
    if not write_card(options.folder, repo_id=options.repo, force=options.force):
        raise ValueError(f"{file} was written or changed by hand and is left as it is; --force writes over it.")
    data: Any = render_card(options.folder, repo_id=options.repo).data
    licence = data.license if data.license != "other" else f"other ({data.license_name})"
    print(f"{file}: {data.pipeline_tag}, licence {licence or 'not known'}, {len(data.eval_results or [])} scores")
    for result in data.eval_results or []:
        print(f"  {result.task_name}, {result.dataset_name}: {result.metric_value} {result.metric_name}")
    return 0


__all__ = ["main"]
