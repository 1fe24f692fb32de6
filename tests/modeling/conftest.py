"""What tests of models share: toys to import, such as `llava_style_toys`, and the backends of the scan."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="session")
def backend(request):
    """Name of a backend of the scan, where it can run: `cpp` is compiled once, if there is a compiler."""
    from ssm_vlm.modeling.ops.selective_scan_2d.custom_op import BACKENDS

    if request.param in BACKENDS:
        tensors = torch.ones(1, 1, 1, 1), *(torch.ones(1, 1, 1, 1, 1) for _ in range(3)), *(torch.ones(1, 1, 1),) * 4
        obstacle = BACKENDS[request.param].why_not(*tensors, asked_for=True)
        if obstacle is not None:
            pytest.skip(f"{request.param}: {obstacle}")
    return request.param
