"""Strips of a map give what the whole map gives, and only where nobody needs the whole."""

import pytest
import torch
from torch import Tensor

from ssm_vlm import SSMVisionBackbone, SSMVisionConfig
from ssm_vlm.modeling import strips
from ssm_vlm.modeling.mixers import SelectiveScan2dMixer
from ssm_vlm.modeling.strips import in_strips

STRIP = 5


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(strips, "STRIP", STRIP)


class Doubled(torch.nn.Module):
    """Notes how many positions come at a time."""

    def __init__(self):
        super().__init__()
        self.inside = torch.nn.Identity()
        self.seen: list[int] = []

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        self.seen.append(x.shape[:-1].numel())
        return torch.cat([x, gate[..., :1] * x], dim=-1)


def maps(*shape: int) -> tuple[Tensor, Tensor]:
    both = torch.randn(*shape, 6)  # as halves of a projection are: strided
    return both[..., :3], both[..., 3:]


@pytest.mark.parametrize("shape", [(1, 4, 5), (2, 3, 7), (1, 1, 41)])
@torch.no_grad()
def test_strips_give_the_whole(shape):
    function, (x, gate) = Doubled(), maps(*shape)
    found = in_strips(function, function, x, gate)
    assert max(function.seen) == STRIP and sum(function.seen) == x.shape[:-1].numel()
    assert torch.equal(found, Doubled()(x, gate))


def test_small_maps_and_gradients_keep_the_map_whole():
    for shape, grad in (((1, 1, strips.MIN_STRIPS * STRIP - 1), False), ((2, 5, 8), True)):
        function = Doubled()
        with torch.set_grad_enabled(grad):
            in_strips(function, function, *maps(*shape))
        assert len(function.seen) == 1


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "accelerate"])
@torch.no_grad()
def test_whoever_watches_a_module_inside_sees_whole_maps(kind):
    function = Doubled()
    if kind == "accelerate":
        function.inside._hf_hook = object()
    else:
        getattr(function.inside, kind)(lambda *_: None)
    in_strips(function, function, *maps(2, 5, 8))
    assert len(function.seen) == 1


@torch.no_grad()
def test_a_hook_keeps_what_the_convolution_gave():
    mixer, kept = SelectiveScan2dMixer(SSMVisionConfig(hidden_sizes=[8], depths=[1]), 0, 0), []
    mixer.init_parameters(SSMVisionConfig(hidden_sizes=[8], depths=[1]))
    mixer.conv.register_forward_hook(lambda _, __, out: kept.append((out, out.clone())))
    mixer(torch.randn(1, 4, 4, 8))
    assert torch.equal(*kept[0])


@torch.no_grad()
def test_compiled_and_exported_programs_take_any_size():
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return in_strips(self, torch.relu, x)

    side = torch.export.Dim("side", min=2, max=64)
    program = torch.export.export(Module(), (torch.randn(1, 7, 7, 3),), dynamic_shapes={"x": {1: side, 2: side}})
    traced = torch.jit.trace(Module(), torch.randn(1, 7, 7, 3), check_trace=False)
    x = torch.randn(1, 9, 9, 3)
    assert torch.equal(program.module()(x), x.relu()) and torch.equal(traced(x), x.relu())


@pytest.mark.parametrize("gated", [False, True])
def test_an_encoder_in_strips_gives_what_it_gives_whole(gated):
    config = SSMVisionConfig(hidden_sizes=[12, 16], depths=[1, 1], gated=gated, mlp_ratio=2.0)
    encoder, pixels = SSMVisionBackbone(config).eval(), torch.randn(2, 3, 40, 28)
    whole = encoder(pixels).feature_maps[-1]
    with torch.no_grad():
        found = encoder(pixels).feature_maps[-1]
    assert not torch.equal(found, torch.zeros_like(found))
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_stochastic_depth_still_drops_whole_pictures():
    config = SSMVisionConfig(hidden_sizes=[8], depths=[2], mixer="identity", drop_path_rate=0.9)
    block = SSMVisionBackbone(config).train().stages[0].blocks[1]
    x = torch.randn(8, 6, 6, 8)
    changed = (block(x) != x).flatten(1)
    assert all(picture.all() or not picture.any() for picture in changed.unbind())
