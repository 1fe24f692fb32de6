"""Encoders by name and by id from a Hub on localhost: what comes from there is what lies in the same files here."""

from pathlib import Path

import pytest
import torch
from hub_stub import USER, Repository
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, CLIPConfig, CLIPModel

from ssm_vlm import convert_encoder, load_encoder
from ssm_vlm.cli import main

NAME, HUB_ID = "deit_tiny_patch16.fb_in1k_224", "timm/deit_tiny_patch16_224.fb_in1k"


@pytest.fixture
def hub_here(hub, monkeypatch, tmp_path):
    hub.patch(monkeypatch, tmp_path / "cache")
    return hub


def timm_deit_tiny(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights as timm names and shapes those of DeiT tiny."""
    shapes = {"cls_token": (1, 1, 192), "pos_embed": (1, 197, 192), "head.weight": (1000, 192), "head.bias": (1000,)}
    shapes |= {"patch_embed.proj.weight": (192, 3, 16, 16), "patch_embed.proj.bias": (192,)}
    shapes |= {"norm.weight": (192,), "norm.bias": (192,)}
    layers = {"attn.qkv": (576, 192), "attn.proj": (192, 192), "mlp.fc1": (768, 192), "mlp.fc2": (192, 768)}
    layers |= {"norm1": (192,), "norm2": (192,)}
    for block in range(12):
        for name, shape in layers.items():
            shapes |= {f"blocks.{block}.{name}.weight": shape, f"blocks.{block}.{name}.bias": shape[:1]}
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def publish(hub, repo_id: str, **files: bytes) -> None:
    """A repository of somebody else's."""
    repository = Repository(private=False)
    repository.branches["main"] |= {name.replace("_safetensors", ".safetensors"): data for name, data in files.items()}
    hub.repositories[repo_id] = repository


def features(encoder, height: int = 64, width: int = 96) -> torch.Tensor:
    pixels = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return encoder(pixels).feature_maps[-1]


def test_a_named_encoder_comes_from_its_repository(hub_here, tmp_path):
    file = tmp_path / "deit.safetensors"
    save_file(timm_deit_tiny(), file)
    publish(hub_here, HUB_ID, model_safetensors=file.read_bytes())
    there = load_encoder(NAME)
    convert_encoder(NAME, file, tmp_path / "weights")
    here = load_encoder(NAME, weights_dir=tmp_path / "weights")
    assert torch.equal(features(there, 224, 224), features(here, 224, 224))
    assert f"GET /{HUB_ID}/resolve/" in " ".join(hub_here.requests)
    save_file(timm_deit_tiny(seed=1), file)  # the comparison sees other weights
    publish(hub_here, HUB_ID, model_safetensors=file.read_bytes())
    hub_here.repositories[HUB_ID].commits["main"] = "1" * 40
    assert not torch.equal(features(load_encoder(NAME), 224, 224), features(here, 224, 224))


def test_another_model_in_the_repository_is_refused(hub_here, tmp_path):
    tensors = timm_deit_tiny()
    tensors["blocks.3.mlp.fc1.weight"] = torch.zeros(640, 192)
    save_file(tensors, tmp_path / "deit.safetensors")
    publish(hub_here, HUB_ID, model_safetensors=(tmp_path / "deit.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"fc1|intermediate"):
        load_encoder(NAME)


def test_a_repository_that_is_not_there_says_how_to_get_the_weights(hub_here):
    with pytest.raises(OSError, match=f"Cannot get '{NAME}' from the Hub.*ssm-vlm convert"):
        load_encoder(NAME)


def test_a_converted_and_pushed_file_is_an_encoder_by_its_id(hub_here, tmp_path, capsys):
    tensors = load_file(Path(__file__).parents[1] / "fixtures" / "vmamba_v2_ratio2.weights.safetensors")
    torch.save({"model": tensors}, tmp_path / "vmamba.pth")
    repo = f"{USER}/tiny-vmamba"
    assert main(["convert", str(tmp_path / "vmamba.pth"), "--output", str(tmp_path / "out"), "--push", repo]) == 0
    assert f"{hub_here.endpoint}/{repo}" in capsys.readouterr().out
    for tap in ("stage2", "stage3"):
        assert torch.equal(features(load_encoder(repo, tap=tap)), features(load_encoder(tmp_path / "out", tap=tap)))
    there, here = (AutoModelForImageClassification.from_pretrained(place) for place in (repo, tmp_path / "out"))
    pixels = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(there(pixels).logits, here(pixels).logits)
    card = hub_here.files(repo)["README.md"].decode()
    assert "`vmamba.pth`" in card and f'load_encoder("{repo}", tap="stage3")' in card


def test_the_eye_of_somebody_elses_model(hub_here, tmp_path):
    """Not ours in any way: Transformers pushed it."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = CLIPConfig(text_config=sizes, vision_config={**sizes, "image_size": 64, "patch_size": 16})
    model = CLIPModel(config)
    model.push_to_hub("clip")
    model.save_pretrained(tmp_path / "clip")
    assert torch.equal(
        features(load_encoder(f"{USER}/clip"), 64, 64), features(load_encoder(tmp_path / "clip"), 64, 64)
    )
