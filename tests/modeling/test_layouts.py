"""The table of layouts: one file of each, and what each family says to a file that is not its own."""

from pathlib import Path

import pytest
import torch
from transformers.utils import is_timm_available

from ssm_vlm.configuration.named_encoders import ENCODERS
from ssm_vlm.modeling.checkpoint_files import read_state_dict
from ssm_vlm.modeling.encoder_loading import read_named
from ssm_vlm.modeling.layouts import LAYOUTS, recognise_layout
from ssm_vlm.modeling.published_weights import read_published

FIXTURES = Path(__file__).parent.parent / "fixtures"
TOYS = {
    "vmamba": ["vmamba_v2_ratio2", "vmamba_v0", "vmamba_v0_backbone"],
    "timm_vit": ["vit_timm", "vit_deit3"],
    "swin": ["swin_release", "swin_timm"],
    "convnext": ["convnext_timm", "convnextv2_timm"],
    "timm_maxvit": ["maxvit_tf"],
    "mambavision": ["mambavision"],
    "vitdet": ["vitdet"],
    "vit_adapter": ["vit_adapter"],
}
PREFIXES = {"vitdet": "backbone.net.", "vit_adapter": "backbone."}
"""How the published files call what the fixtures hold."""


CASES = [(layout, toy) for layout, toys in TOYS.items() for toy in toys]


@pytest.fixture(scope="module", params=CASES, ids=[toy for _, toy in CASES])
def published(request, tmp_path_factory):
    """The layout and the path of a toy file."""
    layout, toy = request.param
    tensors = read_state_dict(FIXTURES / f"{toy}.weights.safetensors")
    file = tmp_path_factory.mktemp("toys") / f"{toy}.pth"
    torch.save({"model": {PREFIXES.get(layout, "") + key: tensor for key, tensor in tensors.items()}}, file)
    return layout, file


def one_of(layout):
    """The first encoder of the table that comes in a layout."""
    return next(encoder for encoder in ENCODERS.values() if encoder.weights and encoder.weights.layout == layout)


def without_checksum(encoder):
    """An entry whose published file may be any."""
    weights = type(encoder.weights)(encoder.weights.layout, url="https://example.org")
    return type(encoder)(**{**vars(encoder), "weights": weights})


def needs_timm(layout):
    return layout == "timm_maxvit" and not is_timm_available()


def test_every_layout_is_tested_and_used():
    assert TOYS.keys() == LAYOUTS.keys()
    assert {encoder.weights.layout for encoder in ENCODERS.values() if encoder.weights} <= {*LAYOUTS, "transformers"}
    assert all(one_of(layout) for layout in LAYOUTS)


def test_exactly_one_layout_recognises_each_file(published):
    layout, file = published
    tensors = read_state_dict(file)
    assert [name for name, other in LAYOUTS.items() if other.recognises(tensors)] == [layout]
    assert recognise_layout(tensors, "it") == layout


def test_a_file_becomes_a_whole_model_with_every_tensor(published):
    layout, file = published
    if needs_timm(layout):
        with pytest.raises(OSError, match="is in the layout 'timm_maxvit'. .*timm is not installed"):
            read_published(file)
        return
    read = read_published(file)
    assert read.layout == layout
    assert not any(parameter.is_meta for parameter in read.model().parameters())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_name_refuses_the_file_of_another_family(layout, published):
    other, file = published
    encoder = without_checksum(one_of(layout))
    if other != layout:
        with pytest.raises(ValueError, match=f"is in the layout {other!r}, but {encoder.name!r} comes in {layout!r}"):
            read_named(encoder, file)


def test_a_name_refuses_a_file_of_its_family_by_keys_and_shapes(published):
    layout, file = published
    if needs_timm(layout):
        pytest.skip("timm is not installed here")
    with pytest.raises(ValueError, match=r"does not fit: it .* instead of \(\d+,|holds a '\w+' model, but"):
        read_named(without_checksum(one_of(layout)), file)


def test_a_name_refuses_a_file_with_another_checksum(published):
    layout, file = published
    encoder = one_of(layout)
    weights = type(encoder.weights)(layout, url="https://example.org", sha256="0" * 64)
    with pytest.raises(ValueError, match="is not the published file, or its download is damaged"):
        read_named(type(encoder)(**{**vars(encoder), "weights": weights}), file)


def test_a_file_of_no_family_is_told():
    with pytest.raises(
        ValueError, match=r"it holds 7 tensors \(w0, w1, w2 and 4 more\) in none of the layouts that are"
    ):
        recognise_layout({f"w{index}": torch.ones(1) for index in range(7)}, "it")
