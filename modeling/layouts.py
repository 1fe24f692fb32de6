"""The table of file layouts that published weights come in."""

import re
from collections.abc import Mapping

from torch import Tensor

from .checkpoint_layout import CheckpointLayout, StateDict
from .checkpoint_report import listed
from .convert_convnext import CONVNEXT_LAYOUT
from .convert_mambavision import MAMBAVISION_LAYOUT
from .convert_swin import SWIN_LAYOUT
from .convert_timm_maxvit import TIMM_MAXVIT_LAYOUT
from .convert_timm_vit import TIMM_VIT_LAYOUT
from .convert_vit_adapter import VIT_ADAPTER_LAYOUT
from .convert_vitdet import VITDET_LAYOUT
from .convert_vmamba import VMAMBA_LAYOUT

LAYOUTS: dict[str, CheckpointLayout] = {
    "vmamba": VMAMBA_LAYOUT,
    "timm_vit": TIMM_VIT_LAYOUT,
    "swin": SWIN_LAYOUT,
    "convnext": CONVNEXT_LAYOUT,
    "timm_maxvit": TIMM_MAXVIT_LAYOUT,
    "mambavision": MAMBAVISION_LAYOUT,
    "vitdet": VITDET_LAYOUT,
    "vit_adapter": VIT_ADAPTER_LAYOUT,
}
"""Name in `WeightSource.layout` -> layout. A new family of files adds one line here."""

_WRAPPERS = ("module.", "backbone.", "model.")
"""What training puts before the names of a model: torch's data parallelism, or a model around it."""


def recognise_layout(tensors: Mapping[str, Tensor], where: str) -> str:
    """Name of the layout that knows these keys.

    Args:
        tensors: what the file holds, under its own names.
        where: the file, for the message.

    Raises:
        ValueError: for a file of no known layout.
    """
    _check_indices(tensors, where)
    for name, layout in LAYOUTS.items():
        if layout.recognises(tensors):
            return name
    for wrapper in _WRAPPERS:
        inner = {key.removeprefix(wrapper): tensor for key, tensor in tensors.items() if key.startswith(wrapper)}
        for name, layout in LAYOUTS.items():
            if layout.recognises(inner):
                raise ValueError(
                    f"{where} holds tensors in the layout {name!r} under {wrapper!r}, but "
                    f"{len(tensors) - len(inner)} others beside them: only a file of the encoder alone is read."
                )
    raise ValueError(
        f"{where} holds {len(tensors)} tensors ({listed(tensors, most=3)}) in none of the layouts that are known: "
        f"{', '.join(LAYOUTS)}."
    )


def _check_indices(tensors: Mapping[str, Tensor], where: str) -> None:
    """A layout builds as many blocks as the names count: no more than there are tensors.

    Raises:
        ValueError: a name counts further.
    """
    most = len(str(len(tensors)))
    for key in tensors:
        numbers = re.findall(r"(?<![^._])\d+(?![^._])", key)
        if any(len(number) > most or int(number) > len(tensors) for number in numbers):
            raise ValueError(f"{where} holds {len(tensors)} tensors, but one is {listed([key])[:200]}.")


def without_wrapper(tensors: StateDict) -> StateDict:
    """The tensors without "module." or "backbone." before every name, if it takes that to recognise them."""
    if any(layout.recognises(tensors) for layout in LAYOUTS.values()):
        return tensors
    for wrapper in _WRAPPERS:
        if tensors and all(key.startswith(wrapper) for key in tensors):
            return without_wrapper({key.removeprefix(wrapper): tensor for key, tensor in tensors.items()})
    return tensors


__all__ = ["LAYOUTS", "recognise_layout", "without_wrapper"]
