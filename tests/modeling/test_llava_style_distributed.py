"""Ranks with images beside ranks without: no rank waits for ever, and the gradients are those of one process."""

import os
import socket
import sys

import pytest
import torch
import torch.multiprocessing as mp
from llava_style_toys import SIZE, batch, build, padded, pictures, row
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.slow

ROWS = [row(1, "image", 5, "wide", 6), row(1, 3, 4, 7)]
IMAGES = pictures((SIZE, SIZE), (SIZE, 2 * SIZE))
TIMEOUT = 300  # seconds; a run that is in step takes about 12 on an idle machine, most of them to start


def shares(kind: str) -> list[dict[str, torch.Tensor]]:
    """What each rank gets: two images of two sizes for the first, text for the second."""
    image_rank = batch(ROWS[0])
    if kind == "pixels":
        image_rank.update(padded(IMAGES))
    else:
        generator = torch.Generator().manual_seed(0)
        image_rank["image_features"] = [torch.randn(n, 8, generator=generator) for n in (4, 8)]
    return [image_rank, batch(ROWS[1])]


def tokens(share) -> int:
    return int((share["labels"][:, 1:] != -100).sum())


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    full = {k: p.grad for k, p in module.named_parameters() if p.grad is not None}
    return {k: g.full_tensor() if isinstance(g, DTensor) else g for k, g in full.items()}


def shard(model):
    for part in (
        *model.vision_tower.encoder.stages,
        model.vision_tower,
        model.connector,
        *model.language_model.model.layers,
    ):
        fully_shard(part)
    return fully_shard(model)


WRAPPERS = {"ddp": DistributedDataParallel, "fsdp": shard}


def run_rank(
    rank: int, port: int, wrapper: str, frozen: bool, kind: str, checkpointing: bool, connector: str, results
) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = build(freeze_vision=frozen, tap_norm="layernorm", connector=connector).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    wrapped = WRAPPERS[wrapper](model)
    every = shares(kind)
    total = sum(map(tokens, every))
    for step in range(2):  # DDP tells of a parameter without gradient at the next forward
        model.zero_grad()
        share = every[(rank + step) % 2]
        # gradients are averaged over ranks, so each rank counts its share of all tokens twice
        (2 * wrapped(**share, num_items_in_batch=total).loss).backward()
    found = gradients(model)
    model.eval()
    with torch.no_grad():
        loss = wrapped(**every[rank]).loss
    if rank == 0:
        results.put(({k: v.numpy() for k, v in found.items()}, loss.item()))
        results.close()
        results.join_thread()
    dist.barrier()
    dist.destroy_process_group()


def two_ranks(free_port: int, *arguments):
    context = mp.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=run_rank, args=(r, free_port, *arguments, results)) for r in range(2)]
    for process in ranks:
        process.start()
    try:
        return results.get(timeout=TIMEOUT)
    finally:
        for process in ranks:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(autouse=True)
def toys_for_children(monkeypatch):
    """Spawned ranks find this file and the toys by the path."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)]))


@pytest.mark.parametrize(
    ("wrapper", "frozen", "kind", "checkpointing", "connector"),
    [
        ("ddp", True, "pixels", False, "mlp2"),
        ("ddp", False, "pixels", True, "average_pool_mlp2"),  # to a grid that leaves the toys' few tokens as they are
        ("ddp", False, "cached features", False, "mlp2"),
        ("fsdp", True, "pixels", False, "average_pool_mlp2"),
        ("fsdp", False, "pixels", True, "mlp2"),
        ("fsdp", False, "cached features", False, "mlp2"),
    ],
)
def test_a_rank_without_images_keeps_in_step(wrapper, frozen, kind, checkpointing, connector, free_port):
    found, loss = two_ranks(free_port, wrapper, frozen, kind, checkpointing, connector)

    model = build(freeze_vision=frozen, tap_norm="layernorm", connector=connector).train()
    every = shares(kind)
    for share in every:
        model(**share, num_items_in_batch=sum(map(tokens, every))).loss.backward()
    expected = gradients(model)
    unused = set(found) - set(
        expected
    )  # an unfrozen tower that only dummies ran through has zeros where one has nothing
    assert not set(expected) - set(found)
    assert all((found[name] == 0).all() for name in unused)
    assert any(name.startswith("connector") for name in expected)
    assert frozen or kind != "pixels" or any(name.startswith("vision_tower") for name in expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(torch.from_numpy(found[name]), gradient, atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(loss), model.eval()(**every[0]).loss)
