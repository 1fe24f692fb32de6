"""timm's Hiera, as the table taps it, held to Transformers' `HieraModel`, whose own Backbone is unusable."""

import pytest
import torch
from transformers import HieraBackbone, HieraConfig, HieraModel

from ssm_vlm.configuration.configuration_tapped_timm import TappedTimmConfig
from ssm_vlm.configuration.named_encoders import ENCODERS
from ssm_vlm.configuration.timm_stages import tapped_timm_config
from ssm_vlm.modeling.modeling_tapped_timm import TappedTimmBackbone

STAGES = ["stage1", "stage2", "stage3", "stage4"]
DEPTHS = [1, 2, 2, 1]
STOCK = HieraConfig(
    embed_dim=8,
    depths=DEPTHS,
    num_heads=[1, 2, 4, 8],
    image_size=[64, 64],
    masked_unit_size=[8, 8],
    out_features=STAGES,
)


def stock_model(model_class):
    torch.manual_seed(0)
    model = model_class(STOCK).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def timm_names(tensors):
    """Stages of a stock Hiera -> blocks counted through, as timm has them."""
    first = [sum(DEPTHS[:stage]) for stage in range(4)]
    renamed = {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        if parts[:2] == ["encoder", "stages"]:
            key = ".".join(["blocks", str(first[int(parts[2])] + int(parts[4])), *parts[5:]])
        key = key.replace("layernorm_before", "norm1").replace("layernorm_after", "norm2")
        key = key.replace("embeddings.patch_embeddings.projection", "patch_embed.proj")
        renamed[key.replace("embeddings.position_embeddings", "pos_embed")] = tensor
    return renamed


@pytest.mark.timm
@pytest.mark.parametrize("tap", STAGES)
def test_features_are_those_of_the_stock_model(tap):
    stock, pixels = stock_model(HieraModel), torch.randn(2, 3, 64, 64)
    arguments = {"img_size": [64, 64], "embed_dim": 8, "num_heads": 1, "stages": DEPTHS}
    config = TappedTimmConfig(
        backbone="hiera_tiny_224",
        model_args=arguments,
        stage_names=STAGES,
        stage_channels=[8, 16, 32, 64],
        stage_downsampling=[[4, "ceil"], [2, "ceil"], [2, "ceil"], [2, "ceil"]],
        only_size=[64, 64],
        out_features=[tap],
    )
    backbone = TappedTimmBackbone(config).eval()
    weights = timm_names(stock.state_dict())
    needed = [key.removeprefix("timm_model.model.") for key in backbone.state_dict()]
    assert f"blocks.{sum(DEPTHS[: STAGES.index(tap) + 1])}.norm1.weight" not in needed  # nothing after the tap
    backbone.timm_model.model.load_state_dict({key: weights[key] for key in needed})
    with torch.no_grad():
        expected = stock(pixels, output_hidden_states=True).reshaped_hidden_states[STAGES.index(tap) + 1]
        features = backbone(pixels).feature_maps[-1]
    expected = expected.permute(0, 3, 1, 2)
    assert features.shape == expected.shape
    assert (features - expected).abs().max() <= 1e-4 * expected.abs().max()
    with pytest.raises(ValueError, match="takes canvases of 64x64 pixels, got 64x96"):
        backbone(torch.randn(1, 3, 64, 96))


def test_the_stock_backbone_does_not_compute_what_the_stock_model_does():
    """The day this fails Hiera can be taken off `UNUSABLE` and need no timm."""
    stock, backbone = stock_model(HieraModel), HieraBackbone(STOCK).eval()
    backbone.load_state_dict(stock.state_dict(), strict=False)
    pixels = torch.randn(1, 3, 64, 64)
    raw = stock(pixels, output_hidden_states=True).reshaped_hidden_states[1]
    normed = torch.nn.functional.layer_norm(raw, raw.shape[-1:]).permute(0, 3, 1, 2)
    assert not torch.allclose(backbone(pixels).feature_maps[0], normed, atol=1e-2)


@pytest.mark.timm
@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_the_table_says_what_timm_says(size):
    written = ENCODERS[f"hiera_{size}.mae_in1k_ft_in1k_224"].config()
    asked = tapped_timm_config(f"hiera_{size}_224", "stage3")
    assert written.to_dict() == asked.to_dict()
