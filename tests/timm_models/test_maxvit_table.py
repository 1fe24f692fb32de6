"""The MaxViT entries, written down so that the table needs no timm, held to what timm says of each."""

import pytest
import torch
from transformers import TimmWrapperForImageClassification

from ssm_vlm.configuration.maxvit_encoders import MAXVIT_ENCODERS
from ssm_vlm.configuration.named_encoders import ENCODERS
from ssm_vlm.configuration.taps import tapped_config
from ssm_vlm.configuration.timm_stages import tapped_timm_config
from ssm_vlm.modeling.convert_timm_maxvit import TIMM_MAXVIT_LAYOUT
from ssm_vlm.modeling.encoder_loading import load_encoder
from ssm_vlm.modeling.token_grid import encoder_downsampling, num_image_tokens

NAMES = [encoder.name for encoder in MAXVIT_ENCODERS]


def test_every_published_size_has_a_name():
    published = [f"maxvit_{v}.in1k_{s}" for v in ("tiny", "small", "base", "large") for s in (224, 384, 512)]
    published += [f"maxvit_{v}.in21k_224" for v in ("base", "large", "xlarge")]
    published += [f"maxvit_{v}.in21k_ft_in1k_{s}" for v in ("base", "large", "xlarge") for s in (384, 512)]
    assert sorted(NAMES) == sorted(published) and set(NAMES) <= set(ENCODERS)


@pytest.mark.parametrize(
    ("name", "tap", "tokens", "width", "multiple"),
    [
        ("maxvit_tiny.in1k_224", "stage3", 196, 256, 112),
        ("maxvit_tiny.in1k_224", "stage4", 49, 512, 224),
        ("maxvit_base.in1k_384", "stage3", 576, 384, 192),
        ("maxvit_large.in21k_ft_in1k_512", "stage3", 1024, 512, 256),
        ("maxvit_xlarge.in21k_ft_in1k_512", "stage4", 256, 1536, 512),
    ],
)
def test_without_timm(name, tap, tokens, width, multiple):
    encoder = ENCODERS[name]
    config = tapped_config(encoder.config(), tap)
    assert num_image_tokens(encoder.preprocessing.height, encoder.preprocessing.width, config.downsampling) == tokens
    assert config.downsampling == encoder_downsampling(config)
    assert (config.hidden_size, config.canvas_multiple, config.out_features) == (width, multiple, [tap])
    assert type(config)(**config.to_dict()).to_dict() == config.to_dict()


def test_building_says_what_to_install(monkeypatch):
    """In one sentence, where timm is absent."""
    monkeypatch.setattr("ssm_vlm.modeling.modeling_tapped_timm.is_timm_available", lambda: False)
    monkeypatch.setattr("ssm_vlm.configuration.timm_stages.is_timm_available", lambda: False)
    for name in ("maxvit_tiny.in1k_224", "timm/resnet10t.c3_in1k"):
        with pytest.raises(ImportError, match=r"timm.*: run `pip install ssm-vlm\[timm\]`\.$"):
            load_encoder(name, pretrained=False)


@pytest.mark.timm
@pytest.mark.parametrize("encoder", MAXVIT_ENCODERS, ids=NAMES)
def test_preprocessing_and_origin_are_timms(encoder):
    from timm.models import get_pretrained_cfg

    published = get_pretrained_cfg(encoder.weights.hub_id.removeprefix("timm/"))
    ours = encoder.preprocessing
    assert (3, ours.height, ours.width) == published.input_size
    assert (ours.mean, ours.std, ours.interpolation) == (published.mean, published.std, published.interpolation)
    assert published.license == encoder.licence.lower()


@pytest.mark.timm
@pytest.mark.parametrize(
    ("name", "tap"),
    [
        ("maxvit_tiny.in1k_224", "stage1"),
        ("maxvit_tiny.in1k_224", "stage3"),
        ("maxvit_small.in1k_384", "stage4"),
        ("maxvit_large.in1k_512", "stage2"),
    ],
)
def test_the_config_is_what_timm_says(name, tap):
    config = tapped_config(ENCODERS[name].config(), tap)
    measured = tapped_timm_config(config.backbone, tap)
    assert measured.to_dict() == config.to_dict()


@pytest.mark.timm
@pytest.mark.parametrize("encoder", {encoder.config().backbone: encoder for encoder in MAXVIT_ENCODERS}.values())
def test_a_published_file_is_recognised(encoder):
    """From names and shapes alone: what is inferred is timm's model of that name, its head included."""
    from timm import create_model
    from timm.models import get_pretrained_cfg

    classes = get_pretrained_cfg(encoder.weights.hub_id.removeprefix("timm/")).num_classes
    backbone = encoder.config().backbone
    with torch.device("meta"):
        weights = create_model(backbone, num_classes=classes).state_dict()
    assert TIMM_MAXVIT_LAYOUT.recognises(weights)
    model_class, config = TIMM_MAXVIT_LAYOUT.infer(weights)
    assert model_class is TimmWrapperForImageClassification and config.num_labels == classes
    assert (config.architecture, config.model_args) == (backbone, {})


@pytest.mark.timm
def test_a_file_names_its_classes():
    from timm import create_model

    with torch.device("meta"):
        weights = create_model("maxvit_tiny_tf_224").state_dict()
    assert TIMM_MAXVIT_LAYOUT.infer(weights)[1].id2label[207] == "golden retriever"
