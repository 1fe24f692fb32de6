"""Model cards: what a saved folder knows about its model, in the words and the metadata of the Hub.

Everything that a card says is read from the folder's own files, from the table of encoders, or from
`model_cards/origins.yaml`. What none of them says is left out or called unknown.
"""

import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging

from .card_facts import encoder_facts, evaluation_row, kind_rows, limits, training_facts, vlm_facts
from .card_parts import (
    TEMPLATES,
    UNKNOWN,
    Part,
    conversations,
    encoder_data,
    encoder_part,
    language_model_part,
    licence_metadata,
    origins,
    part_row,
    release_parts,
)
from .saved_folder import SavedFolder
from .saved_scores import TASKS, Evaluation

logger = logging.get_logger(__name__)

CARD_FILE = "README.md"
_TRANSFORMERS_OWN = "This model card has been automatically generated."  # in the empty card that a push makes up
_WITH_CARD: set[type] = set()
_MARK = re.compile(r"\n<!-- ssm-vlm card ([0-9a-f]{64}) -->\n?\Z")


def render_card(folder: str | Path, *, repo_id: str | None = None) -> ModelCard:
    """The card of a saved model: a VLM, an encoder, or a classifier.

    Args:
        folder: written by `save_pretrained`, a training run or `ssm-vlm convert`.
        repo_id: where the model goes on the Hub; by default the card names the folder.

    Raises:
        FileNotFoundError: the folder holds no model, or its weights are not all there.
        ValueError: another kind of model, a file that is not what its name says, or a name that the Hub cannot have.
    """
    if repo_id is not None:
        validate_repo_id(repo_id)
    saved = SavedFolder(Path(folder))
    saved.check()
    parts = [encoder_part(saved)]
    if saved.is_vlm:
        parts += [language_model_part(saved), *release_parts(saved)]
    where = repo_id or Path(folder).absolute().name
    templates = [TEMPLATES / name for name in ("vlm.md.j2" if saved.is_vlm else "encoder.md.j2", "sections.md.j2")]
    return ModelCard.from_template(
        _metadata(saved, parts, where),
        template_str="".join(template.read_text(encoding="utf-8") for template in templates),
        where=where,
        saved=saved,
        facts=vlm_facts(saved) if saved.is_vlm else encoder_facts(saved),
        training=training_facts(saved),
        evaluations=[evaluation_row(evaluation) for evaluation in saved.evaluations],
        kinds=[row for evaluation in saved.evaluations for row in kind_rows(evaluation)],
        limits=limits(saved, parts),
        parts=[part_row(part) for part in parts],
        citations=[origins()["paper"], *(part.citation for part in parts if part.citation)],
    )


def write_card(folder: str | Path, *, repo_id: str | None = None, force: bool = False) -> bool:
    """Writes the card as the folder's README.md, unless one is there that somebody wrote or changed.

    Args:
        folder, repo_id: as in `render_card`.
        force: write over a card of somebody's own, too.

    Returns:
        Whether the card is there; False where somebody's own was left.
    """
    file = Path(folder) / CARD_FILE
    there = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None
    if there is not None and not force and not is_untouched(there):
        return False
    text = marked(render_card(folder, repo_id=repo_id))
    if text != there:
        file.write_text(text, encoding="utf-8")
    return True


def leave_card(folder: str | Path) -> None:
    """`write_card` for a model that has just been saved: what keeps the card from being written is only told."""
    try:
        write_card(folder)
    except (ValueError, FileNotFoundError) as error:
        logger.warning(f"No model card was written: {error}")


def save_with_card(model_class: type[PreTrainedModel]) -> None:
    """From now on `save_pretrained` of a model class writes a card beside the weights, and `push_to_hub` uploads it.

    Transformers would push an empty card instead. A card that somebody wrote is left, in the folder as on the Hub.
    """
    if _WITH_CARD & set(model_class.mro()):
        return
    _WITH_CARD.add(model_class)
    save, upload = model_class.save_pretrained, model_class._upload_modified_files

    @functools.wraps(save)
    def save_pretrained(self, save_directory, is_main_process=True, *args, **kwargs):
        save(self, save_directory, is_main_process, *args, **kwargs)
        if is_main_process and (Path(save_directory) / "config.json").is_file():  # adapters alone are saved without
            leave_card(save_directory)

    @functools.wraps(upload)
    def upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        file = Path(working_dir) / CARD_FILE
        there = ModelCard(file.read_text(encoding="utf-8")) if file.is_file() else None
        if there is None or _TRANSFORMERS_OWN in there.text or is_untouched(str(there)):
            card = render_card(working_dir, repo_id=repo_id)
            card.data.tags = list(dict.fromkeys([*card.data.tags, *(there and there.data.tags or ())]))
            file.write_text(marked(card), encoding="utf-8")
        return upload(self, working_dir, repo_id, *args, **kwargs)

    for method in (save_pretrained, upload_modified_files):
        setattr(model_class, method.__name__, method)


def refresh_card(saved_class: type[BaseImageProcessor | ProcessorMixin]) -> None:
    """From now on `save_pretrained` of a processor writes a card anew that lies beside it and nobody has changed.

    Processors are mostly saved after their model, whose card then does not know yet how pictures are prepared.
    """
    save = saved_class.save_pretrained

    @functools.wraps(save)
    def save_pretrained(self, save_directory, *args, **kwargs):
        saved = save(self, save_directory, *args, **kwargs)
        if (Path(save_directory) / CARD_FILE).is_file() and (Path(save_directory) / "config.json").is_file():
            leave_card(save_directory)
        return saved

    saved_class.save_pretrained = save_pretrained  # type: ignore[method-assign]


def marked(card: ModelCard) -> str:
    """The card's text with a last line by which `is_untouched` knows it again."""
    text = str(card).rstrip("\n")
    return f"{text}\n<!-- ssm-vlm card {_digest(text)} -->\n"


def is_untouched(text: str) -> bool:
    """Whether this is a card that `write_card` wrote and nobody has changed since."""
    mark = _MARK.search(text)
    return mark is not None and mark[1] == _digest(text[: mark.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _metadata(saved: SavedFolder, parts: Sequence[Part], where: str) -> ModelCardData:
    records = [conversations(saved), *encoder_data(saved)]
    results = [_eval_result(evaluation) for evaluation in saved.evaluations]
    base_models = [part.hub_id for part in parts if part.hub_id]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=_pipeline_tag(saved),
        language="en" if saved.is_toy and saved.is_vlm else None,
        tags=_tags(saved),
        base_model=base_models or None,
        datasets=[record["hub_id"] for record in records if "hub_id" in record] or None,
        metrics=["accuracy"] if results else None,
        model_name=where.rpartition("/")[2] if results else None,
        eval_results=results or None,
        **licence_metadata(parts),
    )


def _pipeline_tag(saved: SavedFolder) -> str:
    if saved.is_vlm:
        return "image-text-to-text"
    return "image-classification" if saved.is_classifier else "image-feature-extraction"


def _tags(saved: SavedFolder) -> list[str]:
    tags = ["ssm-vlm", "llava-style" if saved.is_vlm else "vision-encoder"]
    return [*tags, saved.vision_config.model_type.replace("_", "-")]


def _eval_result(evaluation: Evaluation) -> EvalResult:
    task_type, task_name = TASKS[evaluation.task]
    data = evaluation.data or UNKNOWN
    arguments: dict[str, Any] = {}
    if evaluation.interval is not None:
        arguments["interval_95"] = [round(100 * side, 2) for side in evaluation.interval]
        arguments["num_items"] = evaluation.items
    if evaluation.floors:
        arguments["floors"] = {name: round(100 * floor, 2) for name, floor in evaluation.floors.items()}
    for name in ("box_frame", "iou_threshold"):
        if getattr(evaluation, name) is not None:
            arguments[name] = getattr(evaluation, name)
    return EvalResult(
        task_type=task_type,
        task_name=task_name,
        dataset_type=re.sub(r"[^a-z0-9._]+", "-", data.lower()).strip("-"),
        dataset_name=data,
        metric_type="accuracy",
        metric_name=f"{evaluation.metric}, per cent" + _plus_minus(evaluation),
        metric_value=round(100 * evaluation.score, 2),
        metric_args=arguments or None,
    )


def _plus_minus(evaluation: Evaluation) -> str:
    if evaluation.interval is None:
        return ""
    low, high = evaluation.interval
    return f" (95 % interval {100 * low:.1f} to {100 * high:.1f}, {evaluation.items} items)"


__all__ = [
    "CARD_FILE",
    "is_untouched",
    "leave_card",
    "marked",
    "refresh_card",
    "render_card",
    "save_with_card",
    "write_card",
]
