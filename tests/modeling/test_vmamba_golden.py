"""Our encoder against tensors that VMamba's own code returned (`tests/fixtures/vmamba_*`): outputs and gradients.

Every comparison has a twin with a broken encoder that must fail it: no scan, two directions exchanged, no skip.
"""

import functools
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ssm_vlm import SSMVisionBackbone, SSMVisionForImageClassification, SSMVisionModel
from ssm_vlm.modeling import mixers
from ssm_vlm.modeling.convert_vmamba import (
    convert_vmamba_state_dict,
    infer_vmamba_config,
    load_vmamba_state_dict,
)
from ssm_vlm.modeling.mixers import SelectiveScan2dMixer

FIXTURES = Path(__file__).parents[1] / "fixtures"
CLASSIFIERS = ["vmamba_v2_ratio2", "vmamba_v2_ratio1", "vmamba_v0"]
BACKBONES = ["vmamba_v2_ratio2_backbone", "vmamba_v0_backbone"]
STAGES = ["stage1", "stage2", "stage3", "stage4"]
FORWARD_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3


@functools.cache
def golden(case):
    weights = load_file(FIXTURES / f"{case}.weights.safetensors")
    return weights, load_file(FIXTURES / f"{case}.io.safetensors")


def build(case):
    weights, _ = golden(case)
    if case in BACKBONES:
        model = SSMVisionBackbone(infer_vmamba_config(weights, out_features=STAGES))
    else:
        model = SSMVisionForImageClassification(infer_vmamba_config(weights))
    assert load_vmamba_state_dict(model, weights) == []
    return model.eval()


def relative_error(ours, reference):
    assert ours.shape == reference.shape
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def outputs_and_names(model, case, index):
    """Our outputs for `input.{index}` and the names of what they should equal."""
    pixel_values = golden(case)[1][f"input.{index}"]
    if case in BACKBONES:
        return model(pixel_values).feature_maps, [f"{stage}.{index}" for stage in STAGES]
    return [model(pixel_values).logits], [f"logits.{index}"]


@torch.no_grad()
def forward_error(model, case, index):
    ours, names = outputs_and_names(model, case, index)
    return max(relative_error(output, golden(case)[1][name]) for output, name in zip(ours, names, strict=True))


def gradient_error(model, case):
    """Largest error over the parameters, each relative to its own largest gradient; checks that all are compared."""
    io = golden(case)[1]
    outputs, names = outputs_and_names(model, case, 0)
    suffixes = [f".{k}" for k in range(4)] if case in BACKBONES else [""]
    sum(
        (output * io[f"grad.cotangent{suffix}"]).sum() for output, suffix in zip(outputs, suffixes, strict=True)
    ).backward()
    prefix = "grad.param."
    reference = convert_vmamba_state_dict({k.removeprefix(prefix): v for k, v in io.items() if k.startswith(prefix)})
    ours = {name.removeprefix("model."): parameter.grad for name, parameter in model.named_parameters()}
    assert ours.keys() == reference.keys()
    return max(relative_error(ours[name], reference[name]) for name in ours)


def skip_only(x, dt_low_rank, b, c, dt_weight, dt_bias, a_log, d, **kwargs):
    """The selective scan with the scan deleted; the other inputs keep a zero gradient."""
    silent = sum(0.0 * tensor.sum() for tensor in (dt_low_rank, b, c, dt_weight, dt_bias, a_log))
    return x * d.sum(0) + silent


def delete_scan(model, monkeypatch):
    monkeypatch.setattr(mixers, "selective_scan_2d", skip_only)


def exchange(first, second):
    def mutate(model, monkeypatch):
        order = list(range(4))
        order[first], order[second] = second, first
        scan = mixers.selective_scan_2d

        def exchanged(x, dt_low_rank, b, c, dt_weight, dt_bias, a_log, d):
            maps = (tensor[:, :, :, order] for tensor in (dt_low_rank, b, c))
            return scan(x, *maps, dt_weight[order], dt_bias[order], a_log[order], d)

        monkeypatch.setattr(mixers, "selective_scan_2d", exchanged)

    return mutate


@torch.no_grad()
def zero_skip(model, monkeypatch):
    for module in model.modules():
        if isinstance(module, SelectiveScan2dMixer):
            module.d.zero_()


MUTATIONS = {
    "scan deleted": delete_scan,
    "row and column order exchanged": exchange(0, 1),
    "reversed orders exchanged": exchange(2, 3),
    "rows exchanged with reversed rows": exchange(0, 2),
    "skip zeroed": zero_skip,
}
mutations = pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS.keys())
cases = pytest.mark.parametrize("case", CLASSIFIERS + BACKBONES)
indexed_cases = pytest.mark.parametrize(
    "case, index", [(case, index) for case in CLASSIFIERS + BACKBONES for index in range(2 if "v0" in case else 3)]
)


@pytest.mark.parametrize("backend", ["chunked", "naive"])
@indexed_cases
def test_forward_equals_reference(case, index, backend, monkeypatch):
    monkeypatch.setenv("SSM_VLM_SCAN_BACKEND", backend)
    assert forward_error(build(case), case, index) <= FORWARD_TOLERANCE


@mutations
@indexed_cases
def test_forward_comparison_catches(case, index, mutation, monkeypatch):
    model = build(case)
    mutation(model, monkeypatch)
    assert forward_error(model, case, index) > 10 * FORWARD_TOLERANCE


@cases
def test_gradients_equal_reference(case):
    assert gradient_error(build(case), case) <= GRADIENT_TOLERANCE


@mutations
@cases
def test_gradient_comparison_catches(case, mutation, monkeypatch):
    model = build(case)
    mutation(model, monkeypatch)
    assert gradient_error(model, case) > 10 * GRADIENT_TOLERANCE


@cases
def test_configuration_is_read_off_the_shapes(case):
    made_with = json.loads((FIXTURES / f"{case}.json").read_text())["constructor"]
    config = infer_vmamba_config(golden(case)[0])
    assert config.depths == made_with["depths"]
    assert config.hidden_sizes == [made_with["dims"] * 2**stage for stage in range(4)]
    assert (config.d_state, config.ssm_ratio) == (made_with["ssm_d_state"], made_with["ssm_ratio"])
    assert (config.mlp_ratio, config.conv_bias) == (made_with["mlp_ratio"], made_with["ssm_conv_bias"])
    assert config.gated == (made_with["forward_type"] == "v0")
    assert config.stem == {"v1": "conv4", "v2": "conv3x2"}[made_with["patchembed_version"]]
    assert config.downsample == {"v1": "patch_merge", "v3": "conv3"}[made_with["downsample_version"]]
    assert config.output_norm == ("layernorm" if "out_indices" in made_with else "none")


def newest_names(key, tensor):
    """The single-file model: projections of all directions as one linear layer."""
    key = key.replace("x_proj_weight", "x_proj.weight").replace("dt_projs_weight", "dt_projs.weight")
    return key, tensor.flatten(0, 1) if key.endswith(
        ("x_proj.weight", "dt_projs.weight")
    ) and tensor.dim() == 3 else tensor


def released_names(key, tensor):
    """The released files: one matrix per direction."""
    if key.endswith(("x_proj.weight", "dt_projs.weight")):
        return key.replace("proj.weight", "proj_weight").replace("projs.weight", "projs_weight"), tensor.unflatten(
            0, (4, -1)
        )
    return key, tensor


def convolutions(key, tensor):
    """Linear layers stored as 1x1 convolutions, as by the channel-first models."""
    linear = key.endswith(("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight"))
    return key, tensor[:, :, None, None] if linear else tensor


def oldest_names(key, tensor):
    """The first files of VMamba v0."""
    for new, old in {
        "patch_embed.0.": "patch_embed.proj.",
        "patch_embed.2.": "patch_embed.norm.",
        "downsample.1.": "downsample.norm.",
        "downsample.2.": "downsample.reduction.",
        "classifier.": "",
        ".op.": ".self_attention.",
    }.items():
        key = key.replace(new, old)
    return re.sub(r"(blocks\.\d\.)norm\.", r"\1ln_1.", key), tensor


def dense_file(key, tensor):
    return f"backbone.{key}", tensor


SPELLINGS = [newest_names, released_names, convolutions]
spelled_cases = [(case, spelling) for case in CLASSIFIERS for spelling in SPELLINGS]
spelled_cases += [("vmamba_v0", oldest_names), *((case, dense_file) for case in BACKBONES)]


@pytest.mark.parametrize("case, spelling", spelled_cases, ids=lambda value: getattr(value, "__name__", value))
def test_every_spelling_of_the_keys_loads_alike(case, spelling):
    weights, _ = golden(case)
    respelled = dict(spelling(key, tensor) for key, tensor in weights.items())
    if spelling is dense_file:
        respelled["decode_head.conv_seg.weight"] = torch.zeros(1)
        respelled = {"state_dict": respelled, "meta": {}}
    ours, expected = convert_vmamba_state_dict(respelled), convert_vmamba_state_dict(weights)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in ours)
    assert infer_vmamba_config(respelled).to_dict() == infer_vmamba_config(weights).to_dict()


def test_spellings_differ_from_the_fixture():
    """Each spelling changes at least one fixture, or the test above compares a file with itself."""
    for spelling in [*SPELLINGS, oldest_names, dense_file]:
        assert any(
            any(
                spelling(key, tensor)[0] != key or spelling(key, tensor)[1].shape != tensor.shape
                for key, tensor in golden(case)[0].items()
            )
            for case in CLASSIFIERS
        )


@pytest.mark.parametrize("model_class", [SSMVisionModel, SSMVisionBackbone])
def test_tap_drops_later_stages_and_the_head(model_class):
    weights, io = golden("vmamba_v2_ratio2_backbone")
    config = infer_vmamba_config(weights, out_features=["stage3"])
    model = model_class(config).eval()
    discarded = load_vmamba_state_dict(model, weights)
    assert {key.split(".")[0] + "." + key.split(".")[1] for key in discarded} == {
        "stages.3", "output_norms.stage1", "output_norms.stage2", "output_norms.stage4",
    }  # fmt: skip
    assert not any(name.startswith("stages.3") for name, _ in model.named_parameters())
    with torch.no_grad():
        output = model(io["input.2"])
    expected = io["stage3.2"]
    if model_class is SSMVisionModel:
        expected = expected.flatten(2).transpose(1, 2)
        output = output.last_hidden_state
    else:
        (output,) = output.feature_maps
    assert relative_error(output, expected) <= FORWARD_TOLERANCE


def test_classifier_file_into_a_backbone_discards_exactly_the_head():
    weights, _ = golden("vmamba_v2_ratio1")
    discarded = load_vmamba_state_dict(SSMVisionBackbone(infer_vmamba_config(weights)), weights)
    assert sorted(discarded) == ["classifier.bias", "classifier.weight", "norm.bias", "norm.weight"]


def test_other_variant_is_refused_by_name():
    weights, _ = golden("vmamba_v2_ratio2")
    other, _ = golden("vmamba_v2_ratio1")
    model = SSMVisionForImageClassification(infer_vmamba_config(weights))
    with pytest.raises(
        ValueError, match=r"of another shape: .*mixer\.x_proj_weight \(\[4, 3, 8\] in the file, \[4, 3, 16\]"
    ):
        load_vmamba_state_dict(model, other)
    with pytest.raises(ValueError, match=r"does not fit .* missing: model\.stem\.conv1\.weight"):
        load_vmamba_state_dict(model, {k: v for k, v in weights.items() if k != "patch_embed.0.weight"})
    deeper = infer_vmamba_config(weights, depths=[1, 1, 1, 1])
    with pytest.raises(ValueError, match=r"unexpected: model\.stages\.2\.blocks\.1\.mlp\.fc1"):
        load_vmamba_state_dict(SSMVisionForImageClassification(deeper), weights)


@pytest.mark.parametrize(
    "key", ["layers.0.blocks.0.op.gate.weight", "patch_embed.3.weight", "layers.0.downsample.7.bias"]
)
def test_unknown_key_is_named(key):
    with pytest.raises(ValueError, match=f"Not keys of a VMamba checkpoint: {key}"):
        convert_vmamba_state_dict(golden("vmamba_v2_ratio1")[0] | {key: torch.zeros(1)})


def test_file_of_another_model_is_refused():
    with pytest.raises(ValueError, match="holds no VMamba encoder"):
        infer_vmamba_config({"blocks.0.attn.qkv.weight": torch.zeros(1)})
