"""VMamba's published checkpoints (github.com/MzeroMiko/VMamba) as ours.

All spellings that its files use are understood: classification files, dense-task files (keys under `backbone.`, a norm
per stage), `x_proj_weight` and `x_proj.weight`, linear layers stored as matrices or as 1x1 convolutions, and the oldest
names (`self_attention`, `ln_1`, `patch_embed.proj`, `head`). The configuration is read off the tensor shapes, so that a
file can not be loaded as another variant than it is.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..configuration.configuration_ssm_vision import SSMVisionConfig
from .checkpoint_layout import BrokenFileError, CheckpointLayout, StateDict
from .modeling_ssm_vision import SSMVisionBackbone, SSMVisionForImageClassification

_DENSE_HEADS = (r"(neck|rpn_head|roi_head|decode_head|auxiliary_head|data_preprocessor)\.",)

_OLDEST_NAMES = (
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    (r"\.downsample\.norm\.", ".downsample.1."),
    (r"\.downsample\.reduction\.", ".downsample.2."),
    (r"\.(x_proj|dt_projs)\.weight$", r".\1_weight"),
    (r"\.dt_projs\.bias$", ".dt_projs_bias"),
    (r"^(norm|head)\.", r"classifier.\1."),
)


def _as_is(tensor: Tensor) -> Tensor:
    return tensor


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.flatten(1) if tensor.dim() == 4 else tensor


def _per_direction(tensor: Tensor) -> Tensor:
    """[4, M, K] or [4 * M, K] -> [4, M, K]"""
    return tensor.reshape(4, -1, tensor.shape[-1])


def _per_direction_vector(tensor: Tensor) -> Tensor:
    """[4, M] or [4 * M] -> [4, M]"""
    return tensor.reshape(4, -1)


_BLOCK = r"layers\.(\d+)\.blocks\.(\d+)\."
_OURS = r"stages.\1.blocks.\2."
_RULES: tuple[tuple[str, str, Callable[[Tensor], Tensor]], ...] = (
    (_BLOCK + r"norm\.(weight|bias)", _OURS + r"norm1.\3", _as_is),
    (_BLOCK + r"norm2\.(weight|bias)", _OURS + r"norm2.\3", _as_is),
    (_BLOCK + r"mlp\.(fc1|fc2)\.(weight|bias)", _OURS + r"mlp.\3.\4", _matrix),
    (_BLOCK + r"op\.(in_proj|out_proj)\.weight", _OURS + r"mixer.\3.weight", _matrix),
    (_BLOCK + r"op\.conv2d\.(weight|bias)", _OURS + r"mixer.conv.\3", _as_is),
    (_BLOCK + r"op\.out_norm\.(weight|bias)", _OURS + r"mixer.out_norm.\3", _as_is),
    (_BLOCK + r"op\.x_proj_weight", _OURS + "mixer.x_proj_weight", _per_direction),
    (_BLOCK + r"op\.dt_projs_weight", _OURS + "mixer.dt_weight", _per_direction),
    (_BLOCK + r"op\.dt_projs_bias", _OURS + "mixer.dt_bias", _per_direction_vector),
    (_BLOCK + r"op\.A_logs", _OURS + "mixer.a_log", _per_direction),
    (_BLOCK + r"op\.Ds", _OURS + "mixer.d", _per_direction_vector),
    (r"classifier\.norm\.(weight|bias)", r"norm.\1", _as_is),
    (r"classifier\.head\.(weight|bias)", r"classifier.\1", _as_is),
)
_STEM_RULES = {
    "conv4": {"0": "conv", "2": "norm"},
    "conv3x2": {"0": "conv1", "2": "norm1", "5": "conv2", "7": "norm2"},
}
_DOWNSAMPLE_RULES = {
    "patch_merge": {"1": "norm", "2": "reduction"},
    "conv3": {"1": "conv", "3": "norm"},
}


def _current_names(tensors: Mapping[str, Tensor]) -> StateDict:
    """The encoder's tensors under VMamba's current names, whatever file they come from."""
    renamed = {}
    for key, tensor in tensors.items():
        key = key.removeprefix("backbone.")
        for pattern, replacement in _OLDEST_NAMES:
            key = re.sub(pattern, replacement, key)
        renamed[key] = tensor
    return renamed


def _recognises(tensors: Mapping[str, Tensor]) -> bool:
    return any(re.fullmatch(r"layers\.0\.blocks\.0\.op\.A_logs", key) for key in _current_names(tensors))


def _infer(tensors: Mapping[str, Tensor]) -> tuple[type[PreTrainedModel], SSMVisionConfig]:
    """Every field that a checkpoint decides, read off keys and shapes."""
    reference = _current_names(tensors)
    blocks = {(int(m[1]), int(m[2])) for key in reference if (m := re.match(_BLOCK, key))}
    stages = 1 + max((stage for stage, _ in blocks), default=-1)

    def shape(key: str) -> list[int]:
        if key not in reference:
            raise BrokenFileError(f"The file is not a whole VMamba encoder: it lacks {key}.")
        return list(reference[key].shape)

    first = "layers.0.blocks.0."
    widths = [shape(f"layers.{index}.blocks.0.norm.weight")[0] for index in range(stages)]
    inner = shape(first + "op.A_logs")[0] // 4
    ranks = [shape(f"layers.{index}.blocks.0.op.dt_projs_weight")[-1] for index in range(stages)]
    fields: dict[str, Any] = {
        "num_channels": shape("patch_embed.0.weight")[1],
        "stem": "conv3x2" if "patch_embed.5.weight" in reference else "conv4",
        "hidden_sizes": widths,
        "depths": [sum(1 for stage, _ in blocks if stage == index) for index in range(stages)],
        "downsample": _downsample_kind(reference, 0) if stages > 1 else "conv3",
        "mlp_ratio": shape(first + "mlp.fc1.weight")[0] / widths[0] if first + "mlp.fc1.weight" in reference else 0.0,
        "ssm_ratio": inner / widths[0],
        "d_state": shape(first + "op.A_logs")[1],
        "gated": shape(first + "op.in_proj.weight")[0] == 2 * inner,
        "conv_bias": first + "op.conv2d.bias" in reference,
        "dt_rank": "auto" if ranks == [-(-width // 16) for width in widths] else ranks[0],
        "out_features": [f"stage{stages}"],
        "output_norm": "parameter_free",
    }
    if "classifier.head.weight" in reference:
        fields["num_labels"] = shape("classifier.head.weight")[0]
        return SSMVisionForImageClassification, SSMVisionConfig(**fields)
    normed = sorted({f"stage{int(m[1]) + 1}" for key in reference if (m := re.match(r"outnorm(\d)\.", key))})
    if normed:
        fields |= {"output_norm": "layernorm", "out_features": normed}
    return SSMVisionBackbone, SSMVisionConfig(**fields)


def _convert(tensors: Mapping[str, Tensor], config: Any) -> StateDict:
    """Ours of each tensor; a whole classifier keeps its trunk under `model.`."""
    reference = _current_names(tensors)
    trunk = "model." if "classifier.head.weight" in reference else ""
    converted = {}
    for key, tensor in reference.items():
        for pattern, replacement, reshape in _RULES:
            if match := re.fullmatch(pattern, key):
                name, tensor = match.expand(replacement), reshape(tensor)
                break
        else:
            name = _resampling_name(key, reference, config)
        converted[name if name in _HEAD or name == key else trunk + name] = tensor
    return converted


_HEAD = {f"{module}.{parameter}" for module in ("norm", "classifier") for parameter in ("weight", "bias")}


def _resampling_name(key: str, reference: Mapping[str, Tensor], config: Any) -> str:
    """Our name of a key of the stem, of a downsampling or of an output norm; any other key stays as it is."""
    if match := re.fullmatch(r"patch_embed\.(\d)\.(weight|bias)", key):
        index, parameter = match.groups()
        names = _STEM_RULES[config.stem]
        return f"stem.{names[index]}.{parameter}" if index in names else key
    if match := re.fullmatch(r"layers\.(\d+)\.downsample\.(\d)\.(weight|bias)", key):
        stage, index, parameter = match.groups()
        names = _DOWNSAMPLE_RULES[_downsample_kind(reference, int(stage))]
        # The reference downsamples at the end of a stage, we at the start of the next.
        return f"stages.{int(stage) + 1}.downsample.{names[index]}.{parameter}" if index in names else key
    if match := re.fullmatch(r"outnorm(\d)\.(weight|bias)", key):
        return f"output_norms.stage{int(match[1]) + 1}.{match[2]}"
    return key


def _downsample_kind(reference: Mapping[str, Tensor], stage: int) -> str:
    return "patch_merge" if f"layers.{stage}.downsample.2.weight" in reference else "conv3"


VMAMBA_LAYOUT = CheckpointLayout(_recognises, _infer, _convert, _DENSE_HEADS)
"""A classification file becomes `SSMVisionForImageClassification`; a dense file becomes `SSMVisionBackbone` with the
norms of its stages, the detector's or segmenter's heads left out."""

__all__ = ["VMAMBA_LAYOUT"]
