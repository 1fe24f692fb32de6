"""MaxViT held to outputs of timm on random weights: every tap, logits, gradients, bf16, and files that do not fit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, TimmWrapperForImageClassification

from ssm_vlm.modeling.encoder_conversion import convert_published
from ssm_vlm.modeling.encoder_loading import load_encoder
from ssm_vlm.modeling.modeling_tapped_timm import TappedTimmBackbone
from ssm_vlm.modeling.timm_backbones import names_in_whole

pytestmark = pytest.mark.timm

FIXTURES = Path(__file__).parents[1] / "fixtures"
WEIGHTS = FIXTURES / "maxvit_tf.weights.safetensors"
TAPS = ["stem", "stage1", "stage2", "stage3", "stage4"]


@pytest.fixture(scope="module")
def golden():
    return load_file(FIXTURES / "maxvit_tf.io.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return convert_published(WEIGHTS, tmp_path_factory.mktemp("maxvit") / "whole").folder


def error(ours, expected):
    return ((ours - expected).abs().max() / expected.abs().max()).item()


def features(encoder, pixels):
    with torch.no_grad():
        return encoder(pixels).feature_maps[-1]


@pytest.mark.parametrize("tap", TAPS)
def test_every_tap(folder, golden, tap):
    encoder = load_encoder(folder, tap=tap)
    assert isinstance(encoder, TappedTimmBackbone) and encoder.config.out_features == [tap]
    expected = golden[f"feature{TAPS.index(tap)}.0"]
    assert error(features(encoder, golden["input.0"]), expected) < 1e-4
    assert encoder.channels == [expected.shape[1]] == [encoder.config.hidden_size]


def test_logits(folder, golden):
    whole = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert type(whole) is TimmWrapperForImageClassification and whole.config.num_labels == 10
    with torch.no_grad():
        assert error(whole(golden["input.0"]).logits, golden["logits.0"]) < 1e-4


def test_bf16(folder, golden):
    encoder = load_encoder(folder, tap="stage3").to(torch.bfloat16)
    assert error(features(encoder, golden["input.0"].bfloat16()).float(), golden["feature3.0"]) < 2e-2


def gradient_error(whole, golden):
    """The largest error of the gradients of all parameters that the fixture holds, each in terms of its own size."""
    whole.zero_grad()
    (whole(golden["input.0"]).logits * golden["grad.cotangent"]).sum().backward()
    expected = {key[len("grad.param.") :]: value for key, value in golden.items() if key.startswith("grad.param.")}
    ours = {key.removeprefix("timm_model."): value.grad for key, value in whole.named_parameters()}
    assert len(expected) > 150
    # a bias before a norm of batch statistics or a softmax has a gradient that is zero but for rounding
    largest = max(value.abs().max() for value in expected.values())
    return max(
        (ours[key] - value).abs().max() / max(value.abs().max(), 1e-4 * largest) for key, value in expected.items()
    ).item()


def test_gradients(folder, golden):
    assert gradient_error(AutoModelForImageClassification.from_pretrained(folder).eval(), golden) < 1e-3


def test_gradients_reach_what_the_tap_needs(folder, golden):
    """The tapped model's gradients are those of the whole model's feature map."""
    whole = AutoModelForImageClassification.from_pretrained(folder).eval().timm_model
    tapped = load_encoder(folder, tap="stage3")
    cotangent = torch.randn(golden["feature3.0"].shape, generator=torch.Generator().manual_seed(0))
    maps = whole.forward_intermediates(golden["input.0"], indices=[3], intermediates_only=True)
    (maps[0] * cotangent).sum().backward()
    (tapped(golden["input.0"]).feature_maps[-1] * cotangent).sum().backward()
    theirs = {key: value.grad for key, value in whole.named_parameters() if value.grad is not None}
    names = names_in_whole(tapped)
    ours = {names[key]: value.grad for key, value in tapped.named_parameters()}
    assert theirs.keys() == ours.keys()
    assert all(error(ours[key], theirs[key]) < 1e-3 for key in theirs)


def blocks(encoder):
    return encoder.timm_model["stages_2"].blocks


def exchange_window_and_grid(encoder):
    for block in blocks(encoder):
        block.attn_block, block.attn_grid = block.attn_grid, block.attn_block


def forget_relative_positions(encoder):
    for block in blocks(encoder):
        nn.init.zeros_(block.attn_grid.attn.rel_pos.relative_position_bias_table)


def forget_statistics(encoder):
    encoder.timm_model["stem"].norm1.reset_running_stats()


def use_batch_statistics(encoder):
    encoder.train()


def use_exact_gelu(encoder):
    for block in blocks(encoder):
        block.conv.norm1.act = nn.GELU()


def turn_pictures(encoder):
    for block in blocks(encoder):
        kernel = block.conv.conv2_kxk.weight
        kernel.data = kernel.data.transpose(2, 3).contiguous()


@pytest.mark.parametrize(
    "mutate",
    [
        exchange_window_and_grid,
        forget_relative_positions,
        forget_statistics,
        use_batch_statistics,
        use_exact_gelu,
        turn_pictures,
    ],
)
def test_a_mutant_fails(folder, golden, mutate):
    encoder = load_encoder(folder, tap="stage3")
    mutate(encoder)
    assert error(features(encoder, golden["input.0"]), golden["feature3.0"]) > 1e-4


def test_a_mutant_fails_in_its_gradients(folder, golden):
    whole = AutoModelForImageClassification.from_pretrained(folder).eval()
    table = whole.timm_model.stages[2].blocks[1].attn_grid.attn.rel_pos.relative_position_bias_table
    table.data *= 0.9
    assert gradient_error(whole, golden) > 1e-3


def test_nothing_after_the_tap(folder):
    """Neither kept nor computed."""
    sizes = [sum(p.numel() for p in load_encoder(folder, tap=tap).parameters()) for tap in TAPS]
    assert sizes == sorted(set(sizes))
    encoder = load_encoder(folder)
    assert encoder.config.out_features == ["stage3"]
    assert list(dict(encoder.timm_model.named_children())) == ["stem", "stages_0", "stages_1", "stages_2"]


@pytest.mark.parametrize(("height", "width"), [(128, 64), (64, 192)])
def test_canvases_of_whole_windows(folder, height, width):
    """Held to timm's own model, which keeps its window of 4 cells."""
    whole = AutoModelForImageClassification.from_pretrained(folder).eval().timm_model
    pixels = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = whole.stages[2](whole.stages[1](whole.stages[0](whole.stem(pixels))))
    assert error(features(load_encoder(folder), pixels), expected) < 1e-5


@pytest.mark.parametrize(("tap", "height", "width", "multiple"), [("stage3", 96, 128, 64), ("stage4", 128, 192, 128)])
def test_other_canvases_are_refused(folder, tap, height, width, multiple):
    sentence = (
        f"maxvit_tiny_tf_224, tapped at {tap}, takes canvases whose height and width are multiples of {multiple} "
        f"pixels, got {height}x{width}."
    )
    with pytest.raises(ValueError, match=sentence):
        load_encoder(folder, tap=tap)(torch.zeros(1, 3, height, width))


def test_its_pictures_fit(folder):
    """No named encoder has this size of windows: the canvas is the one that they are for."""
    size = AutoImageProcessor.from_pretrained(folder).size
    assert (size.height, size.width) == (128, 128)
    features(load_encoder(folder), torch.zeros(1, 3, 128, 128))


def test_a_tapped_folder_reloads(folder, golden, tmp_path):
    encoder = load_encoder(folder, tap="stage2")
    encoder.save_pretrained(tmp_path)
    reloaded = load_encoder(tmp_path)
    assert reloaded.config.out_features == ["stage2"]
    assert all(torch.equal(value, reloaded.state_dict()[key]) for key, value in encoder.state_dict().items())
    assert error(features(reloaded, golden["input.0"]), features(encoder, golden["input.0"])) < 1e-6


class TestFilesThatDoNotFit:
    def refused(self, tmp_path, change, *parts):
        weights = load_file(WEIGHTS)
        change(weights)
        save_file(weights, tmp_path / "broken.safetensors")
        with pytest.raises(ValueError) as caught:
            convert_published(tmp_path / "broken.safetensors", tmp_path / "out")
        assert all(part in str(caught.value) for part in parts), caught.value
        assert not (tmp_path / "out").exists()

    def test_a_missing_tensor(self, tmp_path):
        key = "stages.2.blocks.1.attn_grid.attn.qkv.bias"
        self.refused(tmp_path, lambda weights: weights.pop(key), "lacks", key)

    def test_an_unknown_tensor(self, tmp_path):
        self.refused(tmp_path, lambda weights: weights.update(extra=torch.ones(2)), "undeclared", "extra")

    def test_another_shape(self, tmp_path):
        key = "stages.3.blocks.0.attn_block.mlp.fc1.bias"
        self.refused(tmp_path, lambda weights: weights.update({key: torch.ones(3)}), "another shape", key, "(3,)")

    def test_another_variant(self, tmp_path):
        with pytest.raises(ValueError, match=r"lacks .*stages.0\.blocks\.1.*\(16,\) instead of \(64,\)"):
            convert_published(WEIGHTS, tmp_path / "out", "maxvit_tiny.in1k_224")


def test_a_bin_file(folder, golden, tmp_path):
    torch.save(load_file(WEIGHTS), tmp_path / "pytorch_model.bin")
    converted = convert_published(tmp_path / "pytorch_model.bin", tmp_path / "whole")
    assert converted.layout == "timm_maxvit" and converted.discarded == [] and converted.names == []
    encoder = load_encoder(converted.folder, tap="stage4")
    assert error(features(encoder, golden["input.0"]), golden["feature4.0"]) < 1e-4


def test_the_golden_model_is_the_published_one_but_narrower():
    """What the fixture was made with is what timm's maxvit_tiny_tf is made with."""
    from timm.models.maxxvit import model_cfgs

    ours, published = json.loads((FIXTURES / "maxvit_tf.json").read_text())["cfg"], model_cfgs["maxvit_tiny_tf"]
    for part in ("conv_cfg", "transformer_cfg"):
        theirs = {key: value for key, value in vars(getattr(published, part)).items() if key in ours[part]}
        assert {key: ours[part][key] for key in theirs if key != "dim_head"} == {
            key: value for key, value in theirs.items() if key != "dim_head"
        }
