"""`ssm-vlm push` and `push_to_hub`, against a Hub on localhost: what arrives, what comes back, what is refused."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from card_toys import save_encoder, save_photo, save_vlm
from hub_stub import USER
from huggingface_hub import ModelCard
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from ssm_vlm import LlavaStyleForConditionalGeneration, load_encoder, push_command
from ssm_vlm.cli import main
from ssm_vlm.push_command import push_folder

REPO = f"{USER}/toy"


@pytest.fixture(scope="module")
def saved_vlm(tmp_path_factory):
    return save_vlm(tmp_path_factory.mktemp("vlm"))


@pytest.fixture
def vlm(saved_vlm, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(saved_vlm, tmp_path / "vlm")


@pytest.fixture
def hub_here(hub, monkeypatch, tmp_path):
    """This process takes the stub for the Hub."""
    hub.patch(monkeypatch, tmp_path / "cache")
    return hub


def answers(model, processor, photo):
    """Logits of a question about a picture."""
    content = [{"type": "image", "image": photo}, {"type": "text", "text": "what?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        return model(**inputs).logits


def test_a_pushed_model_arrives_byte_for_byte_and_comes_back(hub_here, vlm, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in vlm.iterdir()}
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "trainer_state.json", "lock"):
        (vlm / name).write_bytes(b"state")
    (vlm / "answers.jsonl").write_text("{}\n")
    (vlm / "checkpoint-7").mkdir()
    (vlm / "checkpoint-7" / "model.safetensors").write_bytes(b"state")
    assert main(["push", str(vlm), REPO]) == 0
    assert capsys.readouterr().out.strip() == f"{hub_here.endpoint}/{REPO}"

    files = hub_here.files(REPO)
    card = files.pop("README.md").decode()
    assert files == before
    assert hub_here.repositories[REPO].lfs and f"PUT /lfs/{next(iter(hub_here.stored))}" in hub_here.requests
    assert f'from_pretrained("{REPO}")' in card and "README.md" not in os.listdir(vlm)

    photo = save_photo(tmp_path)
    here = answers(AutoModelForImageTextToText.from_pretrained(vlm), AutoProcessor.from_pretrained(vlm), photo)
    model, processor = AutoModelForImageTextToText.from_pretrained(REPO), AutoProcessor.from_pretrained(REPO)
    assert isinstance(model, LlavaStyleForConditionalGeneration)
    assert torch.equal(answers(model, processor, photo), here)


def test_the_comparison_sees_a_single_changed_weight(hub_here, vlm, tmp_path):
    push_folder(vlm, REPO)
    (name,) = (name for name in hub_here.files(REPO) if name.endswith(".safetensors"))
    weights = bytearray(hub_here.files(REPO)[name])
    size = int.from_bytes(weights[:8], "little")
    start, end = json.loads(weights[8 : 8 + size])["connector.layers.0.weight"]["data_offsets"]
    for place in range(8 + size + start, 8 + size + end):
        weights[place] ^= 1
    hub_here.repositories[REPO].branches["main"][name] = bytes(weights)
    photo = save_photo(tmp_path)
    here = answers(AutoModelForImageTextToText.from_pretrained(vlm), AutoProcessor.from_pretrained(vlm), photo)
    there = answers(AutoModelForImageTextToText.from_pretrained(REPO), AutoProcessor.from_pretrained(REPO), photo)
    assert not torch.equal(there, here)


def test_an_encoder_by_its_id_on_the_hub(hub_here, tmp_path):
    folder = save_encoder(tmp_path / "encoder")
    push_folder(folder, f"{USER}/encoder")
    here, there = load_encoder(folder), load_encoder(f"{USER}/encoder")
    pixels = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(there(pixels).feature_maps[-1], here(pixels).feature_maps[-1])
    processor = AutoImageProcessor.from_pretrained(f"{USER}/encoder")
    assert processor.to_dict() == AutoImageProcessor.from_pretrained(folder).to_dict()


def test_push_to_hub_of_a_model_takes_our_card_along(hub_here, vlm):
    model, processor = AutoModelForImageTextToText.from_pretrained(vlm), AutoProcessor.from_pretrained(vlm)
    model.push_to_hub("toy", tags=["mine"])
    card = ModelCard(hub_here.files(REPO)["README.md"].decode())
    assert card.data.pipeline_tag == "image-text-to-text" and {"mine", "ssm-vlm"} <= set(card.data.tags)
    assert f'from_pretrained("{REPO}")' in card.text and "automatically generated" not in card.text
    assert hub_here.files(REPO)["model.safetensors"] == (vlm / "model.safetensors").read_bytes()
    processor.push_to_hub("toy")
    assert "tokenizer.json" in hub_here.files(REPO)

    hub_here.repositories[REPO].branches["main"]["README.md"] = b"---\nlicense: mit\n---\nMine.\n"
    model.push_to_hub("toy")
    assert hub_here.files(REPO)["README.md"].decode().endswith("Mine.\n")


def test_a_card_of_ones_own_is_pushed_as_it_is_and_never_replaced(hub_here, vlm):
    own = "---\nlicense: mit\n---\nMy own words.\n"
    (vlm / "README.md").write_text(own)
    push_folder(vlm, REPO)
    assert hub_here.files(REPO)["README.md"].decode() == own
    (vlm / "README.md").unlink()
    push_folder(vlm, REPO)
    assert hub_here.files(REPO)["README.md"].decode() == own


def test_a_card_that_we_wrote_is_rendered_anew(hub_here, vlm):
    assert main(["card", str(vlm)]) == 0
    push_folder(vlm, REPO)
    (vlm / "answers.scores.json").unlink()
    push_folder(vlm, REPO)
    assert "model-index" not in hub_here.files(REPO)["README.md"].decode()


def test_branch_message_and_privacy(hub_here, vlm, capsys):
    options = ["--private", "--branch", "trial", "--message", "A first trial"]
    assert main(["push", str(vlm), REPO, *options]) == 0
    assert capsys.readouterr().out.strip().endswith(f"{REPO}/tree/trial")
    repository = hub_here.repositories[REPO]
    assert repository.private and repository.messages == ["A first trial"]
    assert "config.json" in hub_here.files(REPO, "trial") and "config.json" not in hub_here.files(REPO)
    AutoModelForImageTextToText.from_pretrained(REPO, revision="trial")


def test_weights_of_an_earlier_push_do_not_stay(hub_here, vlm):
    push_folder(vlm, REPO)
    model = AutoModelForImageTextToText.from_pretrained(vlm)
    (vlm / "model.safetensors").unlink()
    model.save_pretrained(vlm, max_shard_size="1MB")
    assert len(list(vlm.glob("model-*.safetensors"))) > 1
    push_folder(vlm, REPO)
    names = {name for name in hub_here.files(REPO) if ".safetensors" in name}
    assert names == {path.name for path in vlm.glob("*.safetensors*")} and "model.safetensors" not in names
    AutoModelForImageTextToText.from_pretrained(REPO)


def test_paths_of_this_machine_are_not_pushed(hub_here, vlm):
    recipe = yaml.safe_load((vlm / "recipe.yaml").read_text())
    paths = {
        "data_path": "/home/me/mix.json",
        "image_root": "C:\\Me\\pictures\\",
        "output_dir": "runs/relative",
        "slash": "/",
    }
    (vlm / "recipe.yaml").write_text(yaml.safe_dump(recipe | paths | {"more": ["~/me/a.json", 3]}))
    scores = json.loads((vlm / "answers.scores.json").read_text())
    (vlm / "answers.scores.json").write_text(json.dumps(scores | {"predictions": "/home/me/RUN/answers.jsonl"}))
    (vlm / "origin.json").write_text(json.dumps({"layout": "other", "source": "/home/me/weights.pth"}))
    before = {path.name: path.read_bytes() for path in vlm.iterdir()}
    push_folder(vlm, REPO)
    assert {path.name: path.read_bytes() for path in vlm.iterdir()} == before
    files = hub_here.files(REPO)
    assert not any(
        b"/me/" in files[name] for name in ("recipe.yaml", "answers.scores.json", "origin.json", "README.md")
    )
    assert yaml.safe_load(files["recipe.yaml"]) == recipe | {
        "data_path": "mix.json",
        "image_root": "pictures",
        "output_dir": "runs/relative",
        "slash": "/",
        "more": ["a.json", 3],
    }
    assert json.loads(files["answers.scores.json"]) == scores | {"predictions": "answers.jsonl"}
    assert files["finished.json"] == before["finished.json"] and files["config.json"] == before["config.json"]


def test_a_path_that_is_shortened_is_told(hub_here, vlm, monkeypatch):
    told = []
    monkeypatch.setattr(push_command.logger, "warning", told.append)
    push_folder(vlm, REPO)
    assert told == []
    (vlm / "recipe.yaml").write_text("data_path: /home/me/mix.json\n")
    push_folder(vlm, REPO)
    assert told == ["Of paths on this machine only the last part was pushed, in recipe.yaml."]


# What is refused, before anything is uploaded


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("config.json", "config.json"),
        ("model.safetensors", "model.safetensors"),
        ("processor_config.json", "processor_config.json"),
        ("tokenizer.json", "tokenizer.json"),
        ("tokenizer_config.json", "tokenizer_config.json"),
    ],
)
def test_an_incomplete_model_is_refused_by_what_it_lacks(hub_here, vlm, capsys, lost, named):
    (vlm / lost).unlink()
    assert main(["push", str(vlm), REPO]) == 1
    assert f"lacks {named}" in capsys.readouterr().err and not hub_here.repositories


def test_a_lost_shard_is_named(hub_here, vlm):
    model = AutoModelForImageTextToText.from_pretrained(vlm)
    (vlm / "model.safetensors").unlink()
    model.save_pretrained(vlm, max_shard_size="1MB")
    lost = sorted(vlm.glob("model-*.safetensors"))[0]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {lost.name}"):
        push_folder(vlm, REPO)


def test_lost_code_is_named(hub_here, vlm):
    config = json.loads((vlm / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_lost.LostConfig"}
    (vlm / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match=r"lacks configuration_lost\.py"):
        push_folder(vlm, REPO)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pth", "deeper/data.pkl"])
def test_pickles_are_refused(hub_here, vlm, name):
    (vlm / name).parent.mkdir(exist_ok=True)
    (vlm / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=f"{name}: a pickle can run code"):
        push_folder(vlm, REPO)
    assert not hub_here.repositories


@pytest.mark.parametrize(("name", "kind"), [("recipe.yaml", "YAML"), ("answers.scores.json", "JSON")])
def test_broken_notes_are_refused(hub_here, vlm, capsys, name, kind):
    (vlm / name).write_text("a: [")
    assert main(["push", str(vlm), REPO]) == 1
    assert f"{name} is not {kind}" in capsys.readouterr().err and not hub_here.repositories


def test_weights_that_were_cut_off_are_refused(hub_here, vlm):
    data = (vlm / "model.safetensors").read_bytes()
    (vlm / "model.safetensors").write_bytes(data[:-10])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        push_folder(vlm, REPO)


def test_another_kind_of_model_is_refused(hub_here, vlm, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(vlm)
    model.language_model.save_pretrained(tmp_path / "language_model")
    with pytest.raises(ValueError, match="'llama' model, which is neither"):
        push_folder(tmp_path / "language_model", REPO)


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_without_a_token_that_fits(hub, monkeypatch, tmp_path, vlm, capsys, token):
    hub.patch(monkeypatch, tmp_path / "cache", token=token)
    assert main(["push", str(vlm), REPO]) == 1
    message = capsys.readouterr().err
    assert "does not let you push" in message and "hf auth login" in message and message.count("\n") == 1


def test_offline(monkeypatch, vlm, capsys):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["push", str(vlm), REPO]) == 1
    message = capsys.readouterr().err
    assert "cannot be reached" in message and "HF_HUB_OFFLINE" in message and message.count("\n") == 1


def test_no_server(hub, monkeypatch, tmp_path, vlm, capsys):
    hub.patch(monkeypatch, tmp_path / "cache")
    hub.server.shutdown()
    hub.server.server_close()
    assert main(["push", str(vlm), REPO]) == 1
    message = capsys.readouterr().err
    assert "cannot be reached" in message and message.count("\n") == 1


def test_a_bad_name(hub_here, vlm, capsys):
    assert main(["push", str(vlm), "a/b/c"]) == 1
    assert "a/b/c" in capsys.readouterr().err


def test_metadata_that_the_hub_refuses(hub_here, vlm, capsys):
    (vlm / "README.md").write_text("---\nlicense: my own\n---\nMine.\n")
    assert main(["push", str(vlm), REPO]) == 1
    assert "license 'my own' is not allowed" in capsys.readouterr().err


# Other processes


LOAD = """
import sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
if sys.argv[2] == "package":
    import ssm_vlm
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=sys.argv[2] == "code")
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=sys.argv[2] == "code")
assert ("ssm_vlm" in sys.modules) == (sys.argv[2] == "package")
content = [{"type": "image", "image": "photo.jpg"}, {"type": "text", "text": "what?"}]
inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
                                       tokenize=True, return_dict=True, return_tensors="pt")
with torch.no_grad():
    torch.save(model(**inputs).logits, "logits.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["package", "code"])
def test_in_processes_of_their_own(hub, vlm, tmp_path, way):
    """The command as users type it, then a fresh interpreter that loads from the Hub, with and without the package."""
    environment = hub.environment(tmp_path / "home")
    photo = save_photo(tmp_path)
    for argv in (["-m", "ssm_vlm", "push", str(vlm), REPO], ["-c", LOAD, REPO, way]):
        done = subprocess.run([sys.executable, *argv], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    here = answers(AutoModelForImageTextToText.from_pretrained(vlm), AutoProcessor.from_pretrained(vlm), photo)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), here)
