"""Compiled inference gives what the encoder gives, and leaves it as it was."""

import pytest
import torch
from torch import nn
from transformers import AutoBackbone

from ssm_vlm import compile_for_inference, get_named_encoder
from ssm_vlm.eval.benchmark_contenders import build_encoder
from ssm_vlm.modeling import inference

TOYS = ["digit_vmamba.digitscenes_64", "digit_vit.digitscenes_64", "digit_dwconv.digitscenes_64"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def toy(name: str, device: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    encoder = build_encoder(name)
    with torch.no_grad():
        for parameter in encoder.parameters():  # biases too
            parameter += 0.02 * torch.randn_like(parameter)
    return encoder.to(device, dtype)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TOYS)
def test_outputs_agree_at_every_size_and_do_not_overwrite_each_other(name, device):
    encoder = toy(name, device)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    ready = compile_for_inference(encoder)
    pixels = [torch.randn(batch, 3, height, width, device=device) for batch, height, width in
              ((1, 64, 64), (2, 64, 64), (1, 32, 48), (1, 64, 64))]  # fmt: skip
    found = [ready(picture) for picture in pixels]
    for picture, output in zip(pixels, found, strict=True):
        assert not output.feature_maps[-1].requires_grad
        with torch.no_grad():
            expected = encoder(picture).feature_maps[-1]
        assert error(output.feature_maps[-1], expected) <= 1e-5
    assert all(torch.equal(before[key], value) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize("name", TOYS)
def test_bfloat16_is_no_less_exact_than_without(name):
    encoder, pixels = toy(name, "cpu"), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = encoder(pixels).feature_maps[-1]
        plain = encoder.bfloat16()(pixels.bfloat16()).feature_maps[-1]
    found = compile_for_inference(encoder)(pixels.bfloat16()).feature_maps[-1]
    assert found.dtype == torch.bfloat16
    assert error(found.float(), expected) <= max(2e-2, 1.5 * error(plain.float(), expected))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_one_dnn_does_not_multiply_runs_as_it_is(dtype, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    encoder, pixels = toy(TOYS[0], "cpu", dtype), torch.randn(1, 3, 64, 64, dtype=dtype)
    ready = compile_for_inference(encoder)
    with torch.no_grad():
        assert torch.equal(ready(pixels).feature_maps[-1], encoder(pixels).feature_maps[-1])


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("supported", [True, False])
def test_bfloat16_is_packed_where_the_processor_has_it(supported, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    linear = torch.nn.Linear(1, 1)
    assert inference._is_packable(linear) and not inference._is_packable(torch.nn.Linear(1, 1).half())
    assert inference._is_packable(linear.bfloat16()) is supported


@pytest.mark.parametrize("family", ["vit_small_patch16.augreg_in1k_224", "swin_small.in1k_224"])
def test_activations_of_stock_mlps_are_taken_in_once(family):
    config = get_named_encoder(family).config()
    small = getattr(config, "vision_config", config)
    for field, value in {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 2}.items():
        if family.startswith("vit"):
            setattr(small, field, value)
    if family.startswith("swin"):
        small.embed_dim, small.num_heads, small.depths = 12, [1, 1, 1, 1], [1, 1, 1, 1]
    encoder = AutoBackbone.from_config(config).eval()
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = encoder(pixels).feature_maps[-1]
    assert error(compile_for_inference(encoder)(pixels).feature_maps[-1], expected) <= 1e-5


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("flaw", ["no bias", "no activation"])
def test_a_flaw_in_packing_is_noticed(flaw, monkeypatch):
    real = inference.PackedLinear.__init__

    def flawed(self, linear, gelu):
        real(self, linear, gelu and flaw != "no activation")
        if flaw == "no bias":
            self.bias = None

    encoder, pixels = toy(TOYS[0], "cpu"), torch.randn(1, 3, 64, 64)
    monkeypatch.setattr(inference.PackedLinear, "__init__", flawed)
    with torch.no_grad():
        expected = encoder(pixels).feature_maps[-1]
    assert error(compile_for_inference(encoder)(pixels).feature_maps[-1], expected) > 1e-3


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match="in eval"):
        compile_for_inference(toy(TOYS[0], "cpu").train())


@pytest.mark.slow
def test_torch_compile_takes_the_whole_encoder():
    encoder, pixels = toy(TOYS[0], "cpu"), torch.randn(1, 3, 64, 64)
    compiled = torch.compile(encoder, backend="aot_eager")
    with torch.no_grad():
        assert error(compiled(pixels).feature_maps[-1], encoder(pixels).feature_maps[-1]) <= 1e-5
