"""`ssm-vlm push`: a saved model becomes a repository on the Hub."""

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HTTPError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from .modeling.model_card import CARD_FILE, is_untouched, marked, render_card
from .modeling.saved_folder import ORIGIN_FILE, SCORES_PATTERN, SavedFolder

logger = logging.get_logger(__name__)

_LEFT_OUT_FOLDERS = re.compile(r"checkpoint-\d+|global_step\d+|.*\.partial|\..*|__pycache__|runs|logs")
"""What training leaves beside a model: states to resume from, logs, caches, what an interrupted write began."""

_LEFT_OUT_FILES = re.compile(
    r"(optimizer|scheduler|scaler)\.(pt|bin)|rng_state.*\.pth|training_args\.bin|trainer_state\.json|lock|\..*"
    r"|.*\.(partial|jsonl|log|tmp)|not_finite_step_.*\.json|events\.out\.tfevents.*"
)
"""The same, and files of answers, which hold the questions of data sets."""

_PICKLES = {".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth", ".tar", ".zip"}
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|pytorch_model.*\.bin(\.index\.json)?")

_NOTES = ("recipe.yaml", "finished.json", ORIGIN_FILE, SCORES_PATTERN)
"""What runs, conversions and evaluations write of themselves; paths in it are of use on their machine only."""

_LOCAL_PATH = re.compile(r"(file:/+|~|[A-Za-z]:)?[\\/]")


def files_to_push(folder: str | Path) -> dict[str, Path]:
    """Path in the repository -> file, of everything that belongs to the model; the card is not among them.

    Raises:
        FileNotFoundError: the folder is not complete; what is missing is named.
        ValueError: it holds pickles, which can run code when they are opened, or files that are not what they should
            be.
    """
    folder = Path(folder)
    files = {path.relative_to(folder).as_posix(): path for path in _walk(folder) if path != folder / CARD_FILE}
    pickles = [name for name, path in files.items() if path.suffix.lower() in _PICKLES]
    if pickles:
        raise ValueError(
            f"{folder} holds {', '.join(pickles)}: a pickle can run code on the machine that opens it, so none is "
            "pushed; remove it, or turn weights into safetensors with `ssm-vlm convert`."
        )
    saved = SavedFolder(folder)
    missing = _missing(saved, files)
    if missing:
        raise FileNotFoundError(f"{folder} is not a complete model: it lacks {', '.join(missing)}.")
    saved.check()
    if not saved.parameters:
        raise ValueError(f"{folder} holds no weights: its safetensors are empty.")
    return files


def _walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_dir():
            if not _LEFT_OUT_FOLDERS.fullmatch(path.name):
                yield from _walk(path)
        elif not _LEFT_OUT_FILES.fullmatch(path.name):
            yield path


def _missing(saved: SavedFolder, files: dict[str, Path]) -> list[str]:
    """Names of files that a complete model has and this folder lacks."""
    if "config.json" not in files:
        return ["config.json"]
    missing = [file.name for file in saved.weight_files if not file.is_file()]
    if not saved.weight_files:
        missing.append("model.safetensors")
    if saved.is_vlm:
        wanted: list[tuple[str, ...]] = [("processor_config.json", "preprocessor_config.json")]
        wanted += [("tokenizer.json", "tokenizer.model"), ("tokenizer_config.json",)]
        missing += [" or ".join(names) for names in wanted if not any(name in files for name in names)]
    return missing + [name for name in saved.code_files if name not in files]


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    branch: str | None = None,
    message: str | None = None,
) -> str:
    """Uploads a saved model, with a card; makes the repository where there is none.

    The folder itself stays as it is. Of absolute paths in its recipe and notes, which tell about the machine, only the
    last part goes up (see `without_local_paths`). Its README.md goes up if somebody wrote it; else the card is rendered
    anew, for this repository, unless there is one there that somebody wrote or changed. Weights of an earlier push that
    are not among the new ones are deleted, so that nobody loads them.

    Args:
        folder: written by `save_pretrained`, a training run or `ssm-vlm convert`.
        repo_id: `owner/name`, or a name of your own.
        private: makes a new repository private, or public; None leaves it to the owner's settings.
        branch: where to; made where there is none. By default the main one.
        message: of the commit.

    Returns:
        Where the model is to be seen.

    Raises:
        FileNotFoundError, ValueError: as in `files_to_push`; nothing has been uploaded then.
        OSError: the Hub cannot be reached, or does not let you in.
    """
    validate_repo_id(repo_id)
    folder, api = Path(folder), HfApi(library_name="ssm-vlm")
    files = files_to_push(folder)
    shortened = {name: text for name, path in files.items() if (text := without_local_paths(path)) is not None}
    with _hub_errors_in_one_sentence(repo_id):
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        if branch is not None:
            api.create_branch(repo.repo_id, branch=branch, exist_ok=True)
        there = set(api.list_repo_files(repo.repo_id, revision=branch))
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(
                path_in_repo=name, path_or_fileobj=shortened[name].encode() if name in shortened else path
            )
            for name, path in files.items()
        ]
        operations += [
            CommitOperationDelete(name) for name in sorted(there) if _WEIGHTS.fullmatch(name) and name not in files
        ]
        card = _card_to_push(folder, repo.repo_id, _card_there(api, repo.repo_id, branch, there))
        if card is not None:
            operations.append(CommitOperationAdd(path_in_repo=CARD_FILE, path_or_fileobj=card.encode()))
        api.create_commit(
            repo.repo_id, operations, commit_message=message or "Upload model with ssm-vlm", revision=branch
        )
    if shortened:
        logger.warning(f"Of paths on this machine only the last part was pushed, in {', '.join(shortened)}.")
    return f"{repo.url}/tree/{branch}" if branch else repo.url


def without_local_paths(file: Path) -> str | None:
    """What to push instead of a file of notes that names absolute paths: the same with their last parts only.

    Returns:
        None where the file is pushed as it is: it is no file of notes, or it names no such path.

    Raises:
        ValueError: it is not what its suffix says.
    """
    if not any(file.match(pattern) for pattern in _NOTES):
        return None
    is_json = file.suffix == ".json"
    try:
        text = file.read_text(encoding="utf-8")
        notes = json.loads(text) if is_json else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"{file} is not {'JSON' if is_json else 'YAML'}: {problem}") from None
    short = _shortened(notes)
    if short == notes:
        return None
    return json.dumps(short, indent=2, ensure_ascii=False) + "\n" if is_json else yaml.safe_dump(short, sort_keys=False)


def _shortened(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shortened(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_shortened(each) for each in value]
    if isinstance(value, str) and _LOCAL_PATH.match(value):
        return re.split(r"[\\/]+", value.rstrip("\\/"))[-1] or value
    return value


def _card_there(api: HfApi, repo_id: str, branch: str | None, there: set[str]) -> str | None:
    if CARD_FILE not in there:
        return None
    try:
        return Path(api.hf_hub_download(repo_id, CARD_FILE, revision=branch)).read_text(encoding="utf-8")
    except EntryNotFoundError:
        return None


def _card_to_push(folder: Path, repo_id: str, there: str | None) -> str | None:
    """The card that belongs into the repository; None to leave the one that is there."""
    file = folder / CARD_FILE
    here = file.read_text(encoding="utf-8") if file.is_file() else None
    if here is not None and not is_untouched(here):
        return here
    return marked(render_card(folder, repo_id=repo_id)) if there is None or is_untouched(there) else None


@contextmanager
def _hub_errors_in_one_sentence(repo_id: str) -> Iterator[None]:
    """What the Hub's client says in several ways."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise OSError(
                f"The Hub does not let you push to {repo_id!r} (HTTP {status}): log in with `hf auth login`, or set "
                "HF_TOKEN to a token that may write there."
            ) from error
        raise OSError(f"The Hub refuses the push to {repo_id!r}: {str(error).strip().splitlines()[0]}") from error
    except (HTTPError, ConnectionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(f"The Hub cannot be reached, so nothing was pushed to {repo_id!r}: {reason}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Pushes, and prints where the model is; returns the exit status."""
    parser = argparse.ArgumentParser(prog="ssm-vlm push", description="Upload a saved model to the Hugging Face Hub.")
    parser.add_argument("folder", help="a folder with a saved model: a training run, a converted checkpoint, ...")
    parser.add_argument("repo", help="the repository: owner/name, made where there is none")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--branch", help="the branch to push to, made where there is none (default: main)")
    parser.add_argument("--message", help="message of the commit")
    options = parser.parse_args(argv)
    url = push_folder(
        options.folder, options.repo, private=options.private, branch=options.branch, message=options.message
    )
    print(url)
    return 0


__all__ = ["files_to_push", "main", "push_folder", "without_local_paths"]
