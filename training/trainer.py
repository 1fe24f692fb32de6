"""The Hugging Face Trainer with what every run of this library needs beyond it."""

import errno
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState

from .recipe import RunArguments, RunDirectory, ask_main_process
from .samplers import ModalityLengthGroupedSampler, SamplerEpochCallback

# Norm scales and biases are 1-D; these are not always, and still are no weights to decay.
_NEVER_DECAYED = re.compile(
    r"(^|\.)(a_log|d|dt_bias|bias|relative_position_bias_table|layer_scale\w*|\w+_tokens?|class_embedding"
    r"|(position_embeddings?|embed_positions|wpe|pos_embed)(\.weight)?)$"
)


class NotFiniteLossError(FloatingPointError):
    """The loss became NaN or infinite."""


class Stopwatch(TrainerCallback, ExportableState):
    """Seconds of training, over interruptions: those up to a checkpoint are saved with it."""

    def __init__(self) -> None:
        self.before = 0.0
        self.started: float | None = None

    @property
    def seconds(self) -> float:
        return self.before + (0.0 if self.started is None else time.perf_counter() - self.started)

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"before": self.seconds}}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__)  # type: ignore[union-attr]  # a dict in a run
        self.before = saved["attributes"]["before"] if saved else 0.0
        self.started = time.perf_counter()


class ControlledTrainer(Trainer):
    """Trainer with modality-and-length grouped batches, explicit weight-decay groups and a guard against NaN.

    Args:
        grouping: ([rows] lengths, [rows] has an image) of the training set; None for the Trainer's own random order.
        Other arguments as in `Trainer`.
    """

    args: RunArguments
    model: nn.Module

    def __init__(self, *args: Any, grouping: tuple[Any, Any] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError("Nothing is left to train: every part of the model is frozen; unfreeze one.")
        self.stopwatch = Stopwatch()
        self.add_callback(self.stopwatch)
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

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Stops before the first step of a run that is resumed after its last one, where the Trainer would add one."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        """Waits for all processes, so that the main one writes `trainer_state.json` after everything else."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()


def train_and_save(
    trainer: ControlledTrainer,
    run: RunDirectory,
    save: Callable[[Path], object],
    summary: Callable[[], dict[str, Any]] = dict,
) -> None:
    """Trains from the last complete checkpoint on, saves the model whole, and marks the run as finished.

    Args:
        save: writes what belongs beside the model, such as its processor, into the folder that already holds the model;
            called on the main process.
        summary: gives what `finished.json` holds beside the training metrics; called after training, on all processes.

    Raises:
        ValueError: another command trains this run.
        OSError: the disk is full; the last complete checkpoint stays.
    """
    main = trainer.is_world_process_zero()
    with run.begin() if main else nullcontext(), _full_disk_in_one_sentence(run.path):
        trainer.train(resume_from_checkpoint=ask_main_process(run.last_checkpoint))
        facts = {
            "steps": trainer.state.global_step,
            "log": [entry for entry in trainer.state.log_history if "loss" in entry],
            "seconds": trainer.stopwatch.seconds,
            "batch": trainer.args.train_batch_size * trainer.args.world_size * trainer.args.gradient_accumulation_steps,
            "versions": {name: version(name) for name in ("torch", "transformers")},
            **summary(),
        }
        partial = run.path / "model.partial"
        if main:
            shutil.rmtree(partial, ignore_errors=True)
        trainer.save_model(str(partial))  # on all processes: each may hold a part of the model
        if main:
            (partial / TRAINING_ARGS_NAME).unlink()  # a pickle; the recipe says it all
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
    trainer.accelerator.wait_for_everyone()


@contextmanager
def _full_disk_in_one_sentence(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_full_disk(error):
            raise
        raise OSError(
            errno.ENOSPC,
            f"The disk that holds {folder} is full: make room and run the same command again; it goes on from the last "
            "complete checkpoint",
        ) from error


def _is_full_disk(error: BaseException) -> bool:
    """Whether a write failed for want of room, which safetensors and torch.save say in words only."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or bool(
        re.search(r"No space left|quota exceeded|PytorchStreamWriter|unexpected pos|iostream error", str(error))
    )
