"""Stock classifiers out of ViT, DeiT, Swin and ConvNeXt files, held to timm at every tap, in logits and gradients.

How the fixtures were made: `tests/fixtures/make_stock_fixtures.py`.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, DeiTForImageClassificationWithTeacher, DeiTModel

from ssm_vlm.configuration.taps import tapped_config
from ssm_vlm.modeling.convert_convnext import CONVNEXT_LAYOUT
from ssm_vlm.modeling.convert_swin import SWIN_LAYOUT
from ssm_vlm.modeling.convert_timm_vit import TIMM_VIT_LAYOUT
from ssm_vlm.modeling.encoder_loading import tap_whole
from ssm_vlm.modeling.layouts import LAYOUTS

FIXTURES = Path(__file__).parent.parent / "fixtures"
CASES = {
    "vit_timm": TIMM_VIT_LAYOUT,
    "vit_deit3": TIMM_VIT_LAYOUT,
    "swin_timm": SWIN_LAYOUT,
    "swin_release": SWIN_LAYOUT,
    "convnext_timm": CONVNEXT_LAYOUT,
    "convnextv2_timm": CONVNEXT_LAYOUT,
}


def weights_of(case):
    return load_file(FIXTURES / f"{case}.weights.safetensors")


def golden(case):
    return load_file(FIXTURES / f"{case}.io.safetensors")


def convert(layout, tensors):
    """Class, config and converted tensors, what the layout discards left out."""
    model_class, config = layout.infer(tensors)
    kept = {key: t for key, t in tensors.items() if not any(re.match(pattern, key) for pattern in layout.discards)}
    return model_class, config, layout.convert(kept, config)


def whole(case, tensors=None):
    model_class, config, converted = convert(CASES[case], weights_of(case) if tensors is None else tensors)
    model = model_class(config).eval()
    model.load_state_dict(converted)  # strict
    return model


def tapped(case, tap, tensors=None):
    model_class, config, converted = convert(CASES[case], weights_of(case) if tensors is None else tensors)
    return tap_whole(converted, model_class, tapped_config(config, tap), case)


def alike_positions(case, index, tensors):
    """Where a ViT sees another size than its own, the fixture's positions are all alike (see how it was made)."""
    if case == "vit_deit3" and index:
        position = tensors["pos_embed"]
        return tensors | {"pos_embed": position.mean(1, keepdim=True).expand_as(position).contiguous()}
    return tensors


def error(actual, expected):
    assert actual.shape == expected.shape
    return ((actual.float() - expected).abs().max() / expected.abs().max()).item()


def normed(case, features):
    """Stock Swin and ConvNeXt put a norm behind every tap; no file holds one, so it is neutral."""
    if case.startswith("vit"):
        return features
    eps = 1e-5 if case.startswith("swin") else 1e-6
    return torch.nn.functional.layer_norm(features.permute(0, 2, 3, 1), features.shape[1:2], eps=eps).permute(
        0, 3, 1, 2
    )


TAPS = [(case, key) for case in CASES for key in sorted(golden(case)) if re.fullmatch(r"(block|stage)\d\.\d", key)]


@pytest.mark.parametrize(("case", "key"), TAPS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_features_at_every_tap(case, key, dtype, tolerance):
    tap, index = key.split(".")
    io = golden(case)
    model = tapped(case, tap, alike_positions(case, int(index), weights_of(case))).to(dtype)
    with torch.no_grad():
        features = model(io[f"input.{index}"].to(dtype)).feature_maps[-1]
    assert features.dtype == dtype
    assert error(features, normed(case, io[key])) <= tolerance


LOGITS = [(case, key) for case in CASES for key in sorted(golden(case)) if key.startswith("logits")]


@pytest.mark.parametrize(("case", "key"), LOGITS)
def test_logits(case, key):
    io, index = golden(case), key.split(".")[1]
    model = whole(case, alike_positions(case, int(index), weights_of(case)))
    fit = {"interpolate_pos_encoding": True} if case == "vit_deit3" and index != "0" else {}
    with torch.no_grad():
        assert error(model(io[f"input.{index}"], **fit).logits, io[key]) <= 1e-4


def timm_gradients(case, model, tensors):
    """Gradients of the stock model's parameters -> those of the file's tensors."""
    mine = {key: parameter.grad for key, parameter in model.named_parameters()}
    _, config, names = convert(CASES[case], {key: torch.full_like(t, 0.0) for key, t in tensors.items()})
    found = {}
    for key, tensor in tensors.items():
        _, _, marked = convert(CASES[case], {k: torch.full_like(t, float(k == key)) for k, t in tensors.items()})
        ours = [name for name in names if marked[name].abs().sum() > 0]
        found[key] = torch.cat([mine[name].reshape(-1, *tensor.shape[1:]) for name in ours]).reshape(tensor.shape)
    return found


@pytest.mark.parametrize("case", ["vit_timm", "swin_timm", "convnext_timm", "convnextv2_timm"])
def test_every_gradient(case):
    io, tensors = golden(case), weights_of(case)
    model = whole(case)
    (model(io["input.0"]).logits * io["grad.cotangent"]).sum().backward()
    actual = timm_gradients(case, model, tensors)
    for key, gradient in actual.items():
        expected = io[f"grad.param.{key}"]
        assert (gradient - expected).abs().max() <= 1e-3 * expected.abs().max(), key


def test_gradients_through_folded_layer_scale():
    """With W' = s W the gradient of W is that of W' times s, and that of s is the sum over rows of W times it."""
    io, tensors = golden("vit_deit3"), weights_of("vit_deit3")
    model = whole("vit_deit3")
    (model(io["input.0"]).logits * io["grad.cotangent"]).sum().backward()
    expected = {key.removeprefix("grad.param."): value for key, value in io.items() if key.startswith("grad.param.")}

    def close(actual, key):
        assert error(actual, expected[key]) <= 1e-3, key

    close(model.vit.embeddings.position_embeddings.grad[:, 1:], "pos_embed")
    for index, layer in enumerate(model.vit.layers):
        for scale, name, linear in (("ls1", "attn.proj", layer.attention.o_proj), ("ls2", "mlp.fc2", layer.mlp.fc2)):
            key = f"blocks.{index}.{name}"
            gamma = tensors[f"blocks.{index}.{scale}.gamma"]
            weight, bias = tensors[f"{key}.weight"], tensors[f"{key}.bias"]
            close(linear.weight.grad * gamma[:, None], f"{key}.weight")
            close(linear.bias.grad * gamma, f"{key}.bias")
            close((linear.weight.grad * weight).sum(1) + linear.bias.grad * bias, f"blocks.{index}.{scale}.gamma")
        close(layer.mlp.fc1.weight.grad, f"blocks.{index}.mlp.fc1.weight")


def scaled(pattern, factor):
    return lambda tensors: {k: t * factor if re.search(pattern, k) else t for k, t in tensors.items()}


def exchanged(one, other):
    return lambda tensors: tensors | {one: tensors[other], other: tensors[one]}


MUTATIONS = {
    "no LayerScale": ("vit_deit3", scaled(r"ls1\.gamma", 2.0)),
    "the other LayerScale": ("vit_deit3", exchanged("blocks.0.ls1.gamma", "blocks.0.ls2.gamma")),
    "positions in another order": ("vit_deit3", lambda t: t | {"pos_embed": t["pos_embed"].flip(1)}),
    "query and key exchanged": ("vit_timm", lambda t: {k: v.roll(32, 0) if "qkv.w" in k else v for k, v in t.items()}),
    "blocks exchanged": ("vit_timm", exchanged("blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc1.weight")),
    "relative positions flipped": (
        "swin_timm",
        lambda t: {k: v.flip(0) if "bias_table" in k else v for k, v in t.items()},
    ),
    "merged patches in another order": (
        "swin_timm",
        lambda t: {k: v.roll(8, 1) if "layers.1.downsample.reduction" in k else v for k, v in t.items()},
    ),
    "kernel transposed": (
        "convnext_timm",
        lambda t: {k: v.mT.contiguous() if "conv_dw.weight" in k else v for k, v in t.items()},
    ),
    "no layer scale": ("convnext_timm", scaled(r"gamma$", 2.0)),
    "no response normalisation": ("convnextv2_timm", scaled(r"grn\.weight", 0.0)),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutants_are_told_from_the_model(mutation):
    case, mutate = MUTATIONS[mutation]
    io = golden(case)
    mutant = whole(case, mutate(weights_of(case)))
    with torch.no_grad():
        assert error(mutant(io["input.0"]).logits, io["logits.0"]) > 1e-3


def test_a_swin_without_shifted_windows_is_told_from_the_model():
    io, model = golden("swin_timm"), tapped("swin_timm", "stage2")
    for module in model.modules():
        if hasattr(module, "shift_size"):
            module.shift_size = 0
    with torch.no_grad():
        assert error(model(io["input.0"]).feature_maps[-1], normed("swin_timm", io["stage2.0"])) > 1e-3


@pytest.mark.parametrize("nested", [False, True])
def test_jax_file_becomes_the_same_model_as_timms(nested):
    arrays = {("opt/target/" if nested else "") + k: v for k, v in np.load(FIXTURES / "vit_jax.npz").items()}
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    model = whole("vit_timm", tensors)
    for key, tensor in whole("vit_timm").state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
    assert model.config.num_attention_heads == 2  # this file does tell


def facebook_names(weights):
    renamed = {}
    for key, tensor in weights.items():
        if ".downsample." in key:
            key = key.replace("stages.", "downsample_layers.").replace(".downsample.", ".")
        key = key.replace("head.norm.", "norm.").replace("head.fc.", "head.").replace("stem.", "downsample_layers.0.")
        key = key.replace(".blocks.", ".").replace(".conv_dw.", ".dwconv.").replace(".mlp.fc", ".pwconv")
        if "grn" in key:
            key = key.replace("mlp.grn.weight", "grn.gamma").replace("mlp.grn.bias", "grn.beta")
            tensor = tensor.view(1, 1, 1, -1)
        renamed[key] = tensor
    return renamed


@pytest.mark.parametrize("case", ["convnext_timm", "convnextv2_timm"])
def test_facebooks_own_names(case):
    theirs = facebook_names(weights_of(case))
    assert CONVNEXT_LAYOUT.recognises(theirs) and not theirs.keys() & weights_of(case).keys()
    io = golden(case)
    with torch.no_grad():
        assert error(whole(case, theirs)(io["input.0"]).logits, io["logits.0"]) <= 1e-4


def test_deit3_files_of_its_own_repository():
    renamed = {re.sub(r"ls([12])\.gamma", r"gamma_\1", k): v for k, v in weights_of("vit_deit3").items()}
    assert TIMM_VIT_LAYOUT.recognises(renamed) and "blocks.0.gamma_1" in renamed
    for key, tensor in whole("vit_deit3").state_dict().items():
        assert torch.equal(whole("vit_deit3", renamed).state_dict()[key], tensor)


def test_distilled_deit():
    weights = weights_of("vit_timm") | {"dist_token": torch.randn(1, 1, 32)}
    weights |= {"head_dist.weight": torch.randn(10, 32), "head_dist.bias": torch.randn(10)}
    weights["pos_embed"] = torch.cat([torch.randn(1, 1, 32), weights["pos_embed"]], dim=1)
    model = whole("vit_timm", weights)
    assert isinstance(model, DeiTForImageClassificationWithTeacher)
    assert torch.equal(model.deit.embeddings.distillation_token, weights["dist_token"])
    pixels = torch.randn(1, 3, 64, 64)
    features = tap_whole(model.state_dict(), type(model), tapped_config(model.config, "block2"), "deit")(pixels)
    tokens = model.deit(pixels, output_hidden_states=True).hidden_states[2][:, 2:]
    assert isinstance(model.deit, DeiTModel)
    assert torch.equal(features.feature_maps[-1], tokens.transpose(1, 2).reshape(1, 32, 4, 4))


@pytest.mark.parametrize("case", CASES)
def test_a_file_without_classifier(case, tmp_path):
    weights = {key: t for key, t in weights_of(case).items() if not re.match(r"head\.(fc\.)?(weight|bias)", key)}
    model = whole(case, weights)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert model.config.num_labels == again.config.num_labels == 0
    assert isinstance(again.classifier, torch.nn.Identity)


@pytest.mark.parametrize("case", CASES)
def test_exactly_one_layout_recognises_it(case):
    weights = weights_of(case)
    assert [name for name, layout in LAYOUTS.items() if layout.recognises(weights)] == [
        name for name, layout in LAYOUTS.items() if layout is CASES[case]
    ]


def test_exactly_one_layout_recognises_jax():
    tensors = {key: torch.from_numpy(array) for key, array in np.load(FIXTURES / "vit_jax.npz").items()}
    assert [name for name, layout in LAYOUTS.items() if layout.recognises(tensors)] == ["timm_vit"]


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("vit_timm", {"pos_embed": torch.zeros(1, 12, 32)}, "pos_embed has 12 positions, which is no square"),
        ("vit_timm", {"pos_embed": None}, "looks like a timm ViT checkpoint, but it holds no pos_embed"),
        ("vit_timm", {"patch_embed.proj.weight": torch.zeros(24, 3, 8, 8)}, "number of heads of this .* width 24"),
        ("swin_timm", {"layers.0.blocks.0.mlp.fc1.weight": None}, "looks like a Swin checkpoint, but it holds no"),
        ("convnext_timm", {"stages.2.blocks.0.norm.weight": None}, "looks like a ConvNeXt checkpoint, but it holds"),
    ],
)
def test_broken_files_are_told(case, change, message):
    weights = {key: t for key, t in (weights_of(case) | change).items() if t is not None}
    assert CASES[case].recognises(weights)
    with pytest.raises(ValueError, match=message):
        CASES[case].infer(weights)


def test_assumed_heads_are_told(caplog):
    whole("vit_timm")
    assert "Width 32 is no multiple of 64: 2 heads of 16 channels are assumed" in caplog.text


@pytest.mark.parametrize("case", CASES)
def test_unknown_tensors_keep_their_names(case):
    _, _, converted = convert(CASES[case], weights_of(case) | {"extra.scale": torch.ones(1)})
    assert "extra.scale" in converted
