"""Our MambaVision against tensors that the published package returned (`tests/fixtures/mambavision*`).

Every comparison has a twin with a broken model that must fail it.
"""

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ssm_vlm.configuration.configuration_mambavision import MambaVisionConfig
from ssm_vlm.modeling import modeling_mambavision
from ssm_vlm.modeling.convert_mambavision import MAMBAVISION_LAYOUT
from ssm_vlm.modeling.modeling_mambavision import (
    MambaVisionAttention,
    MambaVisionBackbone,
    MambaVisionBlock,
    MambaVisionForImageClassification,
    MambaVisionMixer,
    MambaVisionWindowStage,
)

FIXTURES = Path(__file__).parents[1] / "fixtures"
CASES = [("mambavision", 0), ("mambavision_layer_scale", 0), ("mambavision_layer_scale", 1)]
"""A square picture; then with LayerScale, an odd depth and scans that remember, a non-square and an odd picture."""

LEVELS = ["stage1_downsampled", "stage2_downsampled", "stage3_downsampled", "stage4"]
FORWARD_TOLERANCE, GRADIENT_TOLERANCE, BF16_TOLERANCE = 1e-4, 1e-3, 2e-2


@functools.cache
def golden(case):
    """Weights, inputs and outputs, and the constructor's arguments."""
    files = (load_file(FIXTURES / f"{case}.{kind}.safetensors") for kind in ("weights", "io"))
    return *files, json.loads((FIXTURES / f"{case}.json").read_text())["constructor"]


def whole_config(case, **changes):
    """Read off the shapes, except for what no shape shows."""
    weights, _, made_with = golden(case)
    _, config = MAMBAVISION_LAYOUT.infer(weights)
    unseen = {"num_attention_heads": made_with["num_heads"][2:], "window_sizes": made_with["window_size"][2:]}
    fields = {key: value for key, value in config.to_dict().items() if key not in ("out_indices", "stage_names")}
    return MambaVisionConfig(**(fields | unseen | changes))


def classifier(case):
    config = whole_config(case)
    model = MambaVisionForImageClassification(config)
    model.load_state_dict(MAMBAVISION_LAYOUT.convert(golden(case)[0], config))
    return model.eval()


def backbone(case, **changes):
    """A Backbone with the golden weights of what it has."""
    config = whole_config(case, **changes)
    model = MambaVisionBackbone(config)
    converted = MAMBAVISION_LAYOUT.convert(golden(case)[0], config)
    model.load_state_dict({key: converted[f"model.{key}"] for key in model.state_dict()})
    return model.eval()


def relative_error(ours, reference):
    assert ours.shape == reference.shape
    return ((ours.float() - reference).abs().max() / reference.abs().max()).item()


@torch.no_grad()
def forward_error(model, case, index):
    io = golden(case)[1]
    return relative_error(model(io[f"input.{index}"].to(model.dtype)).logits, io[f"logits.{index}"])


def gradient_error(model):
    """Largest error over all parameters, each relative to its own largest gradient."""
    io = golden("mambavision")[1]
    (model(io["input.0"]).logits * io["grad.cotangent"]).sum().backward()
    prefix = "grad.param."
    published = {key.removeprefix(prefix): value for key, value in io.items() if key.startswith(prefix)}
    reference = MAMBAVISION_LAYOUT.convert(published, model.config)
    assert {key for key, _ in model.named_parameters()} == reference.keys()
    # The layout doubles this bias, so a gradient with respect to it has to be halved instead.
    factor = {key: 0.25 if key.endswith("dt_bias") else 1.0 for key in reference}
    return max(relative_error(p.grad, factor[key] * reference[key]) for key, p in model.named_parameters())


def each(kind, change):
    """A mutation that changes every module of one kind."""

    @torch.no_grad()
    def mutate(model, monkeypatch):
        found = [module for module in model.modules() if isinstance(module, kind)]
        assert found
        for module in found:
            change(module)

    return mutate


def exchange_halves(mixer):
    mixer.conv_scanned.weight.data, mixer.conv_direct.weight.data = mixer.conv_direct.weight, mixer.conv_scanned.weight
    mixer.in_proj.weight.copy_(mixer.in_proj.weight.roll(mixer.inner, dims=0))


def make_causal(mixer):
    for conv in (mixer.conv_scanned, mixer.conv_direct):
        conv.weight.copy_(conv.weight.roll(1, dims=-1))


def delete_scan(model, monkeypatch):
    """The skip alone; other inputs keep a zero gradient."""

    def skip_only(x, dt_low_rank, b, c, dt_weight, dt_bias, a_log, d):
        return x * d + sum(0.0 * tensor.sum() for tensor in (dt_low_rank, b, c, dt_weight, dt_bias, a_log))

    monkeypatch.setattr(modeling_mambavision, "selective_scan_1d", skip_only)


def reverse_scan(model, monkeypatch):
    scan = modeling_mambavision.selective_scan_1d

    def reversed_scan(*inputs):
        return scan(*(tensor.flip(1) for tensor in inputs[:4]), *inputs[4:]).flip(1)

    monkeypatch.setattr(modeling_mambavision, "selective_scan_1d", reversed_scan)


MUTATIONS = {
    "scan deleted": delete_scan,
    "scan reversed": reverse_scan,
    "step bias added once": each(MambaVisionMixer, lambda mixer: mixer.dt_bias.mul_(0.5)),
    "skip zeroed": each(MambaVisionMixer, lambda mixer: mixer.d.zero_()),
    "halves exchanged": each(MambaVisionMixer, exchange_halves),
    "convolutions shifted": each(MambaVisionMixer, make_causal),
    "attention scale off": each(MambaVisionAttention, lambda layer: setattr(layer, "scaling", 2 * layer.scaling)),
    "larger windows": each(
        MambaVisionWindowStage, lambda stage: setattr(stage, "window_size", 2 * stage.window_size + 1)
    ),
    "epsilon of layer norms": each(nn.LayerNorm, lambda norm: setattr(norm, "eps", 1e-3)),
    "activation of the MLPs": each(MambaVisionBlock, lambda block: setattr(block.mlp, "act", nn.ReLU())),
}
SEEN_IN_BF16 = [name for name in MUTATIONS if name not in ("epsilon of layer norms", "attention scale off")]
mutations = pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
cases = pytest.mark.parametrize("case, index", CASES)


@pytest.mark.parametrize("backend", ["chunked", "naive"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@cases
def test_logits_equal_the_published_ones(case, index, attention, backend, monkeypatch):
    monkeypatch.setenv("SSM_VLM_SCAN_BACKEND", backend)
    model = classifier(case)
    model.set_attn_implementation(attention)
    assert forward_error(model, case, index) <= FORWARD_TOLERANCE


@mutations
@cases
def test_comparison_of_logits_catches(case, index, mutation, monkeypatch):
    model = classifier(case)
    mutation(model, monkeypatch)
    # States of the first case decay within about one step, so that its direction of scan shows little.
    enough = 2 if (case, mutation) == ("mambavision", reverse_scan) else 10
    assert forward_error(model, case, index) > enough * FORWARD_TOLERANCE


@cases
@pytest.mark.parametrize("level", range(4))
def test_every_level_is_a_tap(case, index, level):
    """The published levels include their downsampling; the last has none, and here not yet its norm."""
    io = golden(case)[1]
    model = backbone(case, out_features=[LEVELS[level]], final_norm=False)
    with torch.no_grad():
        (features,) = model(io[f"input.{index}"]).feature_maps
    assert relative_error(features, io[f"level{level}.{index}"]) <= FORWARD_TOLERANCE


@torch.no_grad()
@cases
def test_true_stages_lead_to_the_levels(case, index):
    """`stageK` before its downsampling, taken through the published convolution, is level K - 1."""
    weights, io, _ = golden(case)
    model = backbone(case, out_features=["stage1", "stage2", "stage3", "stage4"])
    *maps, last = model(io[f"input.{index}"]).feature_maps
    for level, features in enumerate(maps):
        kernel = weights[f"levels.{level}.downsample.reduction.0.weight"]
        downsampled = nn.functional.conv2d(features, kernel, stride=2, padding=1)
        assert relative_error(downsampled, io[f"level{level}.{index}"]) <= FORWARD_TOLERANCE
    statistics = [weights[f"norm.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
    normed = nn.functional.batch_norm(io[f"level3.{index}"], *statistics)
    assert relative_error(last, normed) <= FORWARD_TOLERANCE
    assert relative_error(last, io[f"level3.{index}"]) > 10 * FORWARD_TOLERANCE


def test_gradients_equal_the_published_ones():
    assert gradient_error(classifier("mambavision")) <= GRADIENT_TOLERANCE


@mutations
def test_comparison_of_gradients_catches(mutation, monkeypatch):
    model = classifier("mambavision")
    mutation(model, monkeypatch)
    assert gradient_error(model) > 10 * GRADIENT_TOLERANCE


def test_bfloat16_is_close():
    """The case of moderate weights: in the other, rounding the picture alone changes stage 3 by more than 2 %."""
    assert bfloat16_error(lambda model: None) <= BF16_TOLERANCE


@pytest.mark.parametrize("mutation", SEEN_IN_BF16)
def test_comparison_in_bfloat16_catches(mutation, monkeypatch):
    assert bfloat16_error(lambda model: MUTATIONS[mutation](model, monkeypatch)) > BF16_TOLERANCE


@torch.no_grad()
def bfloat16_error(mutate):
    """Of stage 3 in bfloat16 against itself in float32, the model in bfloat16 being mutated first."""
    case = "mambavision_layer_scale"
    exact, half = (backbone(case, out_features=["stage3"]) for _ in range(2))
    pixels = golden(case)[1]["input.0"]
    reference = exact(pixels).feature_maps[0]
    mutate(half)
    features = half.bfloat16()(pixels.bfloat16()).feature_maps[0]
    assert features.dtype == torch.bfloat16
    return relative_error(features, reference)
