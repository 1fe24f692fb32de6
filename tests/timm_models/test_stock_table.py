"""Every ViT, DeiT, Swin and ConvNeXt of the table held to timm's model: keys, shapes, preprocessing."""

import re

import pytest
import torch

from ssm_vlm.configuration.named_encoders import ENCODERS
from ssm_vlm.modeling.checkpoint_report import check_fit
from ssm_vlm.modeling.encoder_loading import hold_to_named
from ssm_vlm.modeling.layouts import LAYOUTS, recognise_layout
from ssm_vlm.modeling.published_weights import on_meta

pytestmark = pytest.mark.timm
NAMES = [name for name, e in ENCODERS.items() if e.weights and e.weights.layout in ("timm_vit", "swin", "convnext")]


def timm_model(name):
    import timm

    encoder = ENCODERS[name]
    if encoder.weights.layout == "swin":  # Microsoft's own file, which timm holds under another name
        architecture = f"{name.partition('.')[0]}_patch4_window7_224.ms_in1k"
    else:
        architecture = encoder.weights.hub_id.removeprefix("timm/")
    with torch.device("meta"):
        return timm.create_model(architecture)


@pytest.mark.parametrize("name", NAMES)
def test_timms_file_would_convert_and_be_that_encoder(name):
    tensors = timm_model(name).state_dict()
    layout = LAYOUTS[recognise_layout(tensors, name)]
    model_class, config = layout.infer(tensors)
    kept = {key: t for key, t in tensors.items() if not any(re.match(pattern, key) for pattern in layout.discards)}
    converted = layout.convert(kept, config)
    check_fit(name, converted, on_meta(model_class, config).state_dict())
    hold_to_named(ENCODERS[name], config, name)


@pytest.mark.parametrize("name", NAMES)
def test_preprocessing_is_timms(name):
    theirs, ours = timm_model(name).pretrained_cfg, ENCODERS[name].preprocessing
    assert (ours.mean, ours.std) == (tuple(theirs["mean"]), tuple(theirs["std"]))
    assert ours.interpolation == theirs["interpolation"]
    assert (3, ours.height, ours.width) == tuple(theirs["input_size"])


def test_a_file_of_another_size_is_refused():
    tensors = timm_model("deit3_small_patch16.fb_in1k_224").state_dict()
    layout = LAYOUTS["timm_vit"]
    _, config = layout.infer(tensors)
    with pytest.raises(ValueError, match=r"deit_small does not fit: it has another shape for .*\(384,\) instead of"):
        hold_to_named(ENCODERS["deit_base_patch16.fb_in1k_224"], config, "deit_small")
