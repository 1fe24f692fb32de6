"""Connectors: from the tap's tokens to language model embeddings, by an MLP, and to fewer tokens where one asks for it.

A connector's name says both: "mlp2" is an MLP on every token, "pixel_shuffle_mlp2" makes fewer tokens first. A new MLP
is a line in `MLPS`, a new way to make fewer tokens one in `REDUCTIONS`; every pair of them is a name in `CONNECTORS`.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .token_grid import Downsampling, encoder_downsampling

WEIGHTS_NAME = "connector.safetensors"
CONFIG_NAME = "connector_config.json"

# Name -> output width of each linear layer, given the widths of what goes in and of the language model. GELU stands
# between the layers. Source: paper, "2-MLP" and "3-MLP"; the three-layer one first widens fourfold.
MLPS: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "linear": lambda in_features, out_features: (out_features,),
    "mlp2": lambda in_features, out_features: (out_features, out_features),
    "mlp3": lambda in_features, out_features: (4 * in_features, out_features, out_features),
}


@dataclass(frozen=True)
class Reduction:
    """A way to make fewer tokens of a map. It has no parameters, and one number or list that says how far it goes.

    Args:
        option: The field of `LlavaStyleConfig` that holds this number or list.
        default: What it is where the field is None.
        is_valid: Whether a value can be used.
        meaning: What would be right, for the message where it cannot.
        step: value -> the step that a picture's token arithmetic gets, see `token_grid`.
        width: (channels, value) -> channels of the tokens that are left.
        reduce: (maps [n, C, h, w], value) -> maps [n, width, h', w'].
    """

    option: str
    default: Any
    is_valid: Callable[[Any], bool]
    meaning: str
    step: Callable[[Any], list]
    width: Callable[[int, Any], int]
    reduce: Callable[[torch.Tensor, Any], torch.Tensor]


def _is_positive(number: Any) -> bool:
    return isinstance(number, int) and number >= 1


def average_pool(maps: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """Adaptive average pooling [n, C, h, w] -> [n, C, min(h, rows), min(w, columns)]; no side ever grows.

    Cell i of r, of h rows, is the mean of the rows from floor(i h / r) up to, not including, ceil((i + 1) h / r), and
    likewise for columns; neighbours share a row where r does not divide h.
    """
    (height, width), (rows, columns) = maps.shape[-2:], grid
    return nn.functional.adaptive_avg_pool2d(maps, (min(height, rows), min(width, columns)))


def pixel_shuffle(maps: torch.Tensor, factor: int) -> torch.Tensor:
    """Space to depth [n, C, h, w] -> [n, C f^2, ceil(h / f), ceil(w / f)]; what f does not divide is padded with zeros.

    The padding is at the bottom and right. Channel (c f + i) f + j of a new token is channel c of the old one in row i
    and column j of its f x f square, which is the order of `torch.nn.functional.pixel_unshuffle`.
    """
    height, width = maps.shape[-2:]
    return nn.functional.pixel_unshuffle(nn.functional.pad(maps, (0, -width % factor, 0, -height % factor)), factor)


REDUCTIONS: dict[str, Reduction] = {
    "average_pool": Reduction(
        option="connector_grid",
        default=[14, 14],
        is_valid=lambda grid: isinstance(grid, list | tuple) and len(grid) == 2 and all(map(_is_positive, grid)),
        meaning="[rows, columns], both at least 1",
        step=lambda grid: [list(grid), "at_most"],
        width=lambda channels, grid: channels,
        reduce=average_pool,
    ),
    "pixel_shuffle": Reduction(
        option="connector_factor",
        default=2,
        is_valid=_is_positive,
        meaning="a whole number of at least 1",
        step=lambda factor: [factor, "ceil"],
        width=lambda channels, factor: channels * factor**2,
        reduce=pixel_shuffle,
    ),
}

# Name -> (reduction or None, MLP).
CONNECTORS: dict[str, tuple[Reduction | None, Callable[[int, int], tuple[int, ...]]]] = {
    **{mlp: (None, widths) for mlp, widths in MLPS.items()},
    **{f"{name}_{mlp}": (reduction, widths) for name, reduction in REDUCTIONS.items() for mlp, widths in MLPS.items()},
}
_OPTIONS = tuple(reduction.option for reduction in REDUCTIONS.values())


def _reduction(name: str, options: dict[str, Any]) -> tuple[Reduction | None, Any]:
    """The reduction of a connector and its value.

    Raises:
        ValueError: The name is not in `CONNECTORS`, or an option cannot be used or is read by another connector only.
    """
    if name not in CONNECTORS:
        raise ValueError(f"connector={name!r} is not known: choose one of {', '.join(CONNECTORS)}.")
    reduction, _ = CONNECTORS[name]
    for option, value in options.items():
        if value is None:
            continue
        if reduction is None or option != reduction.option:
            readers = [reader for reader, (other, _) in CONNECTORS.items() if other and other.option == option]
            raise ValueError(f"{option}={value!r} is not read by connector={name!r}, only by {', '.join(readers)}.")
        if not reduction.is_valid(value):
            raise ValueError(f"{option}={value!r} does not fit connector={name!r}: give {reduction.meaning}.")
    if reduction is None:
        return None, None
    given = options.get(reduction.option)
    return reduction, reduction.default if given is None else given


def connector_downsampling(name: str, **options: Any) -> Downsampling:
    """The steps that a connector adds to those of its encoder: none, or one.

    Args:
        name: Key of `CONNECTORS`.
        options: `connector_grid` and `connector_factor`, as in `LlavaStyleConfig`.
    """
    reduction, value = _reduction(name, options)
    return [] if reduction is None else [reduction.step(value)]


def model_downsampling(config) -> Downsampling:
    """Steps from pixels to image tokens of a whole `LlavaStyleConfig`: those of the encoder, then the connector's.

    The image processor of the model has to have the same ones (`downsampling`).
    """
    options = {option: getattr(config, option) for option in _OPTIONS}
    return encoder_downsampling(config.vision_config) + connector_downsampling(config.connector, **options)


class ConnectorLinear(nn.Linear):
    """Layer `index` of a connector, which draws PyTorch's default `nn.Linear` distribution from the connector's seed.

    All layers of a connector share one stream of random numbers, in order, as if they had been made one after the
    other behind `torch.manual_seed(seed)`. A layer replays the stream up to its own place, so that it can be filled
    alone when Transformers loads a checkpoint without it.

    Args:
        widths: Width of the tap and then of each layer's output.
        index: Place of this layer.
        seed: Seed of the stream.
    """

    def __init__(self, widths: tuple[int, ...], index: int, seed: int):
        self.widths, self.index, self.seed = widths, index, seed
        super().__init__(widths[index], widths[index + 1])
        # Transformers leaves a module with this flag alone; on the meta device there is something left to fill
        self._is_hf_initialized = not self.weight.is_meta

    def reset_parameters(self) -> None:
        """Called by `nn.Linear.__init__`, which would else draw from the global random state."""
        if not self.weight.is_meta:
            with torch.no_grad():
                for parameter, value in zip((self.weight, self.bias), self.draw(), strict=True):
                    parameter.copy_(value)

    def draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Initial weight [out, in] and bias [out] in float32 on the CPU, the same for every device and dtype."""
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        gain = math.sqrt(2.0 / (1 + math.sqrt(5) ** 2))  # in the arithmetic of torch.nn.init, to agree bit for bit
        for fan_in, fan_out in zip(self.widths[: self.index + 1], self.widths[1 : self.index + 2], strict=True):
            weight = torch.empty(fan_out, fan_in, dtype=torch.float32, device="cpu")
            bias = torch.empty(fan_out, dtype=torch.float32, device="cpu")
            bound = math.sqrt(3.0) * (gain / math.sqrt(fan_in))
            weight.uniform_(-bound, bound, generator=generator)
            bound = 1 / math.sqrt(fan_in)
            bias.uniform_(-bound, bound, generator=generator)
        return weight, bias


class Connector(nn.Module):
    """Maps tap features of width in_features to language model embeddings of width out_features.

    `reduce` makes fewer tokens, calling the module is the MLP. The initial weights depend on the seed and the widths
    alone: the global random state is neither read nor advanced.

    Args:
        name: Key of `CONNECTORS`.
        in_features: Width of the tap.
        out_features: Width of the language model.
        seed: Seed of the initial weights; None means `in_features`, the rule of the paper's code.
        options: `connector_grid` and `connector_factor`, as in `LlavaStyleConfig`.

    Raises:
        ValueError: The name is not in `CONNECTORS`, or an option does not belong to it.
    """

    def __init__(self, name: str, in_features: int, out_features: int, seed: int | None = None, **options: Any):
        super().__init__()
        self.reduction, self.reduction_value = _reduction(name, options)
        self.name = name
        self.in_features = in_features
        self.out_features = out_features
        mlp_in = in_features if self.reduction is None else self.reduction.width(in_features, self.reduction_value)
        widths = (mlp_in, *CONNECTORS[name][1](mlp_in, out_features))
        seed = in_features if seed is None else seed
        self.layers = nn.ModuleList(ConnectorLinear(widths, index, seed) for index in range(len(widths) - 1))

    def reduce(self, features: Sequence[torch.Tensor], grids: Sequence[tuple[int, int]] | None) -> list[torch.Tensor]:
        """n tensors [h_i * w_i, C], row by row, to n tensors [h'_i * w'_i, width of the MLP], row by row.

        Args:
            grids: Rows and columns (h_i, w_i) of each image; None will do where all tokens are kept.
        """
        if self.reduction is None:
            return list(features)
        if grids is None:
            raise ValueError(f"connector={self.name!r} needs the grid of each image, its rows and columns.")
        reduced: dict[int, torch.Tensor] = {}
        for grid in dict.fromkeys(grids):
            same = [index for index, other in enumerate(grids) if other == grid]
            maps = torch.stack([features[index] for index in same]).transpose(1, 2).unflatten(2, grid)  # [n, C, h, w]
            maps = self.reduction.reduce(maps, self.reduction_value)  # [n, C', h', w']
            for index, tokens in zip(same, maps.flatten(2).transpose(1, 2), strict=True):
                reduced[index] = tokens
        return [reduced[index] for index in range(len(features))]

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.layers[0](features)  # [..., width of layer 0]
        for layer in self.layers[1:]:
            hidden = layer(nn.functional.gelu(hidden))
        return hidden  # [..., out_features]


def _description(model) -> tuple[Connector, dict]:
    """The connector of a LLaVA-style model and what has to agree before other weights may take its place."""
    connector = model.connector
    return connector, {
        "connector": connector.name,
        "in_features": connector.in_features,
        "out_features": connector.out_features,
        "tap_norm": model.config.tap_norm,
        **({} if connector.reduction is None else {connector.reduction.option: connector.reduction_value}),
    }


def save_connector(model, directory: str | os.PathLike) -> None:
    """Write the connector alone, as `connector.safetensors` and `connector_config.json`.

    Args:
        model: A `LlavaStyleModel` or `LlavaStyleForConditionalGeneration`.
        directory: Made if absent. Each file appears whole or not at all.
    """
    connector, description = _description(model)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in connector.state_dict().items()}
    weights, config = directory / WEIGHTS_NAME, directory / CONFIG_NAME
    save_file(state, weights.with_suffix(".tmp"), metadata={"format": "pt"})
    config.with_suffix(".tmp").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    os.replace(weights.with_suffix(".tmp"), weights)
    os.replace(config.with_suffix(".tmp"), config)


def load_connector(model, directory: str | os.PathLike) -> None:
    """Load what `save_connector` wrote into the connector of `model`, in place, keeping its dtype and device.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The saved connector is of another kind, width or tap norm, or its tensors do not fit.
    """
    connector, expected = _description(model)
    directory = Path(directory)
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} holds no {name}: give a folder that save_connector wrote.")
    found = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    wrong = [
        f"{key} is {found.get(key)!r}, not {value!r}" for key, value in expected.items() if found.get(key) != value
    ]
    if wrong:
        raise ValueError(f"The connector in {directory} does not fit this model: {'; '.join(wrong)}.")
    state = load_file(directory / WEIGHTS_NAME)
    own = connector.state_dict()
    if state.keys() != own.keys():
        raise ValueError(
            f"{directory / WEIGHTS_NAME} holds the tensors {sorted(state)}, the model needs {sorted(own)}."
        )
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{name} in {directory / WEIGHTS_NAME} has shape {list(tensor.shape)}, the model needs "
                f"{list(own[name].shape)}."
            )
    connector.load_state_dict(state)
