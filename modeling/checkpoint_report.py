"""Whether a checkpoint fits a model, key by key, and the one sentence that says why not."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

_NOT_ARCHITECTURE = {"_name_or_path", "architectures", "auto_map", "dtype", "drop_path_rate", "id2label", "label2id"}
_NOT_ARCHITECTURE |= {"output_attentions", "output_hidden_states", "problem_type", "return_dict"}
_NOT_ARCHITECTURE |= {"transformers_version"}
# Decide nothing before a tap, or nothing once there are weights.
_NOT_ARCHITECTURE |= {"encoder_stride", "initializer_factor", "initializer_range", "projection_dim"}
# Shapes show the picture size where it decides anything; the tap is compared by the name of its stage.
_NOT_ARCHITECTURE |= {"image_size", "tap_layer", "out_indices"}


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_of_type(stored: Tensor, wanted: Tensor) -> bool:
    """Whether numbers of a file can stand for those of a model: whole ones for whole ones, and floats for floats.

    Floats of 8 bits and less mean nothing without their scales.
    """
    return stored.dtype in _FLOATS if wanted.is_floating_point() else not stored.is_floating_point()


def check_fit(where: str, theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> None:
    """Holds the tensors of a checkpoint to those of a model: names, shapes, and where numbers are whole.

    Raises:
        ValueError: one sentence with every kind of difference.
    """
    report_misfit(
        where,
        missing=[key for key in ours if key not in theirs],
        unexpected=[key for key in theirs if key not in ours],
        misshaped=[
            f"{key} {tuple(theirs[key].shape)} instead of {tuple(tensor.shape)}"
            for key, tensor in ours.items()
            if key in theirs and theirs[key].shape != tensor.shape
        ],
        mistyped=[
            f"{key} {theirs[key].dtype} instead of {tensor.dtype}"
            for key, tensor in ours.items()
            if key in theirs and not is_of_type(theirs[key], tensor)
        ],
    )


def check_finite(where: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError naming the tensors that hold NaN or infinity. Each is read once, and nothing is copied."""
    broken = []
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.is_meta and tensor.numel():
            least, most = torch.aminmax(tensor.detach())  # either is NaN where any number is
            if not (torch.isfinite(least) and torch.isfinite(most)):
                broken.append(key)
    if broken:
        raise ValueError(f"The weights in {where} are broken: NaN or infinity is in {listed(broken)}.")


def report_misfit(
    where: str, *, missing: Iterable, unexpected: Iterable, misshaped: Iterable, mistyped: Iterable = ()
) -> None:
    """Raises ValueError naming what does not fit, if anything is given."""
    groups = {"lacks": missing, "has undeclared": unexpected, "has another shape for": misshaped}
    groups["has another type for"] = mistyped
    found = [f"{verb} {listed(keys)}" for verb, keys in groups.items() if keys]
    if found:
        raise ValueError(f"The checkpoint {where} does not fit: it {'; it '.join(found)}.")


def check_same_architecture(where: str, config: PreTrainedConfig, expected: PreTrainedConfig) -> None:
    """Fields that no tensor shape shows (heads, activations, epsilons, the tap) must agree, too."""
    ours, theirs = _architecture(expected.to_dict()), _architecture(config.to_dict())
    differing = sorted(key for key in ours if theirs.get(key) != ours[key])
    if differing:
        pairs = listed(f"{key} {theirs.get(key)!r} instead of {ours[key]!r}" for key in differing)
        raise ValueError(f"The weights in {where} are of another architecture: {pairs}.")


def _architecture(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of a config that decide what it computes, those of configs inside it under `name.field`."""
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, dict) and key not in _NOT_ARCHITECTURE:
            flat |= _architecture(value, f"{prefix}{key}.")
        elif key not in _NOT_ARCHITECTURE:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def listed(keys: Iterable, most: int = 5) -> str:
    """The first names in order, and how many more there are; what would not be printed as it is is escaped."""
    names = sorted(name if name.isprintable() else repr(name)[1:-1] for name in map(str, keys))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


__all__ = ["check_finite", "check_fit", "check_same_architecture", "is_of_type", "listed", "report_misfit"]
