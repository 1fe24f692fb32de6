"""ModalityLengthGroupedSampler: what every epoch must hold, and the same order when a run is resumed."""

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader
from transformers import Trainer, TrainerState, TrainingArguments

from ssm_vlm.training.samplers import ModalityLengthGroupedSampler, SamplerEpochCallback


def cut(order, size):
    return [order[start : start + size] for start in range(0, len(order), size)]


SAMPLES = st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=60)


@given(SAMPLES, st.integers(1, 9), st.integers(0, 3), st.integers(0, 3), st.integers(1, 4))
def test_every_index_once_in_batches_of_one_modality(samples, batch_size, seed, epoch, batches_per_group):
    lengths, is_multimodal = map(np.array, zip(*samples, strict=True))
    sampler = ModalityLengthGroupedSampler(
        lengths, is_multimodal, batch_size, seed, epoch, batches_per_group=batches_per_group
    )
    order = list(sampler)
    assert sorted(order) == list(range(len(samples))) and len(sampler) == len(samples)
    assert order == list(sampler)

    mixed = [len(set(is_multimodal[batch])) == 2 for batch in cut(order, batch_size)]
    assert sum(mixed) <= 1 and not any(mixed[:-2])
    images = int(is_multimodal.sum())
    whole = images // batch_size + (len(samples) - images) // batch_size
    assert not any(mixed[:whole])
    if whole:
        drawn = lengths[order[: whole * batch_size]]
        assert drawn[0] == drawn.max()
        for modality in (True, False):  # a modality with a whole batch never leaves its longest sample to the end
            of_modality = is_multimodal == modality
            if of_modality.sum() >= batch_size:
                assert drawn[of_modality[order[: whole * batch_size]]].max() == lengths[of_modality].max()


@given(SAMPLES, st.integers(1, 9), st.integers(0, 3))
def test_filled_batches_are_whole_and_of_one_modality(samples, batch_size, epoch):
    lengths, is_multimodal = map(np.array, zip(*samples, strict=True))
    sampler = ModalityLengthGroupedSampler(lengths, is_multimodal, batch_size, 0, epoch, fill_batches=True)
    order = list(sampler)
    assert set(order) == set(range(len(samples))) and len(order) == len(sampler) and len(order) % batch_size == 0
    assert all(len(set(is_multimodal[batch])) == 1 for batch in cut(order, batch_size))
    images = int(is_multimodal.sum())
    assert len(order) // batch_size == -(-images // batch_size) + -(-(len(samples) - images) // batch_size)


def mix(rows=4000, seed=0):
    random = np.random.default_rng(seed)
    return random.geometric(0.01, rows), random.random(rows) < 0.9


def test_order_depends_on_seed_and_epoch_only():
    lengths, is_multimodal = mix()
    first = list(ModalityLengthGroupedSampler(lengths, is_multimodal, 16, seed=7))
    torch.manual_seed(123)
    np.random.seed(123)
    sampler = ModalityLengthGroupedSampler(lengths.tolist(), is_multimodal.tolist(), 16, seed=7)
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first and second == list(ModalityLengthGroupedSampler(lengths, is_multimodal, 16, 7, 1))
    assert list(ModalityLengthGroupedSampler(lengths, is_multimodal, 16, seed=8)) != first
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_batches_have_like_lengths_and_are_shuffled():
    lengths, is_multimodal = mix()
    order = np.array(list(ModalityLengthGroupedSampler(lengths, is_multimodal, 16)))[: 4000 // 16 * 16]

    def padded_share(order):
        batches = lengths[order].reshape(-1, 16)
        return 1 - lengths[order].sum() / (16 * batches.max(1).sum())

    assert padded_share(order) < 0.12 < 0.5 < padded_share(np.arange(4000))
    longest = lengths[order].reshape(-1, 16).max(1)
    assert longest[0] == lengths.max()
    assert abs(np.corrcoef(np.arange(1, len(longest)), longest[1:])[0, 1]) < 0.2  # short and long all along the epoch
    text = ~is_multimodal[order].reshape(-1, 16)[:, 0]
    assert abs(np.flatnonzero(text).mean() / len(text) - 0.5) < 0.15


def test_samples_of_a_batch_change_from_epoch_to_epoch():
    sampler = ModalityLengthGroupedSampler(np.ones(64), np.ones(64, dtype=bool), 8)
    batches = [set(batch) for batch in cut(list(sampler), 8)]
    sampler.set_epoch(1)
    assert max(len(old & set(new)) for old in batches for new in cut(list(sampler), 8)) < 8


def test_number_of_steps_of_mix665k():
    """Paper: 4,880 batches with images and 318 of text at batch 128."""
    is_multimodal = np.arange(665_298) >= 40_688
    sampler = ModalityLengthGroupedSampler(np.ones(665_298), is_multimodal, 128, fill_batches=True)
    assert len(sampler) == 5198 * 128
    batches = is_multimodal[np.array(list(sampler))].reshape(-1, 128)
    assert (batches == batches[:, :1]).all() and batches[:, 0].sum() == 4880


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([1, 2], [True], 2), r"lengths has shape \(2,\) and is_multimodal \(1,\); both must be one number"),
        (([], [], 2), "lengths is empty"),
        (([1, float("nan")], [True, True], 2), r"lengths\[1\] is not a finite number"),
        (([1], [True], 0), "batch_size is 0, but must be at least 1"),
        (([1], [True], 1, -1), "seed is -1, but must be at least 0"),
        (([1], [True], 1, 0, -1), "epoch is -1, but must be at least 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ModalityLengthGroupedSampler(*arguments)


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 26

    def __getitem__(self, index):
        return {"x": torch.tensor([float(index)]), "labels": torch.tensor([0.0])}


class Recorder(torch.nn.Module):
    """A model that remembers which samples it saw, and stops the run at a given step."""

    def __init__(self, crash_at=None):
        super().__init__()
        self.linear, self.seen, self.crash_at = torch.nn.Linear(1, 1), [], crash_at

    def forward(self, x, labels):
        if len(self.seen) == self.crash_at:
            raise KeyboardInterrupt
        self.seen.append(x.flatten().long().tolist())
        return {"loss": self.linear(x / 100).square().mean()}


class SampledTrainer(Trainer):
    def _get_train_sampler(self, train_dataset=None):
        lengths = [index % 7 for index in range(26)]
        return ModalityLengthGroupedSampler(lengths, [index % 3 > 0 for index in range(26)], 4, seed=3)


def test_a_resumed_trainer_sees_the_same_order(tmp_path):
    def trainer(model, folder):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder), num_train_epochs=3, save_steps=4,
            per_device_train_batch_size=2, gradient_accumulation_steps=2,
            report_to=[], disable_tqdm=True, use_cpu=True, logging_strategy="no", save_only_model=False,
        )  # fmt: skip
        return SampledTrainer(model, arguments, train_dataset=Numbers())

    straight = Recorder()
    trainer(straight, "straight").train()
    assert len(straight.seen) == 3 * 13 and sorted(sum(straight.seen[13:26], [])) == list(range(26))
    assert straight.seen[:13] != straight.seen[13:26] != straight.seen[26:]

    broken = Recorder(crash_at=22)  # of 13 an epoch; the last checkpoint is that of step 8, one step into epoch 1
    with pytest.raises(KeyboardInterrupt):
        trainer(broken, "broken").train()
    resumed = Recorder()
    trainer(resumed, "broken").train(resume_from_checkpoint=True)
    assert resumed.seen == straight.seen[13 + 2 :]


@pytest.mark.parametrize("process", [0, 1])
def test_several_processes_resume_in_the_epoch_they_were_in(process):
    """What Accelerate builds on two processes; without the callback the sampler stays at epoch 0."""
    lengths, is_multimodal = mix(64)
    sampler = ModalityLengthGroupedSampler(lengths, is_multimodal, 8, seed=1)
    shard = BatchSamplerShard(BatchSampler(sampler, 4, drop_last=False), 2, process)
    loader = DataLoaderShard(range(64), batch_sampler=shard)
    callback = SamplerEpochCallback(sampler)

    loader.set_epoch(1)
    straight = [batch.tolist() for batch in loader]

    sampler.set_epoch(0)
    resumed = skip_first_batches(loader, 3)
    resumed.set_epoch(1)
    callback.on_epoch_begin(None, TrainerState(epoch=1.375), None)
    assert [batch.tolist() for batch in resumed] == straight[3:]

    ranks = [list(BatchSamplerShard(BatchSampler(sampler, 4, drop_last=False), 2, rank)) for rank in (0, 1)]
    together = [a + b for a, b in zip(*ranks, strict=True)]
    assert together == cut(list(sampler), 8)  # one step of all processes is one batch of the sampler


def test_works_in_a_plain_data_loader():
    lengths, is_multimodal = mix(64)
    sampler = ModalityLengthGroupedSampler(lengths, is_multimodal, 8)
    assert torch.cat(list(DataLoader(range(64), batch_size=8, sampler=sampler))).tolist() == list(sampler)
