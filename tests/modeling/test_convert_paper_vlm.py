"""The paper's released checkpoints: toy releases in exactly their form, held to a composition written here."""

import io
import json
import shutil
import tarfile
import threading
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import normalizers, processors
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
)
from transformers.utils import is_timm_available

from ssm_vlm import (
    LlavaStyleForConditionalGeneration,
    LlavaStyleImageProcessor,
    LlavaStyleProcessor,
    SSMVisionForImageClassification,
    encoder_downsampling,
    num_image_tokens,
)
from ssm_vlm.cli import main as command
from ssm_vlm.configuration.encoder_entry import IMAGENET, NamedEncoder, Preprocessing, WeightSource
from ssm_vlm.configuration.named_encoders import ENCODERS
from ssm_vlm.configuration.taps import tapped_config
from ssm_vlm.modeling import convert_paper_vlm, release_archive
from ssm_vlm.modeling.convert_paper_vlm import RELEASES, VISION_BACKBONES, convert_paper_release
from ssm_vlm.modeling.convert_vmamba import VMAMBA_LAYOUT
from ssm_vlm.modeling.encoder_conversion import convert_encoder
from ssm_vlm.modeling.layouts import LAYOUTS
from ssm_vlm.modeling.own_backbones import build_backbone
from ssm_vlm.modeling.release_archive import CHECKPOINT, CONFIG, is_paper_release

FIXTURES = Path(__file__).parents[1] / "fixtures"


class Toy(NamedTuple):
    """An encoder of the release in small: outputs of its reference implementation at the tap, as far as there are."""

    fixture: str
    layout: str
    tap: str
    geometry: str
    size: tuple[int, int]
    input: str
    tap_of_reference: str | None
    width: int


CASES = {  # by vision_backbone_id
    "vmamba-toy": Toy("vmamba_v2_ratio2", "vmamba", "stage3", "letterbox", (64, 64), "input.0", None, 32),
    "vmamba-toy-det": Toy(
        "vmamba_v2_ratio2_backbone", "vmamba", "stage3", "letterbox_corner", (64, 96), "input.1", "stage3.1", 32
    ),
    "in1k-toy-vit": Toy("vit_timm", "timm_vit", "block2", "letterbox", (64, 64), "input.0", "block2.0", 32),
    "mambavision-toy-s3": Toy(
        "mambavision", "mambavision", "stage2_downsampled", "letterbox", (80, 80), "input.0", "level1.0", 64
    ),
    "in1k-toy-maxvit-s3": Toy(
        "maxvit_tf", "timm_maxvit", "stage3", "letterbox", (128, 128), "input.0", "feature3.0", 64
    ),
}
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
WIDTH = 16  # of the language model


def make_tokenizer(scheme: str) -> LlamaTokenizer:
    """Pieces of the toy's prompts, on Llama's rules: a text starts with a space, and a special token may hide that."""
    words = [*SYSTEM.split(" "), "USER:", "ASSISTANT:", "Which", "digit", "is", "it?", "seven", "red"]
    letters = sorted(set("".join(words)))
    vocabulary, merges = ["<unk>", "<s>", "</s>", "▁", *letters], []
    for word in dict.fromkeys(words):  # merges from the left: ▁, ▁W, ▁Wh, ...
        for end in range(1, len(word) + 1):
            piece = "▁" + word[:end]
            if piece not in vocabulary:
                merges.append((piece[:-1], piece[-1]))
                vocabulary.append(piece)
    tokenizer = LlamaTokenizer(vocab={piece: i for i, piece in enumerate(vocabulary)}, merges=merges)
    bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.backend_tokenizer.post_processor = bos
    if scheme == "legacy":  # a space before every piece of text, as of tokenizers converted by older versions
        tokenizer.backend_tokenizer.pre_tokenizer = None
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    return tokenizer


@pytest.fixture(scope="module")
def llm_folders(tmp_path_factory) -> dict[str, Path]:
    """Config and tokenizer of a language model before it got <PAD>, for both ways in which Llama tokenizers work."""
    folders = {}
    for scheme in ("first", "legacy"):
        folder = tmp_path_factory.mktemp(scheme)
        tokenizer = make_tokenizer(scheme)
        tokenizer.save_pretrained(folder)
        llama(len(tokenizer)).save_pretrained(folder)
        folders[scheme] = folder
    return folders


def llama(rows: int, hidden: int = WIDTH) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )


@pytest.fixture
def toys(monkeypatch, tmp_path):
    """Named encoders for the fixtures, with files of weights as VMamba publishes them."""
    files = {}
    for backbone_id, toy in CASES.items():
        if toy.layout.startswith("timm_max") and not is_timm_available():
            continue
        weights = load_file(FIXTURES / f"{toy.fixture}.weights.safetensors")
        config = tapped_config(LAYOUTS[toy.layout].infer(weights)[1], toy.tap)
        name = f"{backbone_id.replace('-', '_')}.golden"
        preprocessing = Preprocessing(*toy.size, *IMAGENET, geometry=toy.geometry)
        entry = NamedEncoder(name, lambda c=config: c, preprocessing, 1, 1, "MIT", WeightSource(toy.layout, url="x"))
        monkeypatch.setitem(ENCODERS, name, entry)
        monkeypatch.setitem(VISION_BACKBONES, backbone_id, name)
        files[backbone_id] = tmp_path / f"{toy.fixture}.pth"
        torch.save({"model": weights} if toy.geometry == "letterbox" else {"state_dict": weights}, files[backbone_id])
    return files


def projector(arch: str, tap_width: int) -> nn.Module:
    """As the release builds them: `projector` inside a module, an `nn.Sequential` but for the linear one."""
    torch.manual_seed(0)
    widths = {
        "linear": [tap_width, WIDTH],
        "no-align+gelu-mlp": [tap_width, WIDTH, WIDTH],
        "no-align+fused-gelu-mlp": [tap_width, 4 * tap_width, WIDTH, WIDTH],
    }[arch]
    layers = [nn.Linear(i, o) for i, o in zip(widths[:-1], widths[1:], strict=True)]
    between = [module for layer in layers for module in (nn.GELU(), layer)][1:]
    return nn.ModuleDict({"projector": layers[0] if arch == "linear" else nn.Sequential(*between)})


def parts(llm_folder: Path, arch="no-align+gelu-mlp", backbone="vmamba-toy", **settings):
    """Config, projector and language model of a toy release; the language model's embeddings padded to 64."""
    tokenizer = AutoTokenizer.from_pretrained(llm_folder)
    rows = -(-(len(tokenizer) + 1) // 64) * 64
    torch.manual_seed(1)
    language_model = LlamaForCausalLM(llama(rows))
    with torch.no_grad():
        for parameter in language_model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    config = {
        "model": {
            "model_id": "toy+1b",
            "vision_backbone_id": backbone,
            "llm_backbone_id": "vicuna-v15-7b",
            "arch_specifier": arch,
            "image_resize_strategy": "letterbox",
            "llm_max_length": 2048,
            **settings,
        },
        "run_id": "toy+1b+ep1+ft+x7",
        "stage": "finetune",
        "seed": 7,
        "vmamba_feature_stage": 3,
        "vmamba_feature_layer": 1,
    }
    width = CASES[backbone].width if backbone in CASES else 32
    return config, projector(arch, width), language_model


def checkpoint_bytes(projector: nn.Module, language_model: nn.Module, others: dict | None = None) -> bytes:
    groups = {
        "projector": projector.state_dict(),
        "llm_backbone": {f"llm.{key}": value for key, value in language_model.state_dict().items()},
    } | (others or {})
    buffer = io.BytesIO()
    torch.save({"model": {key: value for key, value in groups.items() if value is not None}}, buffer)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes], mode="w", top="") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(top + name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def release(path: Path, llm_folder: Path, mode="w", top="", **settings) -> Path:
    config, mlp, language_model = parts(llm_folder, **settings)
    members = {CONFIG: json.dumps(config).encode(), CHECKPOINT: checkpoint_bytes(mlp, language_model)}
    return write_tar(path, members, mode, top)


def paper_prompt(*turns: str) -> str:
    """The text that the release makes of user and assistant turns by turns, for generation."""
    text = SYSTEM + " "
    for number, turn in enumerate(turns):
        text += f"USER: {turn.strip()} ASSISTANT: " if number % 2 == 0 else f"{turn.strip()}</s>"
    return text.rstrip()


def tap_by_hand(backbone: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and what the connector gets of them, [2, h * w, C].

    The reference's own output; or, of VMamba's classifier, which has no norm at its stages, a plain LayerNorm on ours.
    """
    toy = CASES[backbone]
    golden = load_file(FIXTURES / f"{toy.fixture}.io.safetensors")
    if toy.tap_of_reference is not None:
        return golden[toy.input], golden[toy.tap_of_reference].flatten(2).transpose(1, 2)
    weights = load_file(FIXTURES / f"{toy.fixture}.weights.safetensors")
    model_class, config = VMAMBA_LAYOUT.infer(weights)
    assert model_class is SSMVisionForImageClassification
    model = model_class(config)
    model.load_state_dict(VMAMBA_LAYOUT.convert(weights, config))
    before_norm = {}
    stage = model.eval().model.stages[2]
    stage.blocks[-1].register_forward_hook(lambda module, inputs, output: before_norm.update(tap=output))
    with torch.no_grad():
        model(golden[toy.input])
    tokens = before_norm["tap"]  # [2, h, w, C]
    return golden[toy.input], nn.functional.layer_norm(tokens.flatten(1, 2), tokens.shape[-1:])


@pytest.mark.parametrize("scheme", ["first", "legacy"])
@pytest.mark.parametrize(
    ("backbone", "arch"),
    [
        ("vmamba-toy", "no-align+gelu-mlp"),
        ("vmamba-toy", "linear"),
        ("vmamba-toy-det", "no-align+fused-gelu-mlp"),
        ("vmamba-toy-det", "no-align+gelu-mlp"),
        ("in1k-toy-vit", "no-align+gelu-mlp"),
        ("mambavision-toy-s3", "no-align+gelu-mlp"),
        pytest.param("in1k-toy-maxvit-s3", "no-align+gelu-mlp", marks=pytest.mark.timm),
    ],
)
def test_logits_are_those_of_the_papers_composition(backbone, arch, scheme, toys, llm_folders, tmp_path):
    source = release(tmp_path / "toy.tar", llm_folders[scheme], arch=arch, backbone=backbone)
    assert is_paper_release(source)
    folder = convert_paper_release(
        source, tmp_path / "out", encoder_weights=toys[backbone], language_model=str(llm_folders[scheme])
    )
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    assert type(model) is LlavaStyleForConditionalGeneration and type(processor) is LlavaStyleProcessor
    assert not model.training and model.config.freeze_vision and model.config.box_frame == "centered_square"

    _, mlp, language_model = parts(llm_folders[scheme], arch=arch, backbone=backbone)
    tokenizer = AutoTokenizer.from_pretrained(llm_folders[scheme])
    height, width = CASES[backbone].size
    pixels, tap = tap_by_hand(backbone)
    content = [{"type": "image", "image": Image.new("RGB", (width, height))}, {"type": "text", "text": "Which digit?"}]
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": content}]] * 2,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    assert inputs["pixel_values"].shape == pixels.shape
    ids = tokenizer(paper_prompt("Which digit?"), return_tensors="pt").input_ids
    assert tokenizer.convert_ids_to_tokens(ids[0, :2].tolist()) == ["<s>", "▁A"]
    image = torch.full((1, tap.shape[1]), processor.image_token_id)
    assert torch.equal(inputs["input_ids"][:1], torch.cat([ids[:, :1], image, ids[:, 1:]], 1))

    inputs["pixel_values"] = pixels
    with torch.no_grad():
        projected = mlp["projector"](tap)
        words = language_model.model.embed_tokens(ids).expand(2, -1, -1)
        embeddings = torch.cat([words[:, :1], projected, words[:, 1:]], 1)
        expected = language_model(inputs_embeds=embeddings).logits
        found = model(**inputs).logits
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (expected[0] - expected[1]).abs().max() > 1e-2 * expected.abs().max(), "the pictures matter"


def test_the_whole_folder_is_what_was_in_the_release(toys, llm_folders, tmp_path):
    """Every tensor of the release, bit for bit, and nothing else but the encoder."""
    source = release(tmp_path / "toy.tar", llm_folders["first"])
    folder = convert_paper_release(
        source, tmp_path / "out", encoder_weights=toys["vmamba-toy"], language_model=str(llm_folders["first"])
    )
    _, mlp, language_model = parts(llm_folders["first"])
    state = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    for key, tensor in language_model.state_dict().items():
        assert torch.equal(state.pop(f"language_model.{key}"), tensor)
    for place, layer in ((0, 0), (2, 1)):
        for what in ("weight", "bias"):
            expected = getattr(mlp["projector"][place], what)
            assert torch.equal(state.pop(f"connector.layers.{layer}.{what}"), expected)
    assert all(key.startswith("vision_tower.") for key in state)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    config = AutoConfig.from_pretrained(folder)
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    assert tokenizer.pad_token == "<PAD>" and config.text_config.pad_token_id == tokenizer.pad_token_id
    assert config.text_config.vocab_size % 64 == 0 and config.connector == "mlp2" and config.tap_norm == "none"
    assert config.image_token_id == tokenizer.convert_tokens_to_ids("<image>") == tokenizer.pad_token_id + 1
    origin = json.loads((folder / "origin.json").read_text())
    assert origin["source"] == "toy.tar" and origin["encoder"] == "vmamba_toy.golden" and len(origin["sha256"]) == 64
    assert origin["language_model"] == "lmsys/vicuna-7b-v1.5"
    for file in folder.glob("*.json"):
        assert str(tmp_path.parent) not in file.read_text(), f"{file.name} names a folder of this machine"


@pytest.mark.parametrize(
    "mutation", ["norm left out", "connector transposed", "bias zero", "head rolled", "image at the end"]
)
def test_the_comparison_notices(mutation, toys, llm_folders, tmp_path):
    """Mutation twin of the comparison of logits."""
    source = release(tmp_path / "toy.tar", llm_folders["first"])
    folder = convert_paper_release(
        source, tmp_path / "out", encoder_weights=toys["vmamba-toy"], language_model=str(llm_folders["first"])
    )
    model = AutoModelForImageTextToText.from_pretrained(folder)
    _, mlp, language_model = parts(llm_folders["first"])
    pixels, tap = tap_by_hand("vmamba-toy")
    ids = AutoTokenizer.from_pretrained(llm_folders["first"])(
        paper_prompt("Which digit?"), return_tensors="pt"
    ).input_ids
    image = torch.full((1, 16), model.config.image_token_id)
    row = torch.cat([ids[:, :1], image, ids[:, 1:]], 1)
    with torch.no_grad():
        words = language_model.model.embed_tokens(ids).expand(2, -1, -1)
        embeddings = torch.cat([words[:, :1], mlp["projector"](tap), words[:, 1:]], 1)
        expected = language_model(inputs_embeds=embeddings).logits

        def error() -> float:
            found = model(input_ids=row.expand(2, -1), pixel_values=pixels).logits
            return ((found - expected).abs().max() / expected.abs().max()).item()

        assert error() <= 1e-4
        match mutation:
            case "norm left out":
                model.vision_tower.output_norms = nn.ModuleDict()
            case "connector transposed":
                model.connector.layers[1].weight.copy_(model.connector.layers[1].weight.t().clone())
            case "bias zero":
                model.connector.layers[0].bias.zero_()
            case "head rolled":
                model.language_model.lm_head.weight.copy_(model.language_model.lm_head.weight.roll(1, 0))
            case "image at the end":
                row = torch.cat([ids, image], 1)
        assert error() > 1e-3


def test_a_conversation_of_several_turns_reads_as_the_papers(toys, llm_folders, tmp_path):
    source = release(tmp_path / "toy.tar", llm_folders["first"])
    folder = convert_paper_release(
        source, tmp_path / "out", encoder_weights=toys["vmamba-toy"], language_model=str(llm_folders["first"])
    )
    processor = AutoProcessor.from_pretrained(folder)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which digit is it?\n"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "seven"}]},
        {"role": "user", "content": [{"type": "text", "text": " red"}]},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    expected = paper_prompt("Which digit is it?\n", "seven", " red")
    assert text.startswith("<s><image>") and text.removeprefix("<s><image>").strip() == expected
    ids = processor.tokenizer(text, add_special_tokens=False).input_ids
    by_the_paper = AutoTokenizer.from_pretrained(llm_folders["first"])(expected).input_ids
    assert [ids[0], *ids[2:]] == by_the_paper


# --- encoders and settings ------------------------------------------------------------------------------------------


def test_the_eight_releases_are_known():
    assert len(RELEASES) == 8 and {r.vision_backbone for r in RELEASES.values()} == set(VISION_BACKBONES)
    assert all(len(r.sha256) == 64 and set(r.sha256) <= set("0123456789abcdef") for r in RELEASES.values())
    assert len({r.sha256 for r in RELEASES.values()}) == len({r.run for r in RELEASES.values()}) == 8


SIZES = {  # public id -> canvas, tokens and channels of its encoder's tap
    "vit-s-in1k-224": ((224, 224), 196, 384),
    "maxvit-t-in1k-224-s3": ((224, 224), 196, 256),
    "mambavision-b-in1k-224-s3": ((224, 224), 196, 512),
    "vmamba-s-in1k-224-s3": ((224, 224), 196, 384),
    "vitdet-b-coco-1024": ((1024, 1024), 4096, 768),
    "vmamba-s-coco-1333x800": ((800, 1333), 4200, 384),
    "vit-adapter-deit-b-ade20k-512": ((512, 512), 256, 768),
    "vmamba-s-ade20k-512": ((512, 512), 1024, 384),
}


@pytest.mark.parametrize("public_id", RELEASES)
def test_each_release_has_its_named_encoder(public_id):
    entry = ENCODERS[VISION_BACKBONES[RELEASES[public_id].vision_backbone]]
    canvas, tokens, channels = SIZES[public_id]
    assert (entry.preprocessing.height, entry.preprocessing.width) == canvas
    assert num_image_tokens(*canvas, encoder_downsampling(entry.config())) == tokens
    if entry.config().model_type == "tapped_timm":
        pytest.importorskip("timm")
    with torch.device("meta"):
        assert build_backbone(entry.config()).channels[-1] == channels


def test_a_folder_in_place_of_a_tar_and_weights_that_were_converted(toys, llm_folders, tmp_path):
    source = release(tmp_path / "toy.tar", llm_folders["first"])
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    weights = convert_encoder("vmamba_toy.golden", toys["vmamba-toy"], tmp_path / "weights")
    llm = str(llm_folders["first"])
    one = convert_paper_release(source, tmp_path / "one", encoder_weights=toys["vmamba-toy"], language_model=llm)
    assert is_paper_release(tmp_path / "unpacked") and not is_paper_release(weights)
    two = convert_paper_release(tmp_path / "unpacked", tmp_path / "two", encoder_weights=weights, language_model=llm)
    first, second = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(("mode", "top"), [("w:gz", ""), ("w", "toy/"), ("w:xz", "./")])
def test_compressed_and_nested_archives(mode, top, toys, llm_folders, tmp_path):
    source = release(tmp_path / "toy.tar", llm_folders["first"], mode, top)
    folder = convert_paper_release(
        source, tmp_path / "out", encoder_weights=toys["vmamba-toy"], language_model=str(llm_folders["first"])
    )
    assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("strategy", "geometry"),
    [
        ("letterbox", {"geometry": "letterbox", "size": {"height": 64, "width": 64}}),
        ("letterbox-square-512", {"geometry": "square_512", "size": {"height": 512, "width": 512}}),
        ("vmamba-detection", {"geometry": "letterbox_corner", "size_divisor": 32}),
        ("vmamba-classification", {"geometry": "resize_crop", "crop_pct": 0.875}),
        ("resize-naive", {"geometry": "resize"}),
    ],
)
def test_strategies_are_geometries(strategy, geometry, toys, llm_folders, tmp_path):
    source = release(tmp_path / "toy.tar", llm_folders["first"], image_resize_strategy=strategy)
    folder = convert_paper_release(
        source, tmp_path / "out", encoder_weights=toys["vmamba-toy"], language_model=str(llm_folders["first"])
    )
    settings = AutoProcessor.from_pretrained(folder).image_processor.to_dict()
    assert {key: settings[key] for key in geometry} == geometry and settings["downsampling"] == [[2, "ceil"]] * 4


def test_bfloat16_stays_bfloat16(toys, llm_folders, tmp_path):
    config, mlp, language_model = parts(llm_folders["first"])
    content = checkpoint_bytes(mlp.to(torch.bfloat16), language_model.to(torch.bfloat16))
    source = write_tar(tmp_path / "toy.tar", {CONFIG: json.dumps(config).encode(), CHECKPOINT: content})
    folder = convert_paper_release(
        source, tmp_path / "out", encoder_weights=toys["vmamba-toy"], language_model=str(llm_folders["first"])
    )
    state = load_file(folder / "model.safetensors")
    assert {t.dtype for k, t in state.items() if not k.startswith("vision_tower")} == {torch.bfloat16}
    assert {t.dtype for k, t in state.items() if k.startswith("vision_tower")} == {torch.float32}
    assert AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).dtype == torch.float32


def test_a_known_release_is_held_to_its_checksum_and_its_loaders_settings(toys, llm_folders, tmp_path, monkeypatch):
    llm = str(llm_folders["first"])
    named = release(tmp_path / "vmamba-s-in1k-224-s3.tar", llm_folders["first"])
    with pytest.raises(ValueError, match="is not the release 'vmamba-s-in1k-224-s3', or .*that of the release is 0b3f"):
        convert_paper_release(named, tmp_path / "out", language_model=llm)
    run = RELEASES["vit-s-in1k-224"].run
    claims = release(tmp_path / "x.tar", llm_folders["first"], model_id=run)
    with pytest.raises(ValueError, match="is not the release 'vit-s-in1k-224'"):
        convert_paper_release(claims, tmp_path / "out", language_model=llm)
    assert not (tmp_path / "out").exists()

    # the loader of the release puts its own settings over what config.json says
    source = release(tmp_path / "toy-release.tar", llm_folders["first"], image_resize_strategy="vmamba-classification")
    known = convert_paper_vlm.Release(
        "r", "vmamba-toy", convert_paper_vlm.file_sha256(source), {"vmamba_feature_stage": 3, "vmamba_feature_layer": 1}
    )
    monkeypatch.setitem(RELEASES, "toy-release", known)
    folder = convert_paper_release(source, tmp_path / "out", encoder_weights=toys["vmamba-toy"], language_model=llm)
    assert AutoProcessor.from_pretrained(folder).image_processor.geometry == "letterbox"


# --- what is refused ------------------------------------------------------------------------------------------------


def wrong(tmp_path, llm_folder, change) -> Path:
    config, mlp, language_model = parts(llm_folder)
    groups = {"projector": mlp, "language_model": language_model, "others": {}}
    change(config, groups)
    content = checkpoint_bytes(groups["projector"], groups["language_model"], groups["others"])
    return write_tar(tmp_path / "toy.tar", {CONFIG: json.dumps(config).encode(), CHECKPOINT: content})


def settings(**changes):
    return lambda config, groups: config["model"].update(changes)


WRONG = {
    "missing projector": (
        lambda c, g: g["others"].update(projector=None),
        "holds no tensors under 'model', 'projector'",
    ),
    "missing language model": (lambda c, g: g["others"].update(llm_backbone=None), "holds no tensors .*'llm_backbone'"),
    "trained encoder": (
        lambda c, g: g["others"].update(vision_backbone={"x": torch.zeros(1)}),
        "also holds vision_backbone, which this conversion would lose",
    ),
    "another connector than it says": (
        settings(arch_specifier="no-align+fused-gelu-mlp"),
        r"does not fit: it lacks connector.layers.2.bias.*another shape for connector.layers.0.bias \(16,\) instead of",
    ),
    "other tap width": (
        lambda c, g: g.update(
            projector=nn.ModuleDict({"projector": nn.Sequential(nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 16))})
        ),
        r"another shape for connector.layers.0.weight \(16, 24\) instead of \(16, 32\)",
    ),
    "smaller language model": (
        lambda c, g: g.update(language_model=LlamaForCausalLM(llama(g["language_model"].config.vocab_size, 8))),
        r"another shape for .*language_model.* \(.*8.*\) instead of",
    ),
    "tokenizer of another language model": (
        lambda c, g: g.update(language_model=LlamaForCausalLM(llama(64))),
        r"have 64 rows, but the tokenizer of the language model and <PAD> make \d+, a multiple of 64",
    ),
    "unknown encoder": (
        settings(vision_backbone_id="clip-vit-l"),
        "vision_backbone_id 'clip-vit-l', which is not known: .*vitdet",
    ),
    "encoder is a list": (
        settings(vision_backbone_id=["vmamba"]),
        r"vision_backbone_id \['vmamba'\], which is not known",
    ),
    "unknown connector": (
        settings(arch_specifier="qformer"),
        "arch_specifier 'qformer', which is not known: .*gelu-mlp",
    ),
    "unknown strategy": (settings(image_resize_strategy="crop"), "image_resize_strategy 'crop', which is not known"),
    "another tap": (
        settings(vmamba_feature_stage=4),
        "taps VMamba at stage 4, block 1: only the last block of stage 3",
    ),
    "inside the stage": (settings(vmamba_feature_layer=0), r"stage 3, block 0: only .*\(block 1\)"),
    "no settings": (lambda c, g: c.pop("model"), "config.json in .* is not that of a release: it needs a dict 'model'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_release_is_refused_in_one_sentence(case, toys, llm_folders, tmp_path):
    change, message = WRONG[case]
    source = wrong(tmp_path, llm_folders["first"], change)
    with pytest.raises(ValueError, match=message) as raised:
        convert_paper_release(
            source, tmp_path / "out", encoder_weights=toys["vmamba-toy"], language_model=str(llm_folders["first"])
        )
    assert "\n" not in str(raised.value) and "toy.tar" in str(raised.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_weights_of_another_encoder_are_refused(toys, llm_folders, tmp_path):
    source = release(tmp_path / "toy.tar", llm_folders["first"], backbone="vmamba-toy-det")
    with pytest.raises(ValueError, match="vmamba_v2_ratio2.pth"):
        convert_paper_release(
            source, tmp_path / "out", encoder_weights=toys["vmamba-toy"], language_model=str(llm_folders["first"])
        )


def test_a_language_model_that_is_not_there(toys, llm_folders, tmp_path):
    source = release(tmp_path / "toy.tar", llm_folders["first"])
    with pytest.raises(
        OSError, match=r"Config and tokenizer of the language model cannot be loaded from .*--language-model"
    ):
        convert_paper_release(
            source, tmp_path / "out", encoder_weights=toys["vmamba-toy"], language_model=str(tmp_path / "no")
        )


def test_weights_of_the_encoder_that_are_not_there(toys, llm_folders, tmp_path):
    source = release(tmp_path / "toy.tar", llm_folders["first"])
    llm = str(llm_folders["first"])
    with pytest.raises(OSError, match=r"'vmamba_toy.golden', which no release .* download x and give it, `--encoder-w"):
        convert_paper_release(source, tmp_path / "out", language_model=llm)
    with pytest.raises(FileNotFoundError, match="There is no checkpoint file"):
        convert_paper_release(source, tmp_path / "out", encoder_weights=tmp_path / "no.pth", language_model=llm)


def test_a_tokenizer_that_needs_more_packages(toys, llm_folders, tmp_path, monkeypatch):
    """Vicuna on the Hub has a tokenizer.model only, and Transformers alone then asks for the wrong package."""
    monkeypatch.setattr(convert_paper_vlm, "is_sentencepiece_available", lambda: False)
    (tmp_path / "vicuna").mkdir()
    shutil.copy(llm_folders["first"] / CONFIG, tmp_path / "vicuna")
    (tmp_path / "vicuna" / "tokenizer.model").write_bytes(b"model")
    source = release(tmp_path / "toy.tar", llm_folders["first"])
    with pytest.raises(OSError, match="such as Vicuna's, is read with `pip install sentencepiece protobuf`"):
        convert_paper_release(
            source, tmp_path / "out", encoder_weights=toys["vmamba-toy"], language_model=str(tmp_path / "vicuna")
        )


@pytest.mark.parametrize("missing", [CONFIG, CHECKPOINT])
def test_an_archive_or_folder_without_its_files(missing, tmp_path):
    members = {name: b"{}" for name in (CONFIG, CHECKPOINT, "README.md") if name != missing}
    with pytest.raises(ValueError, match=f"holds no {missing}: a release is a tar"):
        convert_paper_release(write_tar(tmp_path / "x.tar", members), tmp_path / "out")
    (tmp_path / "x").mkdir()
    with pytest.raises(FileNotFoundError, match=f"lacks {CONFIG} or {CHECKPOINT}"):
        convert_paper_release(tmp_path / "x", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="There is no file"):
        convert_paper_release(tmp_path / "none.tar", tmp_path / "out")


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


UNSAFE = {
    "absolute path": (member("/tmp/evil"), "lies outside"),
    "path upwards": (member("toy/../../evil"), "lies outside"),
    "checkpoint upwards": (member("../" + CHECKPOINT), "lies outside"),
    "backslashes": (member("..\\evil"), "lies outside"),
    "symbolic link": (member("toy", tarfile.SYMTYPE, "/etc"), "link or a device"),
    "checkpoint that is a symbolic link": (member(CHECKPOINT, tarfile.SYMTYPE, "/etc/passwd"), "link or a device"),
    "hard link": (member("x", tarfile.LNKTYPE, CONFIG), "link or a device"),
    "device": (member("x", tarfile.CHRTYPE), "link or a device"),
    "pipe": (member("x", tarfile.FIFOTYPE), "link or a device"),
    "a second config": (member("other/" + CONFIG), "twice"),
}


@pytest.mark.parametrize("case", UNSAFE)
def test_unsafe_archives_are_refused_before_anything_is_written(case, llm_folders, tmp_path):
    info, message = UNSAFE[case]
    source = tmp_path / "in" / "toy.tar"
    source.parent.mkdir()
    release(source, llm_folders["first"])
    with tarfile.open(source, "a") as archive:
        archive.addfile(info, io.BytesIO())
    with pytest.raises(ValueError, match=message):
        convert_paper_release(source, tmp_path / "deep" / "out", language_model=str(llm_folders["first"]))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "in", "toy.tar"]


def test_a_pickle_that_wants_to_run_something_does_not(llm_folders, tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    config, mlp, language_model = parts(llm_folders["first"])
    buffer = io.BytesIO()
    torch.save({"model": {"projector": Evil(), "llm_backbone": {}}}, buffer)
    source = write_tar(tmp_path / "toy.tar", {CONFIG: json.dumps(config).encode(), CHECKPOINT: buffer.getvalue()})
    with pytest.raises(ValueError):
        convert_paper_release(source, tmp_path / "out", language_model=str(llm_folders["first"]))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("packed", ["w:gz", "w:bz2", "w:xz"])
def test_a_damaged_compressed_archive(toys, llm_folders, tmp_path, packed):
    with tarfile.open(release(tmp_path / "toy.tar", llm_folders["first"])) as archive:
        archive.extractall(tmp_path / "files", filter="data")
    with tarfile.open(tmp_path / "packed.tar", packed) as archive:
        archive.add(tmp_path / "files", ".")
    data = bytearray((tmp_path / "packed.tar").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    (tmp_path / "packed.tar").write_bytes(data)
    with pytest.raises((ValueError, OSError)):  # OSError: bz2's "Invalid data stream"
        convert_paper_release(tmp_path / "packed.tar", tmp_path / "out", language_model=str(llm_folders["first"]))
    assert not (tmp_path / "out").exists()


def test_a_config_of_a_release_that_is_too_deep(tmp_path):
    deep = b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    source = write_tar(tmp_path / "toy.tar", {CONFIG: deep, CHECKPOINT: b""})
    with pytest.raises(ValueError, match="is not that of a release"):
        convert_paper_release(source, tmp_path / "out")


def test_a_truncated_archive_and_a_full_disk(toys, llm_folders, tmp_path, monkeypatch):
    source = release(tmp_path / "toy.tar", llm_folders["first"])
    whole = source.read_bytes()
    source.write_bytes(whole[: len(whole) // 2])
    llm = str(llm_folders["first"])
    with pytest.raises(ValueError, match="is not a whole tar file"):
        convert_paper_release(source, tmp_path / "out", encoder_weights=toys["vmamba-toy"], language_model=llm)
    source.write_bytes(whole)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(release_archive.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="GB of free space, but .* are needed"):
        convert_paper_release(source, tmp_path / "out", encoder_weights=toys["vmamba-toy"], language_model=llm)


def test_an_output_folder_with_other_files_is_left_alone(llm_folders, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    source = release(tmp_path / "toy.tar", llm_folders["first"])
    with pytest.raises(ValueError, match="holds files that no conversion made"):
        convert_paper_release(source, tmp_path / "out", language_model=str(llm_folders["first"]))
    assert (tmp_path / "out" / "thesis.tex").read_text() == "x"


def test_the_command(toys, llm_folders, tmp_path, capsys):
    source = release(tmp_path / "toy.tar", llm_folders["first"])
    parts_of_it = ["--encoder-weights", str(toys["vmamba-toy"]), "--language-model", str(llm_folders["first"])]
    assert command(["convert", str(source), "--output", str(tmp_path / "out"), *parts_of_it]) == 0
    assert str(tmp_path / "out") in capsys.readouterr().out
    assert AutoConfig.from_pretrained(tmp_path / "out").model_type == "llava_style"
    for wrong_call, message in (
        ([str(source), "--encoder", "vmamba_toy.golden"], "--encoder is for encoders"),
        ([str(toys["vmamba-toy"]), *parts_of_it], "is no release of the paper's VLMs"),
    ):
        with pytest.raises(SystemExit):
            command(["convert", *wrong_call, "--output", str(tmp_path / "other")])
        assert message in capsys.readouterr().err


def anonymous_memory() -> int:
    """Bytes of this process that no file backs, so that nothing can take them away."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured by Linux's /proc")
def test_weights_are_in_memory_at_most_once(toys, llm_folders, tmp_path):
    """300 MB of language model; one copy goes through memory while the shard is written, none before."""
    config, mlp, language_model = parts(llm_folders["first"])
    rows = language_model.config.vocab_size
    large = LlamaConfig(**{**language_model.config.to_dict(), "intermediate_size": 6 * 2**18, "num_hidden_layers": 1})
    large.save_pretrained(tmp_path / "llm")
    AutoTokenizer.from_pretrained(llm_folders["first"]).save_pretrained(tmp_path / "llm")
    with torch.device("meta"):
        shapes = LlamaForCausalLM(large).state_dict()
    weights = {f"llm.{key}": torch.full(tensor.shape, 0.01) for key, tensor in shapes.items()}
    size = sum(tensor.numel() * 4 for tensor in weights.values())
    assert size > 280e6 and rows == len(weights["llm.model.embed_tokens.weight"])
    (tmp_path / "toy" / "checkpoints").mkdir(parents=True)
    (tmp_path / "toy" / CONFIG).write_text(json.dumps(config))
    torch.save({"model": {"projector": mlp.state_dict(), "llm_backbone": weights}}, tmp_path / "toy" / CHECKPOINT)
    del weights, shapes
    with tarfile.open(tmp_path / "toy.tar", "w") as archive:
        archive.add(tmp_path / "toy", "toy")

    before, peak, done = anonymous_memory(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        convert_paper_release(
            tmp_path / "toy.tar",
            tmp_path / "out",
            encoder_weights=toys["vmamba-toy"],
            language_model=str(tmp_path / "llm"),
        )
    finally:
        done.set()
        watcher.join()
    print(f"{size / 1e6:.0f} MB of weights, {(peak[0] - before) / 1e6:.0f} MB of memory")
    assert peak[0] - before <= 1.1 * size + 50e6


@pytest.mark.parametrize("scheme", ["first", "legacy"])
def test_a_processor_without_a_template_of_its_own_reads_as_the_paper(scheme):
    """Also what a recipe with `chat_template: vicuna` trains on."""
    tokenizer = make_tokenizer(scheme)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    processor = LlavaStyleProcessor(LlavaStyleImageProcessor(geometry="letterbox", size=16), tokenizer)
    alone = tokenizer(paper_prompt("Which digit?")).input_ids
    for content in ([{"type": "image", "image": Image.new("RGB", (16, 16))}], []):
        message = {"role": "user", "content": [*content, {"type": "text", "text": "Which digit?"}]}
        inputs = processor.apply_chat_template([message], tokenize=True, return_dict=True, add_generation_prompt=True)
        ids = [token for token in inputs["input_ids"][0] if token != processor.image_token_id]
        assert ids == alone
