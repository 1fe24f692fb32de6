"""Settings every test shares: few threads, no network, progress bars off."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # for processes that tests start; sums are bit-equal only with as many threads
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tests run two at a time on two cores; more threads than that only get in each other's way."""
    torch.set_num_threads(1)
