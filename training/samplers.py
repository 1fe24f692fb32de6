"""Order of training samples: batches of one modality and of like lengths."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler
from transformers import TrainerCallback


class ModalityLengthGroupedSampler(Sampler[int]):
    """Yields indices so that each run of `batch_size` of them is one batch of like samples.

    A batch is all images or all text, so that no text is padded with image tokens, and its samples have like lengths:
    each modality is shuffled, cut into groups of `batches_per_group` batches, and each group is sorted by length before
    it is cut into batches. The batches are then shuffled, but the one with the longest sample of all is moved to the
    front, where running out of memory shows at once. Order depends on `seed`, `epoch` and the arguments only.

    The samples that are left when a modality is cut into whole batches come last. With `fill_batches=False` every index
    comes exactly once; images left over and then text left over are cut together, so at most one batch, the last or
    last but one, holds both. With `fill_batches=True` (what the paper did, paper_protocol section 4.4) each modality's
    last batch is filled by repeating samples of that modality, so that every batch is whole and of one modality.

    Args:
        lengths: [rows] length of each sample, for example in tokens with those of its images.
        is_multimodal: [rows] whether the sample has an image.
        batch_size: samples in one optimiser step: per device, times devices, times accumulation steps.
        seed: first part of the seed, not negative.
        epoch: second part of the seed; `set_epoch` changes it.
        batches_per_group: more gives less padding, fewer gives a more random mix.
        fill_batches: see above.
    """

    def __init__(
        self,
        lengths: Sequence[float] | np.ndarray,
        is_multimodal: Sequence[bool] | np.ndarray,
        batch_size: int,
        seed: int = 0,
        epoch: int = 0,
        *,
        batches_per_group: int = 50,
        fill_batches: bool = False,
    ):
        self.lengths = np.asarray(lengths, dtype=np.float64)
        self.is_multimodal = np.asarray(is_multimodal, dtype=bool)
        if self.lengths.ndim != 1 or self.lengths.shape != self.is_multimodal.shape:
            raise ValueError(
                f"lengths has shape {self.lengths.shape} and is_multimodal {self.is_multimodal.shape}; "
                "both must be one number for each sample."
            )
        if not len(self.lengths):
            raise ValueError("lengths is empty; there must be at least one sample to draw.")
        if not np.isfinite(self.lengths).all():
            raise ValueError(f"lengths[{int(np.flatnonzero(~np.isfinite(self.lengths))[0])}] is not a finite number.")
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("batches_per_group", batches_per_group, 1),
            ("seed", seed, 0),
            ("epoch", epoch, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}, but must be at least {least}.")
        self.batch_size, self.batches_per_group, self.fill_batches = batch_size, batches_per_group, fill_batches
        self.seed, self.epoch = seed, epoch

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        if not self.fill_batches:
            return len(self.lengths)
        images = int(self.is_multimodal.sum())
        return sum(-(-rows // self.batch_size) * self.batch_size for rows in (images, len(self.lengths) - images))

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self.seed, self.epoch])
        whole, left_over = [], []
        for modality in (True, False):
            rows = self._shuffled(random, np.flatnonzero(self.is_multimodal == modality))
            cut = len(rows) // self.batch_size * self.batch_size
            group = self.batch_size * self.batches_per_group
            for start in range(0, cut, group):
                sorted_group = self._longest_first(rows[start : min(start + group, cut)])
                whole.append(sorted_group.reshape(-1, self.batch_size))
            rest = rows[cut:]
            if self.fill_batches and len(rest):
                rest = np.concatenate([rest, np.resize(rows, self.batch_size - len(rest))])
            left_over.append(self._longest_first(rest))
        batches = np.concatenate([np.empty((0, self.batch_size), dtype=np.int64), *whole])  # [batches, batch_size]
        if len(batches):
            batches = random.permutation(batches)
            longest = self.lengths[batches[:, 0]].argmax()
            batches[[0, longest]] = batches[[longest, 0]]
        yield from np.concatenate([batches.reshape(-1), *left_over]).tolist()

    def _shuffled(self, random: np.random.Generator, rows: np.ndarray) -> np.ndarray:
        """The rows in random order, except that the longest is in front, and so never among those left over."""
        rows = random.permutation(rows)
        if len(rows):
            longest = self.lengths[rows].argmax()
            rows[[0, longest]] = rows[[longest, 0]]
        return rows

    def _longest_first(self, rows: np.ndarray) -> np.ndarray:
        return rows[np.argsort(-self.lengths[rows], kind="stable")]


class SamplerEpochCallback(TrainerCallback):
    """Tells a sampler the epoch at the start of each one.

    The Trainer does so too, through Accelerate's data loader, except in one case (Transformers 5.23, Accelerate 1.15):
    when several processes resume in the middle of an epoch, the sampler is wrapped twice and is not reached, so that
    the rest of the epoch would be drawn in the order of epoch 0.
    """

    def __init__(self, sampler: ModalityLengthGroupedSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))
