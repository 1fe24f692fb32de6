"""Which implementation of a scan runs: by argument, environment variable or fit, logged with its reason."""

import functools
import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

BACKEND_VARIABLE = "SSM_VLM_SCAN_BACKEND"


class Backend(NamedTuple):
    """One implementation."""

    forward: Callable[..., Tensor]
    """The op's tensors -> its result."""
    backward: Callable[..., tuple[Tensor, ...]]
    """Gradient of the result, the op's tensors -> the gradient of each tensor, in its dtype."""
    why_not: Callable[..., str | None]
    """The op's tensors, and whether this backend is asked for by name -> in words why it does not run on them, or None.
    One that is merely unlikely to pay runs where it is asked for."""


def asked_for(requested: str | None) -> tuple[str | None, str]:
    """Name of the backend that the caller or else the environment asks for, if any, and who asks."""
    if requested:
        return requested, "the backend argument asks for it"
    return os.environ.get(BACKEND_VARIABLE) or None, f"{BACKEND_VARIABLE} asks for it"


def choose_backend(
    op: str, backends: Mapping[str, Backend], tensors: tuple[Tensor, ...], requested: str | None
) -> Backend:
    """The implementation to run.

    Args:
        op: name of the op, for messages.
        backends: name -> implementation, the fastest first.
        tensors: what the op runs on.
        requested: a name in `backends`; by default the environment variable `SSM_VLM_SCAN_BACKEND`, else the first one
            that fits.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: the backend that is asked for cannot run here.
    """
    name, reason = asked_for(requested)
    if name is not None:
        if name not in backends:
            raise ValueError(f"{op}: unknown backend {name!r} ({reason}); there are naive, {', '.join(backends)}.")
        obstacle = backends[name].why_not(*tensors, asked_for=True)
        if obstacle is not None:
            raise RuntimeError(f"{op}: backend {name} cannot run here ({reason}): {obstacle}.")
        log_once(op, name, reason)
        return backends[name]
    passed_over: list[str] = []
    for name, backend in backends.items():
        obstacle = backend.why_not(*tensors, asked_for=False)
        if obstacle is None:
            log_once(op, name, "; ".join(["it is the fastest that fits", *passed_over]))
            return backend
        passed_over.append(f"not {name}: {obstacle}")
    raise RuntimeError(f"{op}: no backend fits; {'; '.join(passed_over)}.")


@functools.cache
def log_once(op: str, name: str, reason: str) -> None:
    logger.info("%s: backend %s, because %s.", op, name, reason)


__all__ = ["BACKEND_VARIABLE", "Backend", "asked_for", "choose_backend", "log_once"]
