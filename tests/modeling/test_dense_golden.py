"""ViTDet and ViT-Adapter held to outputs of their published code on random weights, at every tap.

The fixtures hold the reference's state dict under its own names, inputs of square, oblong and odd sizes (of those that
the reference takes), its maps, and gradients of the sum of its maps for `input.0`, each times `grad.cotangent.*`.
"""

import re
from pathlib import Path

import pytest
import torch
from definition_pieces import relative_error
from safetensors.torch import load_file, save_file

from ssm_vlm.modeling.encoder_conversion import convert_published
from ssm_vlm.modeling.encoder_loading import load_encoder
from ssm_vlm.modeling.layouts import LAYOUTS, recognise_layout

FIXTURES = Path(__file__).parent.parent / "fixtures"
PREFIX = {"vitdet": "backbone.net.", "vit_adapter": "backbone."}
TAPS = {"vitdet": [f"block{k}" for k in range(1, 5)], "vit_adapter": [f"stage{k}" for k in range(1, 5)]}
CASES = list(PREFIX)


def published(case):
    return {PREFIX[case] + key: tensor for key, tensor in load_file(FIXTURES / f"{case}.weights.safetensors").items()}


def golden(case):
    return load_file(FIXTURES / f"{case}.io.safetensors")


def whole(case):
    """The converted model with every map among its outputs."""
    tensors = published(case)
    layout = LAYOUTS[recognise_layout(tensors, case)]
    model_class, config = layout.infer(tensors)
    config.out_features = [name for name in config.stage_names if name != "stem"]
    model = model_class(config).eval()
    model.load_state_dict(layout.convert(tensors, config))
    return model


def worst(case, model, dtype=torch.float32, sizes=None):
    """Largest relative error over all taps and sizes, or the sizes given by their indices."""
    io, errors = golden(case), []
    for index in range(sum(key.startswith("input.") for key in io)) if sizes is None else sizes:
        with torch.no_grad():
            maps = model(io[f"input.{index}"].to(dtype)).feature_maps
        expected = [io[f"{tap}.{index}"] for tap in TAPS[case]]
        assert [m.shape for m in maps] == [m.shape for m in expected]
        errors += [relative_error(m, reference.double()) for m, reference in zip(maps, expected, strict=True)]
    return max(errors)


@pytest.mark.parametrize("case", CASES)
def test_every_map_of_every_size(case):
    assert worst(case, whole(case)) <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_bf16(case):
    assert worst(case, whole(case).bfloat16(), torch.bfloat16) <= 2e-2


@pytest.mark.parametrize("case", CASES)
def test_gradients(case):
    io, model = golden(case), whole(case)
    pixels = io["input.0"].clone().requires_grad_()
    maps = model(pixels).feature_maps
    sum((m * io[f"grad.cotangent.{tap}"]).sum() for m, tap in zip(maps, TAPS[case], strict=True)).backward()
    assert relative_error(pixels.grad, io["grad.input"].double()) <= 1e-4
    theirs = {
        PREFIX[case] + key.removeprefix("grad.param."): t for key, t in io.items() if key.startswith("grad.param.")
    }
    converted = LAYOUTS[case].convert(theirs, model.config)
    parameters = dict(model.named_parameters())
    assert set(converted) == set(parameters)
    for key, gradient in converted.items():
        assert relative_error(parameters[key].grad, gradient.double()) <= 1e-3, key


@pytest.mark.parametrize("case", CASES)
def test_any_two_tensors_exchanged_are_noticed(case):
    """The mutation twin: of each kind of tensor, the first is exchanged with the next of its shape."""
    tensors, model, kinds = published(case), whole(case), {}
    for key, tensor in tensors.items():
        kinds.setdefault(re.sub(r"\d+", "#", key), []).append((key, tensor))
    pairs = []
    for members in kinds.values():
        key, tensor = members[0]
        pairs += [(key, other) for other, twin in members[1:] if twin.shape == tensor.shape and twin.ndim][:1]
    assert len(pairs) > 10
    for one, other in pairs:
        swapped = tensors | {one: tensors[other], other: tensors[one]}
        model.load_state_dict(LAYOUTS[case].convert(swapped, model.config))
        assert worst(case, model, sizes=[1]) > 1e-4, (one, other)


@pytest.mark.parametrize("case", CASES)
def test_at_every_tap_of_the_converted_folder(case, tmp_path):
    save_file(published(case), tmp_path / "file.safetensors")
    convert_published(tmp_path / "file.safetensors", tmp_path / "folder")
    io = golden(case)
    for tap in TAPS[case]:
        tapped = load_encoder(tmp_path / "folder", tap=tap)
        with torch.no_grad():
            (features,) = tapped(io["input.1"]).feature_maps
        assert relative_error(features, io[f"{tap}.1"].double()) <= 1e-5
