"""The table of named encoders, timm-style `variant.tag`: everything a study has to know about an encoder, in one place.

A new encoder is one entry in the list of its family. `parameters` and `flops` are counted up to the tap, at the size of
the entry's own preprocessing, heads never, a multiply and an add as two operations; the tests recount every entry and
print the right figures, and so does `python -m ssm_vlm.eval.encoder_cost NAME`.
"""

import difflib
import os

from .digit_encoders import DIGIT_ENCODERS
from .encoder_entry import NamedEncoder, Preprocessing, WeightSource
from .hierarchical_encoders import HIERARCHICAL_ENCODERS
from .mambavision_encoders import MAMBAVISION_ENCODERS
from .maxvit_encoders import MAXVIT_ENCODERS
from .plain_vit_encoders import PLAIN_VIT_ENCODERS
from .vit_adapter_encoders import VIT_ADAPTER_ENCODERS
from .vitdet_encoders import VITDET_ENCODERS
from .vmamba_encoders import VMAMBA_ENCODERS


def _table(*groups: list[NamedEncoder]) -> dict[str, NamedEncoder]:
    table: dict[str, NamedEncoder] = {}
    for entry in (entry for group in groups for entry in group):
        if entry.name in table:
            raise ValueError(f"Two encoders are named {entry.name!r}.")
        table[entry.name] = entry
    return table


ENCODERS = _table(
    VMAMBA_ENCODERS,
    PLAIN_VIT_ENCODERS,
    HIERARCHICAL_ENCODERS,
    MAXVIT_ENCODERS,
    MAMBAVISION_ENCODERS,
    VITDET_ENCODERS,
    VIT_ADAPTER_ENCODERS,
    DIGIT_ENCODERS,
)
"""Name -> entry, in the order in which tables show them."""


def get_named_encoder(name: str) -> NamedEncoder:
    """The entry with exactly this name.

    Raises:
        ValueError: for a name that is not in the table; the message gives the nearest ones.
    """
    if name not in ENCODERS:
        near = sorted(ENCODERS, key=lambda known: _likeness(name, known), reverse=True)[:3]
        raise ValueError(
            f"There is no encoder named {name!r}; the nearest names are {', '.join(near)} (`ssm-vlm encoders` lists "
            "all)."
        )
    return ENCODERS[name]


def _likeness(typed: str, known: str) -> tuple[int, float]:
    """How far a name begins like another, which tells the family, then how alike they are as a whole."""
    return len(os.path.commonprefix([typed, known])), difflib.SequenceMatcher(None, typed, known).ratio()


__all__ = ["ENCODERS", "NamedEncoder", "Preprocessing", "WeightSource", "get_named_encoder"]
