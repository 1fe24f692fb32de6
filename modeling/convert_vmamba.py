"""Load VMamba's published checkpoints (github.com/MzeroMiko/VMamba) into our encoder, strictly.

All spellings that its files use are understood: classification files (`model`), dense-task files (`state_dict`, keys
under `backbone.`), `x_proj_weight` and `x_proj.weight`, linear layers stored as matrices or as 1x1 convolutions, and
the oldest names (`self_attention`, `ln_1`, `patch_embed.proj`, `head`). The configuration is read off the tensor
shapes, so that a file can not be loaded as another variant than it is.
"""

import re
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from ..configuration.configuration_ssm_vision import SSMVisionConfig
from .modeling_ssm_vision import SSMVisionForImageClassification

DENSE_HEADS = re.compile(r"(neck|rpn_head|roi_head|decode_head|auxiliary_head|data_preprocessor)\.")
"""Keys of dense-task files that belong to the detector or segmenter around the encoder; they are left out."""

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


def _unwrapped(state_dict: Mapping) -> dict[str, Tensor]:
    """The encoder's entries under their current names, whatever file they come from."""
    for wrapper in ("model", "state_dict"):
        if isinstance(state_dict.get(wrapper), Mapping):
            state_dict = state_dict[wrapper]
    if any(key.startswith("backbone.") for key in state_dict):
        state_dict = {
            key.removeprefix("backbone."): value for key, value in state_dict.items() if not DENSE_HEADS.match(key)
        }
    renamed = {}
    for key, value in state_dict.items():
        for pattern, replacement in _OLDEST_NAMES:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def convert_vmamba_state_dict(state_dict: Mapping) -> dict[str, Tensor]:
    """Rename and reshape the tensors of a VMamba checkpoint.

    Args:
        state_dict: what the file holds, or its `model` or `state_dict` entry.

    Returns:
        tensors under the names of `SSMVisionBackbone` (`stem.`, `stages.`, `output_norms.`), and where the file has a
        classifier its `norm.` and `classifier.`.

    Raises:
        ValueError: naming every key that is not VMamba's.
    """
    reference = _unwrapped(state_dict)
    stem = _STEM_RULES["conv3x2" if any(key.startswith("patch_embed.5.") for key in reference) else "conv4"]
    converted, unknown = {}, []
    for key, tensor in reference.items():
        for pattern, replacement, reshape in _RULES:
            if match := re.fullmatch(pattern, key):
                converted[match.expand(replacement)] = reshape(tensor)
                break
        else:
            name = _convert_resampling_key(key, reference, stem)
            if name is None:
                unknown.append(key)
            else:
                converted[name] = tensor
    if unknown:
        raise ValueError(f"Not keys of a VMamba checkpoint: {', '.join(sorted(unknown))}.")
    return converted


def _convert_resampling_key(key: str, reference: Mapping[str, Tensor], stem: dict[str, str]) -> str | None:
    """Our name of a key of the stem, of a downsampling or of an output norm; None if it is none of them."""
    if match := re.fullmatch(r"patch_embed\.(\d)\.(weight|bias)", key):
        index, parameter = match.groups()
        return f"stem.{stem[index]}.{parameter}" if index in stem else None
    if match := re.fullmatch(r"layers\.(\d+)\.downsample\.(\d)\.(weight|bias)", key):
        stage, index, parameter = match.groups()
        names = _DOWNSAMPLE_RULES[_downsample_kind(reference, int(stage))]
        # The reference downsamples at the end of a stage, we at the start of the next.
        return f"stages.{int(stage) + 1}.downsample.{names[index]}.{parameter}" if index in names else None
    if match := re.fullmatch(r"outnorm(\d)\.(weight|bias)", key):
        return f"output_norms.stage{int(match[1]) + 1}.{match[2]}"
    return None


def _downsample_kind(reference: Mapping[str, Tensor], stage: int) -> str:
    return "patch_merge" if f"layers.{stage}.downsample.2.weight" in reference else "conv3"


def infer_vmamba_config(state_dict: Mapping, **overrides) -> SSMVisionConfig:
    """The configuration that a VMamba checkpoint was trained with, read off its keys and shapes.

    Args:
        state_dict: as for `convert_vmamba_state_dict`.
        overrides: further fields, such as `out_features=["stage3"]` for the tap.

    Raises:
        ValueError: if the file holds no VMamba encoder.
    """
    reference = _unwrapped(state_dict)
    blocks = {(int(m[1]), int(m[2])) for key in reference if (m := re.match(_BLOCK, key))}
    if not blocks or "patch_embed.0.weight" not in reference:
        raise ValueError(
            "The checkpoint holds no VMamba encoder: it has no patch_embed.0.weight or no layers.*.blocks.*."
        )
    stages = 1 + max(stage for stage, _ in blocks)
    depths = [sum(1 for stage, _ in blocks if stage == index) for index in range(stages)]
    widths = [reference[f"layers.{index}.blocks.0.norm.weight"].numel() for index in range(stages)]
    first = {key.removeprefix("layers.0.blocks.0."): tensor for key, tensor in reference.items()}
    inner, states = first["op.A_logs"].shape[0] // 4, first["op.A_logs"].shape[1]
    fields = {
        "num_channels": reference["patch_embed.0.weight"].shape[1],
        "stem": "conv3x2" if "patch_embed.5.weight" in reference else "conv4",
        "hidden_sizes": widths,
        "depths": depths,
        "downsample": _downsample_kind(reference, 0) if stages > 1 else "conv3",
        "mlp_ratio": first["mlp.fc1.weight"].shape[0] / widths[0] if "mlp.fc1.weight" in first else 0.0,
        "ssm_ratio": inner / widths[0],
        "d_state": states,
        "gated": first["op.in_proj.weight"].shape[0] == 2 * inner,
        "conv_bias": "op.conv2d.bias" in first,
        "output_norm": "layernorm" if any(key.startswith("outnorm") for key in reference) else "none",
    }
    if "classifier.head.weight" in reference:
        fields["num_labels"] = reference["classifier.head.weight"].shape[0]
    return SSMVisionConfig(**(fields | overrides))


def load_vmamba_state_dict(model: nn.Module, state_dict: Mapping) -> list[str]:
    """Load a VMamba checkpoint into `SSMVisionForImageClassification`, `SSMVisionModel` or `SSMVisionBackbone`.

    Returns:
        the keys left out, in our names: stages past the tap, output norms of other stages, and, except by the
        classifier, the head. Nothing else is ever left out.

    Raises:
        ValueError: naming every key that is missing, unexpected or of another shape.
    """
    converted = convert_vmamba_state_dict(state_dict)
    config = model.config
    past_tap = tuple(f"stages.{stage}." for stage in range(config.tap_stage, len(config.depths)))
    declared = (*past_tap, "output_norms.", "norm.", "classifier.")
    if isinstance(model, SSMVisionForImageClassification):
        head = ("norm.", "classifier.")
        converted = {key if key.startswith(head) else f"model.{key}": value for key, value in converted.items()}
        declared = tuple(f"model.{key}" for key in (*past_tap, "output_norms."))
    own = model.state_dict()
    missing = [key for key in own if key not in converted]
    discarded = [key for key in converted if key not in own and key.startswith(declared)]
    unexpected = [key for key in converted if key not in own and key not in discarded]
    misshaped = [
        f"{key} ({list(converted[key].shape)} in the file, {list(own[key].shape)} in the model)"
        for key in own
        if key in converted and own[key].shape != converted[key].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
    if any(problems.values()):
        listed = "; ".join(f"{problem}: {', '.join(keys)}" for problem, keys in problems.items() if keys)
        raise ValueError(f"The VMamba checkpoint does not fit this {type(model).__name__}: {listed}.")
    model.load_state_dict({key: converted[key] for key in own})
    return discarded


__all__ = ["convert_vmamba_state_dict", "infer_vmamba_config", "load_vmamba_state_dict"]
