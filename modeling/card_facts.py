"""What a card tells of a model in tables and sentences: how it is built, trained and judged, and where it fails."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Resampling

from ..configuration.taps import tap_norm
from .card_parts import (
    UNKNOWN,
    Part,
    conversations,
    encoder_data,
    encoder_part,
    hub_data_link,
    language_model_part,
)
from .saved_folder import SavedFolder
from .saved_scores import TASKS, Evaluation
from .token_grid import grid_size

_FLOORS = {
    "constant_answer": "best constant answer",
    "constant_answer_per_kind": "best constant answer per kind of question",
    "mean_box": "mean box",
    "blank_image": "same model, blank pictures",
}
_FRAMES = {
    "centered_square": "shares of the square that a picture fills when it is padded on both sides alike",
    "canvas": "shares of the canvas that the encoder sees",
    "raw": "shares of the picture as it is",
}
_TRAINING_KEYS = {  # key of a recipe: what the card calls it
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch per device",
    "gradient_accumulation_steps": "gradient accumulation",
    "learning_rate": "peak learning rate",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warm-up",
    "weight_decay": "weight decay",
    "adam_beta2": "Adam's beta 2",
    "max_grad_norm": "largest gradient norm",
    "max_text_length": "longest text in tokens",
    "seed": "seed",
}
_FROZEN_KEYS = {"encoder": "freeze_vision", "connector": "freeze_connector", "language model": "freeze_language_model"}


Facts = list[tuple[str, str]]
"""Rows of a table: what, and which."""


def vlm_facts(saved: SavedFolder) -> Facts:
    """How a LLaVA-style model is built."""
    config, sizes = saved.config, saved.parameters
    norms = {"layernorm": "LayerNorm without parameters", "none": "none: the features as they are"}
    encoder, language_model = encoder_part(saved).what, language_model_part(saved).what
    grid = config.connector_grid
    connector = f"`{config.connector}`" + (f", to at most {grid[0]}x{grid[1]} tokens" if grid else "")
    own_norm = _tap_norm(saved.vision_config)
    return [
        ("task", "answers text about pictures with text; says where things are with boxes, if it was taught to"),
        ("encoder", _sized(encoder, config.vision_config.model_type, sizes["vision_tower"])),
        ("frozen in training", "yes" if config.freeze_vision else "no"),
        ("tap", f"`{saved.tap}`"),
        *([("norm inside the encoder", own_norm)] if own_norm != "none" else []),
        ("tap norm", norms[config.tap_norm]),
        ("token positions", "none" if config.token_positions == "none" else f"`{config.token_positions}`"),
        ("connector", _sized(connector, "", sizes["connector"])),
        ("language model", _sized(language_model, config.text_config.model_type, sizes["language_model"])),
        *_picture_facts(saved),
        ("box frame", f"`{config.box_frame}`: corners [x1, y1, x2, y2] as {_FRAMES[config.box_frame]}"),
    ]


def encoder_facts(saved: SavedFolder) -> Facts:
    """How an encoder or a classifier is built."""
    facts = [
        ("task", "image classification" if saved.is_classifier else "feature maps of pictures"),
        (
            "encoder",
            _sized(encoder_part(saved).what, saved.vision_config.model_type, sum(saved.parameters.values())),
        ),
    ]
    if saved.is_tapped:
        facts.append(("tap", f"`{saved.tap}`; nothing after it is saved"))
        facts.append(("tap norm", _tap_norm(saved.vision_config)))
    elif saved.tap:
        facts.append(("tap", f"none here: this is the whole model; as an encoder it is tapped at `{saved.tap}`"))
    facts += _picture_facts(saved)
    entry = saved.named_encoder
    if entry is not None:
        canvas = f"{entry.preprocessing.height}x{entry.preprocessing.width}"
        cost = f"{entry.parameters / 1e6:.2f} M parameters, {entry.flops / 1e9:.2f} GFLOPs at {canvas}"
        facts.append(("up to the tap", f"{cost} (a multiply and an add are two)"))
        if entry.imagenet_top1 is not None and saved.encoder_weights == "published":
            top1 = f"{entry.imagenet_top1} %, of the whole model: its authors' figure, not measured here"
            facts.append(("published ImageNet top-1", top1))
    return facts


def _tap_norm(backbone: Any) -> str:
    """What norms the tap inside the Backbone."""
    if getattr(backbone, "apply_final_norm", False):
        return "the model's own final norm"
    words = {"parameter-free": "LayerNorm without parameters", "trained": "LayerNorm with trained weights"}
    return words.get(tap_norm(backbone), "none")


def _picture_facts(saved: SavedFolder) -> Facts:
    """How pictures are prepared, as far as an image processor is saved."""
    settings, size = saved.image_processor, _canvas_size(saved)
    if size is None:
        return []
    facts = []
    height, width = size
    geometry = f"`{settings['geometry']}`, canvas" if "geometry" in settings else "canvas"
    resample = f", {Resampling(settings['resample']).name.lower()}" if "resample" in settings else ""
    facts.append(("geometry", f"{geometry} {height}x{width} (height x width){resample}"))
    if settings.get("image_mean"):
        mean, std = (", ".join(f"{value:g}" for value in settings[key]) for key in ("image_mean", "image_std"))
        guess = saved.encoder_origin.get("pixels_assumed_from")
        assumed = f" (assumed, those of `{guess}`: the published file does not show them)" if guess else ""
        facts.append(("pixels", f"mean {mean}; std {std}{assumed}"))
    if settings.get("downsampling"):
        rows, columns = grid_size(height, width, settings["downsampling"])
        facts.append(("image tokens", f"{rows}x{columns} = {rows * columns} for a full canvas"))
    return facts


def _sized(what: str, model_type: str, parameters: int) -> str:
    """A part with its `model_type`, where it is not said yet, and its number of stored parameters, where known."""
    words = [what]
    if model_type and f"`{model_type}`" not in what:
        words.append(f"`{model_type}`")
    if parameters:
        words.append(f"{parameters / 1e6:.3g} M parameters")
    return ", ".join(words)


def training_facts(saved: SavedFolder) -> Facts:
    """Data and recipe, and the published file where the weights were converted from one."""
    recipe, run = saved.recipe, saved.run
    facts = []
    if saved.origin.get("source"):
        checksum = saved.origin.get("sha256")
        source = Path(saved.origin["source"])
        facts.append(
            (
                "converted from",
                f"`{source.name if source.is_absolute() else source}`" + (f", sha256 `{checksum}`" if checksum else ""),
            )
        )
    before = [record["title"] for record in encoder_data(saved)]
    if before:
        facts.append(("data of the encoder", ", ".join(before)))
    record = conversations(saved)
    if record or "data_path" in recipe:
        title = hub_data_link(record) or f"`{Path(recipe['data_path']).name}`"
        count = f", {run['conversations']} conversations" if "conversations" in run else ""
        facts.append(("data", title + count))
    elif "train_folder" in recipe:
        facts.append(("data", f"pictures in `{'/'.join(Path(recipe['train_folder']).parts[-2:])}`"))
    if saved.encoder_weights != "published":
        facts.append(("encoder's weights", saved.encoder_weights))
    trained = [name for name, key in _FROZEN_KEYS.items() if key in recipe and not recipe[key]]
    if trained:
        facts.append(("trained", ", ".join(trained)))
    if "batch" in run:
        facts.append(("batch", f"{run['batch']}"))
    for key, name in _TRAINING_KEYS.items():
        if key in recipe and not (key == "per_device_train_batch_size" and "batch" in run):
            facts.append((name, f"{recipe[key]}"))
    if "steps" in run and "max_steps" not in recipe:
        facts.append(("steps", f"{run['steps']}"))
    if "seconds" in run:
        facts.append(("time", f"{run['seconds'] / 60:.1f} minutes"))
    if run.get("versions"):
        facts.append(("software", ", ".join(f"{name} {version}" for name, version in run["versions"].items())))
    return facts


def evaluation_row(evaluation: Evaluation) -> dict[str, str]:
    """One row of the table of scores, in per cent."""
    floors = sorted(evaluation.floors.items(), key=lambda pair: -pair[1])
    interval, frame = evaluation.interval, ""
    if evaluation.box_frame:
        frame = f", frame `{evaluation.box_frame}`"
    return {
        "task": TASKS[evaluation.task][1],
        "data": evaluation.data or UNKNOWN,
        "metric": f"{evaluation.metric}{frame}",
        "score": f"{100 * evaluation.score:.1f}",
        "interval": UNKNOWN if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}",
        "items": UNKNOWN if evaluation.items is None else f"{evaluation.items}",
        "floors": "; ".join(f"{100 * floor:.1f} ({_FLOORS.get(name, name)})" for name, floor in floors) or UNKNOWN,
        "floor_source": evaluation.floor_source or "",
    }


def kind_rows(evaluation: Evaluation) -> list[dict[str, str]]:
    """One row for each kind of question, where there are several; kinds of objects may be hundreds."""
    if evaluation.task == "grounding" or len(evaluation.kinds) < 2:
        return []
    return [
        {"task": TASKS[evaluation.task][1], "kind": kind, "items": f"{items}", "score": f"{100 * score:.1f}"}
        for kind, (items, score) in evaluation.kinds.items()
    ]


def limits(saved: SavedFolder, parts: Sequence[Part]) -> list[str]:
    """What the model is not good for, one sentence each; only what follows from the folder's files."""
    found = []
    entry = saved.named_encoder
    if saved.is_toy:
        found.append(
            "Trained on DigitScenes: handwritten digits on plain canvases. It proves that the plumbing works, and says "
            "nothing about photographs."
        )
    unseen = saved.encoder_weights == "published" and not saved.encoder_origin
    if unseen and entry is not None and entry.weights is not None and not entry.loaded_from_real_file:
        found.append(
            f"Of this version of ssm-vlm nobody is known to have loaded the published file of `{entry.name}`: its "
            "conversion is tested on random weights of the reference implementation."
        )
    if saved.recipe.get("vision_pretrained") is False:
        found.append("The encoder started from random weights.")
    if not saved.evaluations:
        found.append("It has not been evaluated, or its scores were not saved beside it.")
    for evaluation in saved.evaluations:
        beaten = [name for name, floor in evaluation.floors.items() if _reaches(evaluation, floor)]
        if beaten:
            floors = " and ".join(f"{_FLOORS.get(name, name)} ({100 * evaluation.floors[name]:.1f})" for name in beaten)
            score = f"{TASKS[evaluation.task][1]}: the score of {100 * evaluation.score:.1f}"
            found.append(f"{score} is not clearly above {floors}: do not read it as skill.")
    if saved.is_vlm:
        if any(evaluation.task == "grounding" for evaluation in saved.evaluations):
            found.append("Boxes are right only in the frame named above; map them back with the processor's geometry.")
        found.append(
            f"Pictures are brought to {canvas[0]}x{canvas[1]} pixels: what is only a few pixels wide there is not seen."
            if (canvas := _canvas_size(saved))
            else "The folder does not say how pictures are prepared."
        )
        found.append("Answers can be wrong, and there is no filter on what it says.")
    unknown = [part.name for part in parts if part.licence is None and not _trained_anew(saved, part)]
    if unknown:
        found.append(f"The licence of the {' and the '.join(unknown)} is not known here: look before you pass it on.")
    return found


def _trained_anew(saved: SavedFolder, part: Part) -> bool:
    """Whether the licence of a part is that of whoever publishes the model."""
    return part.name == "encoder" and saved.encoder_weights in ("trained anew", "random at the start")


def _reaches(evaluation: Evaluation, floor: float) -> bool:
    """Whether the floor lies inside or above the score's interval."""
    low = evaluation.score if evaluation.interval is None else evaluation.interval[0]
    return floor >= low


def _canvas_size(saved: SavedFolder) -> tuple[int, int] | None:
    """Height and width that pictures are brought to; None where no image processor is saved, or one of another kind."""
    size = saved.image_processor.get("size")
    if not isinstance(size, dict) or not all(isinstance(size.get(side), int) for side in ("height", "width")):
        return None  # Transformers' own may say a number, or the shortest edge
    return size["height"], size["width"]


__all__ = ["encoder_facts", "evaluation_row", "kind_rows", "limits", "training_facts", "vlm_facts"]
