"""Which implementation of a scan runs: argument, environment variable or default, logged once with its reason."""

import functools
import os
from collections.abc import Callable, Mapping

from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

BACKEND_VARIABLE = "SSM_VLM_SCAN_BACKEND"


def choose_backend(
    op: str, backends: Mapping[str, Callable[..., Tensor]], x: Tensor, requested: str | None
) -> Callable[..., Tensor]:
    """The implementation to run.

    Args:
        op: name of the op, for messages.
        backends: name -> implementation.
        x: the tensor that the op runs on.
        requested: a name in `backends`; by default the environment variable `SSM_VLM_SCAN_BACKEND`, else the fastest
            one that fits.

    Raises:
        ValueError: there is no such backend.
    """
    name, reason = requested, "the backend argument asks for it"
    if name is None:
        name, reason = os.environ.get(BACKEND_VARIABLE), f"{BACKEND_VARIABLE} asks for it"
    if not name:
        name, reason = "chunked", f"it is the fastest for {x.device.type} tensors"
    if name not in backends:
        raise ValueError(f"{op}: unknown backend {name!r} ({reason}); there are {', '.join(backends)}.")
    log_once(op, name, reason)
    return backends[name]


@functools.cache
def log_once(op: str, name: str, reason: str) -> None:
    logger.info("%s: backend %s, because %s.", op, name, reason)


__all__ = ["BACKEND_VARIABLE", "choose_backend"]
