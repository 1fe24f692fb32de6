"""The Hugging Face Trainer with what every run of this library needs beyond it."""

import errno
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer

from .recipe import RunArguments, RunDirectory
from .samplers import ModalityLengthGroupedSampler, SamplerEpochCallback

# Norm scales and biases are 1-D; these are not, and still are no weights to decay.
_NEVER_DECAYED = re.compile(
    r"(^|\.)(a_log|d|dt_bias|position_embeddings?|pos_embed|cls_token|bias|relative_position\w*)$", re.I
)


class NotFiniteLossError(FloatingPointError):
    """The loss became NaN or infinite."""


class ControlledTrainer(Trainer):
    """Trainer with modality-and-length grouped batches, explicit weight-decay groups and a guard against NaN.

    Args:
        grouping: ([rows] lengths, [rows] has an image) of the training set; None for the Trainer's own random order.
        Other arguments as in `Trainer`.
    """

    args: RunArguments

    def __init__(self, *args: Any, grouping: tuple[Any, Any] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._sample_ids: list[str] = []
        self._sampler = None
        if grouping is not None:
            batch = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
            lengths, is_multimodal = grouping
            self._sampler = ModalityLengthGroupedSampler(
                lengths, is_multimodal, batch, seed=self.args.seed, fill_batches=self.args.fill_batches
            )
            self.add_callback(SamplerEpochCallback(self._sampler))

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        return self._sampler or super()._get_train_sampler(train_dataset)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices and kernels decay; biases, norms, position embeddings and the scan's own dynamics do not."""
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.ndim >= 2 and not _NEVER_DECAYED.search(name)
        ]

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = dict(inputs)
        self._sample_ids = inputs.pop("sample_ids", [])
        return super()._prepare_inputs(inputs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            step = self.state.global_step + 1
            dump = Path(self.args.output_dir) / f"not_finite_step_{step}_rank_{self.args.process_index}.json"
            dump.write_text(
                json.dumps({"step": step, "loss": str(loss.item()), "sample_ids": self._sample_ids}, indent=1)
            )
            raise NotFiniteLossError(
                f"The loss is {loss.item()} at step {step}; its sample ids are in {dump}. Lower the learning rate, or "
                "look at those samples; the last checkpoint is untouched."
            )
        return loss


def train_and_save(
    trainer: Trainer, run: RunDirectory, save: Callable[[Path], None], summary: Callable[[], dict[str, Any]] = dict
) -> dict[str, Any]:
    """Trains from the last complete checkpoint on, saves the model whole, and marks the run as finished.

    Args:
        save: writes the finished model into the folder it is given; called on the main process.
        summary: gives what `finished.json` holds beside the training metrics; called after training, on all processes.

    Raises:
        OSError: the disk is full; the last complete checkpoint stays.
    """
    started = time.perf_counter()
    try:
        result = trainer.train(resume_from_checkpoint=run.last_checkpoint())
        seconds = time.perf_counter() - started
        facts = {
            "steps": trainer.state.global_step,
            "train_loss": result.training_loss,
            "log": [entry for entry in trainer.state.log_history if "loss" in entry],
            "seconds": seconds,
            **summary(),
        }
        if trainer.is_world_process_zero():
            partial = run.path / "model.partial"
            shutil.rmtree(partial, ignore_errors=True)
            save(partial)
            for item in partial.iterdir():
                target = run.path / item.name
                if target.is_dir():
                    shutil.rmtree(target)
                item.replace(target)
            partial.rmdir()
            run.finish(facts)
            for checkpoint in run.path.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(
                errno.ENOSPC,
                f"The disk that holds {run.path} is full: make room and run the same command again; it goes on from "
                "the last complete checkpoint",
            ) from error
        raise
    return facts
