"""Settings every test shares: few threads, no network, progress bars off."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # for processes that tests start; sums are bit-equal only with as many threads
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers.utils import is_timm_available

try:
    import hypothesis
except ImportError:  # where kernels are tested on a machine with little else; tests that use it do not load then
    pass
else:
    # No property is about time, and a run can be repeated; `--hypothesis-profile=default` draws new examples.
    hypothesis.settings.register_profile(
        "repeatable", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(items):
    """Tests of timm models have an environment of their own, since timm needs torchvision and the library neither."""
    if not is_timm_available():
        for item in items:
            if item.get_closest_marker("timm"):
                item.add_marker(pytest.mark.skip(reason="timm is not installed here: make test-vision"))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tests run two at a time on two cores; more threads than that only get in each other's way."""
    torch.set_num_threads(1)


sys.path.append(str(Path(__file__).parent))


@pytest.fixture
def hub():
    """A Hugging Face Hub on localhost; see `hub_stub`."""
    from hub_stub import HubStub

    with HubStub() as stub:
        yield stub
