"""Connectors: the small MLP between the encoder's tap and the language model."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

WEIGHTS_NAME = "connector.safetensors"
CONFIG_NAME = "connector_config.json"

# Name -> output width of each linear layer, given the widths of the tap and of the language model. GELU stands between
# the layers. Source: paper, "2-MLP" and "3-MLP"; the three-layer one first widens fourfold.
CONNECTORS: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "linear": lambda in_features, out_features: (out_features,),
    "mlp2": lambda in_features, out_features: (out_features, out_features),
    "mlp3": lambda in_features, out_features: (4 * in_features, out_features, out_features),
}


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
    """Maps tap features [..., in_features] to language model embeddings [..., out_features].

    The initial weights depend on the seed and the widths alone: the global random state is neither read nor advanced.

    Args:
        name: Key of `CONNECTORS`.
        in_features: Width of the tap.
        out_features: Width of the language model.
        seed: Seed of the initial weights; None means `in_features`, the rule of the paper's code.

    Raises:
        ValueError: The name is not in `CONNECTORS`.
    """

    def __init__(self, name: str, in_features: int, out_features: int, seed: int | None = None):
        super().__init__()
        if name not in CONNECTORS:
            raise ValueError(f"connector={name!r} is not known: choose one of {', '.join(CONNECTORS)}.")
        self.name = name
        self.in_features = in_features
        self.out_features = out_features
        widths = (in_features, *CONNECTORS[name](in_features, out_features))
        seed = in_features if seed is None else seed
        self.layers = nn.ModuleList(ConnectorLinear(widths, index, seed) for index in range(len(widths) - 1))

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
