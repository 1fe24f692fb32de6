"""The table of file layouts that published weights come in."""

from collections.abc import Mapping

from torch import Tensor

from .checkpoint_layout import CheckpointLayout
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


def recognise_layout(tensors: Mapping[str, Tensor], where: str) -> str:
    """Name of the layout that knows these keys.

    Args:
        tensors: what the file holds, under its own names.
        where: the file, for the message.

    Raises:
        ValueError: for a file of no known layout.
    """
    for name, layout in LAYOUTS.items():
        if layout.recognises(tensors):
            return name
    raise ValueError(
        f"{where} holds {len(tensors)} tensors ({listed(tensors, most=3)}) in none of the layouts that are known: "
        f"{', '.join(LAYOUTS)}."
    )


__all__ = ["LAYOUTS", "recognise_layout"]
