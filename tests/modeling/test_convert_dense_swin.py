"""Swin as detectors and segmenters train it, under mmdetection's names and under Microsoft's.

The oracle is the definition, in float64, on a file in mmdetection's names: attention between all pairs of positions
with what is not in the same window masked out, and patches merged by unfolding, as mmdetection merges them.
"""

import itertools
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers import AutoImageProcessor, SwinBackbone, SwinConfig

from ssm_vlm import cli, load_encoder
from ssm_vlm.configuration.encoder_entry import IN1K_224, NamedEncoder, WeightSource
from ssm_vlm.configuration.named_encoders import ENCODERS
from ssm_vlm.configuration.taps import tap_norm, tapped_config
from ssm_vlm.modeling import convert_swin
from ssm_vlm.modeling.encoder_loading import tap_whole
from ssm_vlm.modeling.published_weights import read_published

WIDTH, DEPTHS, HEADS, WINDOW, PATCH = 8, [2, 1, 3], [1, 2, 4], 4, 4
SIZES = [(64, 64), (52, 90), (17, 130)]  # square; maps to be padded; fewer rows than a window


def mm_file(dtype=torch.float64):
    """Random weights of an encoder under mmdetection's names, without prefix."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape, mean=0.0, scale=0.3):
        return mean + scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {}

    def linear(name, rows, columns, bias=True):
        tensors[f"{name}.weight"] = random(rows, columns)
        if bias:
            tensors[f"{name}.bias"] = random(rows)

    def norm(name, width):
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = random(width, mean=1.0), random(width)

    linear("patch_embed.projection", WIDTH, 3 * PATCH * PATCH)
    tensors["patch_embed.projection.weight"] = tensors["patch_embed.projection.weight"].view(WIDTH, 3, PATCH, PATCH)
    norm("patch_embed.norm", WIDTH)
    for stage, (depth, heads) in enumerate(zip(DEPTHS, HEADS, strict=True)):
        width = WIDTH * 2**stage
        for block in (f"stages.{stage}.blocks.{index}" for index in range(depth)):
            norm(f"{block}.norm1", width)
            tensors[f"{block}.attn.w_msa.relative_position_bias_table"] = random((2 * WINDOW - 1) ** 2, heads, scale=1)
            tensors[f"{block}.attn.w_msa.relative_position_index"] = torch.zeros(
                WINDOW**2, WINDOW**2, dtype=torch.int64
            )
            linear(f"{block}.attn.w_msa.qkv", 3 * width, width)
            linear(f"{block}.attn.w_msa.proj", width, width)
            norm(f"{block}.norm2", width)
            linear(f"{block}.ffn.layers.0.0", 4 * width, width)
            linear(f"{block}.ffn.layers.1", width, 4 * width)
        if stage < len(DEPTHS) - 1:
            norm(f"stages.{stage}.downsample.norm", 4 * width)
            linear(f"stages.{stage}.downsample.reduction", 2 * width, 4 * width, bias=False)
        norm(f"norm{stage}", width)
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}


def places(size, shift):
    """Of each row (or column) of a padded side: its place after the cyclic shift, and the region that it belongs to."""
    shifted = (torch.arange(size) - shift) % size
    regions = (shifted >= size - WINDOW).long() + (shifted >= size - shift).long() if shift else 0 * shifted
    return shifted, regions


def attention(x, weights, heads, shift):
    """x: [H, W, C], normed."""
    height, width, channels = x.shape
    x = functional.pad(x, (0, 0, 0, -width % WINDOW, 0, -height % WINDOW))
    padded = x.shape[:2]
    (rows, row_regions), (columns, column_regions) = (places(size, shift) for size in padded)
    y, x_place = (grid.flatten() for grid in torch.meshgrid(rows, columns, indexing="ij"))
    regions = (row_regions[:, None] * 3 + column_regions).flatten()

    def same(values):
        return values[:, None] == values[None]

    together = same(y // WINDOW) & same(x_place // WINDOW) & same(regions)
    index = (y[:, None] - y + WINDOW - 1) * (2 * WINDOW - 1) + x_place[:, None] - x_place + WINDOW - 1
    table = weights["relative_position_bias_table"]
    bias = table[index.clamp(0, len(table) - 1)].permute(2, 0, 1)  # [heads, N, N]
    qkv = functional.linear(x.flatten(0, 1), weights["qkv.weight"], weights["qkv.bias"])
    q, k, v = qkv.view(len(qkv), 3, heads, -1).permute(1, 2, 0, 3)  # each [heads, N, c]
    scores = (q @ k.mT / q.shape[-1] ** 0.5 + bias).masked_fill(~together, -torch.inf)
    mixed = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
    mixed = functional.linear(mixed, weights["proj.weight"], weights["proj.bias"])
    return mixed.view(*padded, channels)[:height, :width]


def definition(tensors, pixels):
    """The normed map [C, H, W] of each stage, for one picture [3, H, W]."""

    def part(prefix):
        return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}

    def norm(x, name):
        return functional.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps=1e-5)

    def linear(x, name):
        return functional.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    height, width = pixels.shape[1:]
    pixels = functional.pad(pixels, (0, -width % PATCH, 0, -height % PATCH))
    projection = part("patch_embed.projection.")
    x = functional.conv2d(pixels[None], projection["weight"], projection["bias"], stride=PATCH)[0].permute(1, 2, 0)
    x, maps = norm(x, "patch_embed.norm"), []
    for stage, (depth, heads) in enumerate(zip(DEPTHS, HEADS, strict=True)):
        for index in range(depth):
            block = f"stages.{stage}.blocks.{index}"
            shift = WINDOW // 2 if index % 2 else 0
            x = x + attention(norm(x, f"{block}.norm1"), part(f"{block}.attn.w_msa."), heads, shift)
            hidden = functional.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.ffn.layers.0.0"))
            x = x + linear(hidden, f"{block}.ffn.layers.1")
        maps.append(norm(x, f"norm{stage}").permute(2, 0, 1))
        if stage < len(DEPTHS) - 1:
            x = functional.pad(x, (0, 0, 0, x.shape[1] % 2, 0, x.shape[0] % 2))
            grid = x.shape[0] // 2, x.shape[1] // 2
            x = functional.unfold(x.permute(2, 0, 1)[None], 2, stride=2)[0].mT  # [N, 4 C]
            x = linear(norm(x, f"stages.{stage}.downsample.norm"), f"stages.{stage}.downsample.reduction")
            x = x.view(*grid, -1)
    return maps


def release_names(tensors):
    """As Microsoft's own detection code names and orders them: the slices of a neighbourhood stacked by columns."""
    renamed = {}
    for key, tensor in tensors.items():
        if "downsample" in key:
            by_place = tensor.unflatten(-1, (-1, 4))[..., [0, 2, 1, 3]]  # of rows first -> of columns first
            tensor = by_place.mT.flatten(-2).contiguous()
        for old, new in (
            ("projection", "proj"),
            ("stages", "layers"),
            ("w_msa.", ""),
            ("ffn.layers.0.0", "mlp.fc1"),
            ("ffn.layers.1", "mlp.fc2"),
        ):
            key = key.replace(old, new)
        renamed[key] = tensor
    return renamed


NAMES = {"mm": lambda tensors: tensors, "release": release_names}
HEADS_OF = {"mm": ("decode_head.conv_seg.weight", "neck.lateral_convs.0.conv.weight"), "release": ("roi_head.x",)}


def write(file, names="mm", prefix="backbone.", dtype=torch.float32, tensors=None):
    tensors = NAMES[names](mm_file(dtype) if tensors is None else tensors)
    tensors = {prefix + key: tensor for key, tensor in tensors.items()}
    if prefix:
        tensors |= {name: torch.ones(2) for name in HEADS_OF[names]}
    torch.save({"state_dict": tensors, "meta": {"epoch": 12}}, file)
    return file


@pytest.fixture(params=itertools.product(NAMES, ("backbone.", "")), ids=lambda param: "-".join(param).rstrip("-."))
def file(request, tmp_path):
    names, prefix = request.param
    return write(tmp_path / "detector.pth", names, prefix)


def tapped(file, tap, dtype=torch.float32):
    published = read_published(file)
    return tap_whole(published.tensors, published.model_class, tapped_config(published.config, tap), "file").to(dtype)


def error(actual, expected):
    assert actual.shape == expected.shape
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("size", SIZES)
def test_every_tap_is_as_defined(file, size):
    pixels = torch.randn(3, *size, dtype=torch.float64)
    for stage, expected in enumerate(definition(mm_file(), pixels), start=1):
        model = tapped(file, f"stage{stage}")
        with torch.no_grad():
            assert error(model(pixels[None].float()).feature_maps[-1][0], expected) <= 1e-5
            assert error(model.bfloat16()(pixels[None].bfloat16()).feature_maps[-1][0], expected) <= 8e-2


def test_every_gradient_is_as_defined(tmp_path):
    """Converting only renames and reorders: converted gradients are the gradients of what was converted."""
    file, tensors = write(tmp_path / "a.pth", dtype=torch.float64), mm_file()
    parameters = {key: t.requires_grad_() for key, t in tensors.items() if t.is_floating_point()}
    pixels = torch.randn(3, 52, 90, dtype=torch.float64)
    maps = definition(tensors, pixels)
    cotangents = [torch.randn_like(feature_map) for feature_map in maps]
    sum((m * c).sum() for m, c in zip(maps, cotangents, strict=True)).backward()
    gradients = {key: parameter.grad for key, parameter in parameters.items()}

    published = read_published(file)
    model = published.model_class(published.config).double().eval()
    model.load_state_dict(published.tensors)
    found = model(pixels[None]).feature_maps
    sum((m[0] * c).sum() for m, c in zip(found, cotangents, strict=True)).backward()
    expected = read_published(write(tmp_path / "gradients.pth", tensors=gradients)).tensors
    for key, parameter in model.named_parameters():
        if key.startswith("swin.layernorm."):
            assert parameter.grad is None  # no feature map passes it
        else:
            largest = max(expected[key].abs().max(), 1.0)  # that of the bias of keys is 0
            assert (parameter.grad - expected[key]).abs().max() <= 1e-10 * largest, key


MUTATIONS = {
    "not reordered": lambda tensor: tensor,
    "rows and columns exchanged": lambda tensor: tensor.unflatten(-1, (-1, 2, 2)).movedim(-3, -1).flatten(-3),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_another_order_of_channels_is_told(mutation, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_swin, "_merged_by_slices", MUTATIONS[mutation])
    pixels = torch.randn(3, 64, 64, dtype=torch.float64)
    expected = definition(mm_file(), pixels)
    file = write(tmp_path / "detector.pth")
    with torch.no_grad():
        found = [tapped(file, f"stage{stage}")(pixels[None].float()).feature_maps[-1][0] for stage in (1, 2)]
    assert error(found[0], expected[0]) <= 1e-5 and error(found[1], expected[1]) > 1e-2


def test_the_command_makes_a_backbone_with_trained_norms(tmp_path, capsys):
    file = write(tmp_path / "detector.pth")
    assert cli.main(["convert", str(file), "--output", str(tmp_path / "out")]) == 0
    whole, encoder = SwinBackbone.from_pretrained(tmp_path / "out"), load_encoder(tmp_path / "out", tap="stage2")
    assert whole.out_features == ["stage1", "stage2", "stage3"] and encoder.out_features == ["stage2"]
    assert tap_norm(whole.config) == tap_norm(encoder.config) == "trained"
    assert encoder.hidden_states_norms["stage2"].weight.requires_grad
    pixels = torch.randn(3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        assert error(encoder(pixels[None].float()).feature_maps[-1][0], definition(mm_file(), pixels)[1]) <= 1e-5
    encoder.save_pretrained(tmp_path / "tapped")
    again = load_encoder(tmp_path / "tapped")
    assert torch.equal(again.hidden_states_norms["stage2"].weight, encoder.hidden_states_norms["stage2"].weight)
    assert again.hidden_states_norms["stage2"].weight.requires_grad
    assert SwinBackbone.from_pretrained(tmp_path / "tapped").config.output_norm == "layernorm"
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").downsampling


@pytest.fixture
def named(monkeypatch):
    """A tiny classifier in the table, of the same architecture but for the norm."""
    config = SwinConfig(embed_dim=WIDTH, depths=DEPTHS, num_heads=HEADS, window_size=WINDOW, image_size=64)
    encoder = NamedEncoder(
        "swin_toy.in1k", partial(tapped_config, config, "stage2"), IN1K_224, 1, 1, "MIT", WeightSource("swin", url="x")
    )
    monkeypatch.setitem(ENCODERS, encoder.name, encoder)
    return encoder.name


def test_it_is_not_the_classifier_of_the_same_shapes(named, tmp_path, capsys):
    file = write(tmp_path / "detector.pth")
    assert cli.main(["convert", str(file), "--output", str(tmp_path / "out"), "--encoder", named]) == 1
    told = capsys.readouterr().err
    assert "another architecture: output_norm 'layernorm' instead of 'parameter_free'" in told
    assert not (tmp_path / "out").exists()


WRONG = {
    "another head": (lambda t: t | {"text_encoder.weight": torch.ones(1)}, "has undeclared text_encoder.weight"),
    "no reduction": (
        lambda t: {k: v for k, v in t.items() if "0.downsample.reduction" not in k},
        "lacks swin.encoder.layers.0.downsample.reduction.weight",
    ),
    "another width": (
        lambda t: t | {"backbone.norm1.weight": torch.ones(5)},
        "another shape for hidden_states_norms.stage2.weight (5,) instead of (16,)",
    ),
    "a norm too many": (lambda t: t | {"backbone.norm5.weight": torch.ones(5)}, "holds a norm of stage 6, but only 3"),
    "a name twice": (lambda t: t | {"norm1.weight": torch.ones(16)}, "both with and without 'backbone.'"),
    "no norms": (lambda t: {k: v for k, v in t.items() if "backbone.norm" not in k}, "in none of the layouts that are"),
    "an odd merging": (
        lambda t: t | {"backbone.stages.0.downsample.norm.weight": torch.ones(30)},
        "looks like 'swin' but cannot be read as that",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_files_that_do_not_fit(case, tmp_path):
    change, message = WRONG[case]
    tensors = torch.load(write(tmp_path / "a.pth"), weights_only=True)["state_dict"]
    save_file(change(tensors), tmp_path / "file.safetensors")
    with pytest.raises(ValueError) as refusal:
        read_published(tmp_path / "file.safetensors")
    assert message in str(refusal.value) and "file.safetensors" in str(refusal.value)
