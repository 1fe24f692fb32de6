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

from ssm_vlm import (
    SSMVisionBackbone,
    SSMVisionForImageClassification,
    SSMVisionModel,
    load_encoder,
)
from ssm_vlm.modeling import mixers
from ssm_vlm.modeling.convert_vmamba import VMAMBA_LAYOUT
from ssm_vlm.modeling.encoder_conversion import convert_published
from ssm_vlm.modeling.mixers import SelectiveScan2dMixer
from ssm_vlm.modeling.published_weights import read_published

FIXTURES = Path(__file__).parents[1] / "fixtures"
CLASSIFIERS = ["vmamba_v2_ratio2", "vmamba_v2_ratio1", "vmamba_v0"]
BACKBONES = ["vmamba_v2_ratio2_backbone", "vmamba_v0_backbone"]
STAGES = ["stage1", "stage2", "stage3", "stage4"]
FORWARD_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3


@functools.cache
def golden(case):
    weights = load_file(FIXTURES / f"{case}.weights.safetensors")
    return weights, load_file(FIXTURES / f"{case}.io.safetensors")


def config_of(weights):
    return VMAMBA_LAYOUT.infer(weights)[1]


def build(case):
    weights, _ = golden(case)
    model_class, config = VMAMBA_LAYOUT.infer(weights)
    assert model_class is (SSMVisionBackbone if case in BACKBONES else SSMVisionForImageClassification)
    model = model_class(config)
    model.load_state_dict(VMAMBA_LAYOUT.convert(weights, config))
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
    gradients = {key.removeprefix(prefix): value for key, value in io.items() if key.startswith(prefix)}
    reference = VMAMBA_LAYOUT.convert(gradients, model.config)
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
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


@pytest.mark.parametrize("backend", ["cpp", "chunked", "naive"], indirect=True)
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


@pytest.mark.parametrize("backend", ["cpp", "chunked"], indirect=True)
@cases
def test_gradients_equal_reference(case, backend, monkeypatch):
    monkeypatch.setenv("SSM_VLM_SCAN_BACKEND", backend)
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
    config = config_of(golden(case)[0])
    assert config.depths == made_with["depths"]
    assert config.hidden_sizes == [made_with["dims"] * 2**stage for stage in range(4)]
    assert (config.d_state, config.ssm_ratio) == (made_with["ssm_d_state"], made_with["ssm_ratio"])
    assert (config.mlp_ratio, config.conv_bias) == (made_with["mlp_ratio"], made_with["ssm_conv_bias"])
    assert config.gated == (made_with["forward_type"] == "v0")
    assert config.stem == {"v1": "conv4", "v2": "conv3x2"}[made_with["patchembed_version"]]
    assert config.downsample == {"v1": "patch_merge", "v3": "conv3"}[made_with["downsample_version"]]
    assert config.output_norm == ("layernorm" if "out_indices" in made_with else "parameter_free")
    assert config.out_features == (STAGES if "out_indices" in made_with else ["stage4"])
    assert case in BACKBONES or config.num_labels == made_with["num_classes"]


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


def respell(case, spelling):
    """Contents of a file as VMamba publishes it: tensors beside bookkeeping, a dense file's heads among them."""
    respelled = dict(spelling(key, tensor) for key, tensor in golden(case)[0].items())
    if spelling is dense_file:
        heads = {"decode_head.conv_seg.weight": torch.zeros(1), "roi_head.bbox_head.fc_cls.bias": torch.zeros(2)}
        return {"state_dict": respelled | heads, "meta": {"epoch": 12}}
    return {"model": respelled, "epoch": 222}


def as_folder(contents, tmp_path):
    torch.save(contents, tmp_path / "published.pth")
    return convert_published(tmp_path / "published.pth", tmp_path / "folder").folder


@pytest.mark.parametrize("case, spelling", spelled_cases, ids=lambda value: getattr(value, "__name__", value))
def test_every_spelling_of_the_keys_gives_the_same_folder_and_outputs(case, spelling, tmp_path):
    folder = as_folder(respell(case, spelling), tmp_path)
    model_class = SSMVisionBackbone if case in BACKBONES else SSMVisionForImageClassification
    model = model_class.from_pretrained(folder).eval()
    expected = build(case)
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(tensor, expected.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert forward_error(model, case, 1) <= FORWARD_TOLERANCE


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


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", BACKBONES)
@torch.no_grad()
def test_every_tap_of_a_converted_dense_file(case, stage, tmp_path):
    folder = as_folder(respell(case, dense_file), tmp_path)
    io, number = golden(case)[1], int(stage[-1])
    by_class = SSMVisionBackbone.from_pretrained(folder, out_features=[stage]).eval()
    for encoder in (by_class, load_encoder(folder, tap=stage)):
        assert encoder.out_features == [stage] and list(encoder.output_norms) == [stage]
        assert len(encoder.stages) == number
        (output,) = encoder(io["input.1"]).feature_maps
        assert relative_error(output, io[f"{stage}.1"]) <= FORWARD_TOLERANCE
        # the twin: without the trained norm of this very stage
        encoder.output_norms[stage].reset_parameters()
        (output,) = encoder(io["input.1"]).feature_maps
        assert relative_error(output, io[f"{stage}.1"]) > 10 * FORWARD_TOLERANCE


@pytest.mark.parametrize("stage", STAGES)
@torch.no_grad()
def test_every_tap_of_a_converted_classification_file_has_a_norm_without_parameters(stage, tmp_path):
    folder = as_folder(respell("vmamba_v2_ratio2", released_names), tmp_path)
    classifier = SSMVisionForImageClassification.from_pretrained(folder).eval()
    pixel_values = golden("vmamba_v2_ratio2")[1]["input.1"]
    raw = classifier.model.stage_outputs(pixel_values)[int(stage[-1])]  # [B, H, W, C]
    expected = torch.nn.functional.layer_norm(raw, raw.shape[-1:]).permute(0, 3, 1, 2)
    by_class = SSMVisionBackbone.from_pretrained(folder, out_features=[stage]).eval()
    for encoder in (by_class, load_encoder(folder, tap=stage)):
        assert encoder.config.output_norm == "parameter_free" and not encoder.output_norms.state_dict()
        assert relative_error(encoder(pixel_values).feature_maps[-1], expected) <= 1e-6


@torch.no_grad()
def test_the_sequence_model_reads_a_converted_folder(tmp_path):
    case = "vmamba_v2_ratio2_backbone"
    folder = as_folder(respell(case, dense_file), tmp_path)
    io = golden(case)[1]
    model = SSMVisionModel.from_pretrained(folder, out_features=["stage3"]).eval()
    output = model(io["input.2"]).last_hidden_state
    assert relative_error(output, io["stage3.2"].flatten(2).transpose(1, 2)) <= FORWARD_TOLERANCE


def save(weights, tmp_path):
    torch.save({"model": weights}, tmp_path / "file.pth")
    return tmp_path / "file.pth"


def test_any_depths_and_widths_are_read_off_the_shapes(tmp_path):
    weights, _ = golden("vmamba_v2_ratio2")
    deeper = {key.replace("layers.2.blocks.0", "layers.2.blocks.2"): tensor for key, tensor in weights.items()}
    assert read_published(save(weights | deeper, tmp_path)).config.depths == [1, 1, 3, 1]
    shallow = {key: tensor for key, tensor in weights.items() if not key.startswith(("layers.3", "classifier"))}
    shallow = {key: tensor for key, tensor in shallow.items() if not key.startswith("layers.2.downsample")}
    published = read_published(save(shallow, tmp_path))
    assert published.model_class is SSMVisionBackbone and published.config.hidden_sizes == [8, 16, 32]


@pytest.mark.parametrize(
    "key", ["layers.0.blocks.0.op.gate.weight", "patch_embed.3.weight", "layers.0.downsample.7.bias", "necks.0"]
)
def test_an_unknown_key_is_named(key, tmp_path):
    weights, _ = golden("vmamba_v2_ratio1")
    with pytest.raises(ValueError, match=f"does not fit: it has undeclared {key}."):
        read_published(save(weights | {key: torch.zeros(1)}, tmp_path))


@pytest.mark.parametrize(
    "key", ["patch_embed.0.weight", "layers.1.blocks.0.norm.weight", "layers.0.blocks.0.op.in_proj.weight"]
)
def test_a_broken_file_is_told(key, tmp_path):
    weights, _ = golden("vmamba_v2_ratio1")
    message = f"cannot be read as that: The file is not a whole VMamba encoder: it lacks {key}"
    with pytest.raises(ValueError, match=message):
        read_published(save({k: v for k, v in weights.items() if k != key}, tmp_path))


def test_a_missing_tensor_and_another_shape_are_named(tmp_path):
    weights, _ = golden("vmamba_v2_ratio1")
    weights = {key: tensor for key, tensor in weights.items() if key != "layers.3.blocks.0.norm2.bias"}
    weights["patch_embed.2.bias"] = torch.zeros(9)
    message = (
        r"lacks model\.stages\.3\.blocks\.0\.norm2\.bias; it has another shape for model\.stem\.norm1\.bias \(9,\)"
    )
    with pytest.raises(ValueError, match=message):
        read_published(save(weights, tmp_path))
