"""The table itself: names, figures that are known from elsewhere, and the answer to a wrong name."""

import re

import pytest
import torch
from transformers import AutoModel

from ssm_vlm.configuration.named_encoders import ENCODERS, get_named_encoder
from ssm_vlm.modeling.geometry import make_geometry
from ssm_vlm.modeling.layouts import LAYOUTS
from ssm_vlm.modeling.token_grid import encoder_downsampling, num_image_tokens

DIGITS = [name for name in ENCODERS if name.startswith("digit_")]


@pytest.mark.parametrize("name", ENCODERS)
def test_every_entry_is_whole(name):
    encoder = get_named_encoder(name)
    config, preprocessing = encoder.config(), encoder.preprocessing
    assert encoder.name == name and re.fullmatch(r"[a-z0-9_]+\.[a-z0-9_]+", name)
    assert config.out_features == config.stage_names[-1:] or config.model_type in (
        "ssm_vision",
        "mambavision",
        "tapped_timm",
    )
    assert num_image_tokens(preprocessing.height, preprocessing.width, encoder_downsampling(config)) > 0
    assert make_geometry(preprocessing.geometry, 480, 640, (preprocessing.height, preprocessing.width))
    assert preprocessing.interpolation in ("bicubic", "bilinear", "nearest")
    assert all(0 < value < 1 for value in preprocessing.mean + preprocessing.std)
    assert re.fullmatch(r"[\w.-]+", encoder.licence)
    assert encoder.imagenet_top1 is None or 70 < encoder.imagenet_top1 < 90
    # No published file could be loaded where this table was written; set an entry to True when its file was.
    assert encoder.loaded_from_real_file is False
    if encoder.weights is not None:
        assert encoder.weights.layout in {*LAYOUTS, "transformers"}
        assert (encoder.weights.hub_id is None) != (encoder.weights.url is None)
        assert encoder.weights.sha256 is None or re.fullmatch(r"[0-9a-f]{6,64}", encoder.weights.sha256)


def test_each_call_builds_its_own_config():
    encoder = get_named_encoder("vmamba_small_s2l15.in1k_224")
    encoder.config().depths.append(1)
    assert encoder.config().depths == [2, 2, 15, 2]


@pytest.mark.parametrize(
    ("name", "tokens", "width"),
    [
        ("vmamba_small_s2l15.in1k_224", 196, 384),
        ("vmamba_base_s1l20.in1k_224", 196, 512),
        ("vmamba_small_s2l15.coco_maskrcnn_1x", 4200, 384),
        ("vmamba_small_s2l15.ade20k_upernet_512", 1024, 384),
        ("vit_small_patch16.augreg_in1k_224", 196, 384),
        ("swin_base.in1k_224", 196, 512),
        ("convnext_tiny.in1k_224", 196, 384),
        ("dinov2_base_patch14.lvd142m_224", 256, 768),
        ("vitdet_base_patch16.coco_maskrcnn_1024", 4096, 768),
        ("vit_adapter_small.deit_ade20k_upernet_512", 256, 384),
        ("digit_vmamba.digitscenes_64", 64, 96),
        ("digit_vit.digitscenes_64", 64, 96),
    ],
)
def test_tokens_and_widths(name, tokens, width):
    encoder = get_named_encoder(name)
    config = encoder.config()
    steps = encoder_downsampling(config)
    assert num_image_tokens(encoder.preprocessing.height, encoder.preprocessing.width, steps) == tokens
    assert (config.hidden_sizes[2] if config.model_type == "convnext" else config.hidden_size) == width


def test_encoders_of_the_study_are_matched():
    parameters = [ENCODERS[name].parameters for name in DIGITS]
    assert len(parameters) >= 6 and max(parameters) / min(parameters) < 1.05
    assert {tuple(map(tuple, encoder_downsampling(ENCODERS[n].config()))) for n in DIGITS if "vit" not in n} == {
        ((2, "ceil"),) * 3
    }


def test_mixers_of_the_study_differ_in_nothing_else():
    allowed = {"mixer", "mlp_ratio", "ssm_ratio", "d_state", "head_dim", "window_size"}
    base = ENCODERS["digit_vmamba.digitscenes_64"].config().to_dict()
    for name in DIGITS:
        if "vit" not in name:
            other = ENCODERS[name].config().to_dict()
            assert {key for key in base if base[key] != other[key]} <= allowed, name


@pytest.mark.parametrize(
    ("name", "millions", "head_millions"),
    [  # parameters of the whole vision model as timm's tables give them, and of the classifier among them
        ("vit_small_patch16.augreg_in1k_224", 22.05, 0.385),
        ("vit_base_patch16.augreg_in1k_224", 86.57, 0.769),
        ("deit_tiny_patch16.fb_in1k_224", 5.72, 0.193),
        ("clip_vit_large_patch14.openai_336", 303.5, 0.0),
        ("siglip_base_patch16.webli_224", 92.88, 0.0),
        ("siglip_so400m_patch14.webli_384", 428.23, 0.0),
        ("dinov2_small_patch14.lvd142m_224", 22.06, 0.0),
        ("dinov2_base_patch14.lvd142m_224", 86.58, 0.0),
    ],
)
def test_whole_vision_transformers_have_their_published_size(name, millions, head_millions):
    stock = get_named_encoder(name).config().vision_config
    with torch.device("meta"):
        model = AutoModel.from_config(stock)
    counted = sum(p.numel() for key, p in model.named_parameters() if not key.startswith("pooler."))
    assert counted / 1e6 + head_millions == pytest.approx(millions, abs=0.3 if "clip" in name else 0.006)


@pytest.mark.parametrize("name", [n for n in ENCODERS if n.startswith(("vit_", "deit_")) and "adapter" not in n])
def test_timm_transformers_have_timms_details(name):
    """What no shape shows: timm's epsilon, and heads of 64 channels."""
    stock = get_named_encoder(name).config().vision_config
    assert stock.layer_norm_eps == 1e-6 and stock.hidden_size // stock.num_attention_heads == 64
    assert stock.hidden_act == "gelu"


def test_the_tap_norm_is_trained_where_the_release_has_one():
    for name, encoder in ENCODERS.items():
        if name.startswith("vmamba_"):
            assert encoder.config().output_norm == ("parameter_free" if ".in1k" in name else "layernorm")


def test_a_wrong_name_gets_the_nearest():
    message = r"no encoder named 'vmamba_small.in1k_224'; the nearest names are vmamba_small_\w+.in1k_224, vmamba_"
    with pytest.raises(ValueError, match=message):
        get_named_encoder("vmamba_small.in1k_224")


@pytest.mark.parametrize("typed", ["vit_smal", "vit_small_patch16", "vit_smalll"])
def test_names_that_begin_alike_are_nearest(typed):
    with pytest.raises(ValueError, match=r"nearest names are vit_small_\S+, vit_small_\S+, vit_small_\S+ \("):
        get_named_encoder(typed)


def test_every_published_vmamba_has_a_name_and_a_file():
    vmamba = [name for name in ENCODERS if name.startswith("vmamba_")]
    tags = [name.partition(".")[2].partition("_")[0] for name in vmamba]
    assert (tags.count("in1k"), tags.count("coco"), tags.count("ade20k")) == (9, 13, 7)
    files = [ENCODERS[name].weights.url for name in vmamba]
    assert len(set(files)) == 29 and all(file.endswith(".pth") for file in files)
