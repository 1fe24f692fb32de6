"""Connectors: their distribution and seed, that they leave the global random state alone, and saving them alone."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText, ConvNextConfig, LlamaConfig

from ssm_vlm import LlavaStyleConfig, LlavaStyleForConditionalGeneration, load_connector, save_connector
from ssm_vlm.modeling.connectors import CONNECTORS, Connector

# widths by hand, for a tap of 6 channels and a language model of 10; pixel shuffle puts 2 x 2 tokens into one
WIDTHS = {
    "linear": [6, 10],
    "mlp2": [6, 10, 10],
    "mlp3": [6, 24, 10, 10],
    "average_pool_linear": [6, 10],
    "average_pool_mlp2": [6, 10, 10],
    "average_pool_mlp3": [6, 24, 10, 10],
    "pixel_shuffle_linear": [24, 10],
    "pixel_shuffle_mlp2": [24, 10, 10],
    "pixel_shuffle_mlp3": [24, 96, 10, 10],
}


def tiny_config(**fields) -> LlavaStyleConfig:
    vision = ConvNextConfig(
        hidden_sizes=[4, 6], depths=[1, 1], num_stages=2, out_features=["stage2"], image_size=16, patch_size=4
    )
    text = LlamaConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlavaStyleConfig(vision_config=vision, text_config=text, image_token_id=19, **fields)


def tiny_model(**fields) -> LlavaStyleForConditionalGeneration:
    return LlavaStyleForConditionalGeneration(tiny_config(**fields)).eval()


def pytorch_default(widths: list[int], seed: int) -> list[nn.Linear]:
    """Linear layers as torch makes them, one after the other behind a global seed: the way of the paper's code."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return [nn.Linear(i, o) for i, o in zip(widths[:-1], widths[1:], strict=True)]


@pytest.mark.parametrize("seed", [None, 0, 123])
@pytest.mark.parametrize("name", CONNECTORS)
def test_weights_are_pytorchs_default_behind_the_seed(name, seed):
    connector = Connector(name, 6, 10, seed)
    expected = pytorch_default(WIDTHS[name], 6 if seed is None else seed)
    for layer, reference in zip(connector.layers, expected, strict=True):
        assert torch.equal(layer.weight, reference.weight)
        assert torch.equal(layer.bias, reference.bias)


@pytest.mark.parametrize("name", CONNECTORS)
def test_forward_is_linear_layers_with_exact_gelu_between(name):
    layers = pytorch_default(WIDTHS[name], 6)
    between = [module for layer in layers for module in (nn.GELU(), layer)][1:]
    features = torch.randn(2, 3, WIDTHS[name][0])
    assert torch.allclose(Connector(name, 6, 10)(features), nn.Sequential(*between)(features), atol=1e-6)


@pytest.mark.parametrize("name", CONNECTORS)
def test_global_random_state_is_left_alone(name):
    before = torch.get_rng_state()
    Connector(name, 6, 10)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_connector_changes_nothing_else():
    states = {}
    for name in CONNECTORS:
        torch.manual_seed(3)
        model = tiny_model(connector=name)
        others = {k: v for k, v in model.state_dict().items() if not k.startswith("connector.")}
        states[name] = (others, torch.get_rng_state())
    reference, rng = states.pop("linear")
    for others, other_rng in states.values():
        assert torch.equal(other_rng, rng)
        assert all(torch.equal(others[key], value) for key, value in reference.items())


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="connector='mlp4' is not known: choose one of linear, mlp2, mlp3"):
        tiny_model(connector="mlp4")


@pytest.mark.parametrize("missing", ["connector.", "connector.layers.1.", "connector.layers.1.bias"])
def test_a_checkpoint_without_connector_gets_the_seeded_one(tmp_path, missing):
    """The parts that a checkpoint lacks come from the seed, the parts that it holds are kept."""
    model = tiny_model(connector_seed=5)
    fresh = {k: v.clone() for k, v in model.connector.state_dict(prefix="connector.").items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    kept = {key: value for key, value in saved.items() if not key.startswith(missing)}
    assert len(kept) < len(saved)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})

    rng = torch.get_rng_state()
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict()
    assert torch.equal(torch.get_rng_state(), rng)
    for key, value in loaded.items():
        assert torch.equal(value, kept[key] if key in kept else fresh[key]), key


def test_connector_alone_goes_to_another_model(tmp_path):
    source, target = tiny_model(connector_seed=1), tiny_model(connector_seed=2).to(torch.bfloat16)
    target.language_model.requires_grad_(False)
    save_connector(source, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["connector.safetensors", "connector_config.json"]
    tower_before = {k: v.clone() for k, v in target.vision_tower.state_dict().items()}
    load_connector(target, tmp_path)
    for loaded, expected in zip(target.connector.parameters(), source.connector.parameters(), strict=True):
        assert loaded.dtype == torch.bfloat16 and loaded.requires_grad
        assert torch.equal(loaded, expected.to(torch.bfloat16))
    assert all(torch.equal(v, tower_before[k]) for k, v in target.vision_tower.state_dict().items())


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"connector": "mlp3"}, "connector is 'mlp3', not 'mlp2'"),
        ({"tap_norm": "layernorm"}, "tap_norm is 'layernorm', not 'none'"),
    ],
)
def test_a_connector_of_another_kind_is_refused(tmp_path, saved, message):
    save_connector(tiny_model(**saved), tmp_path)
    model = tiny_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"does not fit this model: {message}"):
        load_connector(model, tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_connector_of_another_width_is_refused(tmp_path):
    save_connector(tiny_model(), tmp_path)
    config = json.loads((tmp_path / "connector_config.json").read_text())
    (tmp_path / "connector_config.json").write_text(json.dumps({**config, "in_features": 7}))
    with pytest.raises(ValueError, match="in_features is 7, not 6"):
        load_connector(tiny_model(), tmp_path)


def test_wrong_tensors_are_refused(tmp_path):
    save_connector(tiny_model(), tmp_path)
    weights = tmp_path / "connector.safetensors"
    state = load_file(weights)
    save_file({**state, "layers.1.weight": torch.zeros(8, 9)}, weights)
    with pytest.raises(ValueError, match=r"layers.1.weight .* has shape \[8, 9\], the model needs \[8, 8\]"):
        load_connector(tiny_model(), tmp_path)
    save_file({k: v for k, v in state.items() if k != "layers.1.bias"}, weights)
    with pytest.raises(ValueError, match=r"holds the tensors .* the model needs .*layers.1.bias"):
        load_connector(tiny_model(), tmp_path)


def test_a_folder_without_connector_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no connector.safetensors: give a folder that save_connector"):
        load_connector(tiny_model(), tmp_path)
