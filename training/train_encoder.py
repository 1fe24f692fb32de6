"""Pretrains an encoder on classification: `python -m ssm_vlm.training.train_encoder recipe.yaml [--key value ...]`.

The run directory then holds the classifier (`AutoModelForImageClassification`), and in `backbone/` the encoder itself
with its image processor, ready to be a `vision_encoder` or a folder of `vision_weights_dir`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from transformers import EvalPrediction, set_seed

from ..configuration.configuration_backbone_classifier import BackboneClassifierConfig
from ..modeling.encoder_loading import load_encoder
from ..modeling.encoder_preprocessing import image_processor_arguments
from ..modeling.image_processing_llava_style import LlavaStyleImageProcessor
from ..modeling.model_card import leave_card
from ..modeling.modeling_backbone_classifier import BackboneForImageClassification
from .image_folder import ImageFolder, collate_images
from .recipe import REQUIRED, RunArguments, RunDirectory, fingerprint, parse_recipe, require, resolved, run_script
from .trainer import ControlledTrainer, train_and_save


@dataclass
class EncoderArguments:
    """What is trained on what."""

    vision_encoder: str = field(default=REQUIRED, metadata={"help": "Name in the table of encoders."})
    pooling: Literal["mean", "max"] = field(
        default="mean", metadata={"help": "How the head pools positions: mean or max."}
    )
    attributes: bool = field(
        default=False, metadata={"help": "Folder names are attributes joined by '_', each a class of its own group."}
    )
    train_folder: str = field(default=REQUIRED, metadata={"help": "Folder with one folder of pictures per class."})
    val_folder: str = field(default=REQUIRED, metadata={"help": "The same for the accuracy at the end."})


def train_encoder(encoder: EncoderArguments, args: RunArguments) -> RunDirectory:
    """Trains, unless the run is already finished.

    Returns:
        The run's directory; its summary holds `accuracy` on `val_folder`, the number of its pictures, and the accuracy
        of always naming the most frequent class.
    """
    require(encoder, "vision_encoder", "train_folder", "val_folder")
    folders = {key: partial(fingerprint, getattr(encoder, key)) for key in ("train_folder", "val_folder")}
    run = RunDirectory.of(resolved(encoder, args), folders, args)
    if run.is_finished:
        return run
    set_seed(args.seed)
    backbone = load_encoder(encoder.vision_encoder, pretrained=False)
    image_processor = LlavaStyleImageProcessor(**image_processor_arguments(encoder.vision_encoder))
    train_set = ImageFolder(encoder.train_folder, image_processor, attributes=encoder.attributes)
    val_set = ImageFolder(encoder.val_folder, image_processor, attributes=encoder.attributes, groups=train_set.groups)
    groups = [len(group) for group in train_set.groups]
    config = BackboneClassifierConfig(
        backbone_config=backbone.config,
        pooling=encoder.pooling,
        id2label=dict(enumerate(train_set.label_names)),
        label2id={name: index for index, name in enumerate(train_set.label_names)},
        label_groups=groups,
    )
    model = BackboneForImageClassification(config, backbone)
    trainer = ControlledTrainer(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=val_set,
        data_collator=collate_images,
        compute_metrics=partial(_all_right, groups),
    )

    def save(folder: Path) -> None:
        image_processor.save_pretrained(folder)
        BackboneForImageClassification.from_pretrained(folder).backbone.save_pretrained(folder / "backbone")
        image_processor.save_pretrained(folder / "backbone")

    def summary() -> dict[str, float]:
        most_frequent = Counter(tuple(labels) for _, labels in val_set.samples).most_common(1)[0][1]
        return {
            "accuracy": trainer.evaluate()["eval_accuracy"],
            "accuracy_items": len(val_set),
            "accuracy_floor": most_frequent / len(val_set),
        }

    train_and_save(trainer, run, save, summary)
    if trainer.is_world_process_zero():
        leave_card(run.path)
    return run


def _all_right(groups: list[int], prediction: EvalPrediction) -> dict[str, float]:
    """Share of pictures with the right class in every group."""
    logits = np.split(prediction.predictions, np.cumsum(groups)[:-1], axis=1)
    chosen = np.stack([group.argmax(1) for group in logits], axis=1)  # [B, groups]
    return {"accuracy": float((chosen == prediction.label_ids).all(1).mean())}


def main(argv: Sequence[str] | None = None) -> RunDirectory:
    return train_encoder(*parse_recipe(argv, EncoderArguments, RunArguments))


if __name__ == "__main__":
    run_script(main)
