"""The three training scripts: what a run directory holds, swapping by one field, bad input, several processes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from ssm_vlm import BackboneForImageClassification, LlavaStyleForConditionalGeneration, load_encoder
from ssm_vlm.training.datasets import LlavaConversations
from ssm_vlm.training.image_folder import ImageFolder
from ssm_vlm.training.train_encoder import main as train_encoder
from ssm_vlm.training.train_language_model import main as train_language_model
from ssm_vlm.training.train_language_model import train_tokenizer
from ssm_vlm.training.train_vlm import main as train_vlm

LLAMA = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA |= {"intermediate_size": 24, "max_position_embeddings": 512}


def options(arguments: dict) -> list[str]:
    return [f"--{key}={value}" for key, value in arguments.items()]


@pytest.fixture(scope="module")
def encoder_run(scenes, tmp_path_factory):
    arguments = {
        "vision_encoder": "digit_vit.digitscenes_64",
        "pooling": "max",
        "attributes": True,
        "train_folder": scenes / "classification" / "train",
        "val_folder": scenes / "classification" / "val",
        "output_dir": tmp_path_factory.mktemp("encoder"),
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "use_cpu": True,
    }
    return train_encoder(options(arguments))


@pytest.fixture(scope="module")
def vlm_run(vlm_options, tmp_path_factory):
    return train_vlm(vlm_options(tmp_path_factory.mktemp("vlm"), max_steps=2))


# --- the encoder ---------------------------------------------------------------------------------------------------


def test_a_finished_encoder_is_a_classifier_whose_accuracy_is_what_it_says(encoder_run, scenes):
    from ssm_vlm import LlavaStyleImageProcessor

    model = AutoModelForImageClassification.from_pretrained(encoder_run.path)
    assert type(model) is BackboneForImageClassification
    assert model.config.pooling == "max" and model.config.label_groups == [6, 10]
    assert list(model.config.id2label.values()) == ["blue", "green", "purple", "red", "white", "yellow", *"0123456789"]
    data = ImageFolder(
        scenes / "classification" / "val",
        LlavaStyleImageProcessor.from_pretrained(encoder_run.path),
        attributes=True,
        groups=[list(model.config.id2label.values())[:6], list("0123456789")],
    )
    right = 0
    for row in data:
        with torch.no_grad():
            logits = model(row["pixel_values"][None]).logits[0]
        right += [logits[:6].argmax().item(), logits[6:].argmax().item()] == row["labels"]
    assert encoder_run.summary["accuracy"] == right / len(data)
    assert encoder_run.summary["steps"] == 3


def test_its_backbone_is_an_encoder_with_its_image_processor(encoder_run):
    backbone = load_encoder(encoder_run.path / "backbone")
    classifier = AutoModelForImageClassification.from_pretrained(encoder_run.path).state_dict()
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, classifier[f"backbone.{name}"])
    named = load_encoder("digit_vit.digitscenes_64", weights_dir=encoder_run.path.parent / link(encoder_run))
    assert all(torch.equal(tensor, backbone.state_dict()[name]) for name, tensor in named.state_dict().items())
    assert (encoder_run.path / "backbone" / "preprocessor_config.json").is_file()


def link(run) -> str:
    """A folder of weights by name, as the study makes it."""
    folder = run.path.parent / "weights"
    folder.mkdir(exist_ok=True)
    target = folder / "digit_vit.digitscenes_64"
    if not target.exists():
        target.symlink_to(run.path / "backbone")
    return folder.name


def test_plain_class_folders_make_one_group(scenes, tmp_path):
    arguments = {
        "vision_encoder": "digit_identity.digitscenes_64",
        "train_folder": scenes / "classification" / "train",
        "val_folder": scenes / "classification" / "val",
        "output_dir": tmp_path,
        "max_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
    }
    run = train_encoder(options(arguments))
    model = AutoModelForImageClassification.from_pretrained(run.path)
    assert model.config.num_labels == 60 and model.config.label_groups == [60]


# --- the language model --------------------------------------------------------------------------------------------


def test_a_finished_language_model_loads_with_its_tokenizer(language_model, scenes):
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    model = AutoModelForCausalLM.from_pretrained(language_model)
    assert len(tokenizer) == model.config.vocab_size == model.get_input_embeddings().num_embeddings
    for role in ("bos", "eos", "pad"):
        assert getattr(model.config, f"{role}_token_id") == getattr(tokenizer, f"{role}_token_id") is not None
    assert tokenizer.image_token == "<image>" and tokenizer.encode("<image>") == [tokenizer.image_token_id]
    text = json.loads((scenes / "text.json").read_text())[0]["conversations"][0]["value"]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "5"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False).endswith("ASSISTANT: 5</s>")


def test_digits_are_tokens_of_their_own_and_instructions_are_one_token(language_model):
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    assert tokenizer.tokenize("[0.25]")[-4:-1] == [".", "2", "5"]
    assert len(tokenizer.tokenize("Answer the question using a single word or phrase.")) == 1


def test_any_text_survives_the_tokenizer():
    tokenizer = train_tokenizer(["Answer in one word. Yes."] * 4 + ["another text"], 300)
    for text in ("Answer in one word. Yes.", "zwölf Boxkämpfer, 日本 🙂\n\t 3.14", "  two  spaces "):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.tokenize("Answer in one word.") == ["Answer in one word."]
    assert len(tokenizer.tokenize("another text")) > 1, "what is rare or short stays in pieces"


def test_the_vocabulary_of_the_tokenizer_goes_over_that_of_the_config(scenes, tmp_path):
    arguments = {
        "language_model_config": json.dumps(LLAMA | {"vocab_size": 7, "pad_token_id": 5}),
        "vocabulary": 270,
        "data_path": scenes / "text.json",
        "output_dir": tmp_path,
        "max_steps": 1,
        "use_cpu": True,
    }
    model = AutoModelForCausalLM.from_pretrained(train_language_model(options(arguments)).path)
    assert model.config.vocab_size > 260 and model.config.pad_token_id == 0


# --- the vision-language model -------------------------------------------------------------------------------------


def test_a_finished_model_is_complete(vlm_run):
    names = {path.name for path in vlm_run.path.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "processor_config.json"} <= names
    assert {"tokenizer.json", "chat_template.jinja", "recipe.yaml", "finished.json"} <= names
    assert {"modeling_llava_style.py", "processing_llava_style.py"} <= names  # its own code
    assert not any(name.startswith(("checkpoint", "training_args", "model.partial", "not_finite")) for name in names)
    recipe = yaml.safe_load((vlm_run.path / "recipe.yaml").read_text())
    assert recipe["vision_encoder"] == "digit_identity.digitscenes_64" and recipe["max_steps"] == 2
    processor = AutoProcessor.from_pretrained(vlm_run.path)
    assert processor.image_processor.downsampling == [[2, "ceil"]] * 3
    model = AutoModelForImageTextToText.from_pretrained(vlm_run.path)
    assert type(model) is LlavaStyleForConditionalGeneration and model.config.freeze_vision
    assert model.config.tap_norm == "layernorm" and model.config.box_frame == "centered_square"


def test_a_trained_model_does_not_look_ahead(vlm_run, scenes):
    """The loss of a model that saw the answer would be worth nothing."""
    processor = AutoProcessor.from_pretrained(vlm_run.path)
    model = AutoModelForImageTextToText.from_pretrained(vlm_run.path)
    row = LlavaConversations(scenes / "train.json", scenes / "images")[0]
    content = [{"type": "image", "image": row["image"]}, {"type": "text", "text": "Which digit is it?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        whole = model(**inputs).logits
        inputs["input_ids"][0, -1] += 1
        other = model(**inputs).logits
    assert torch.equal(whole[:, :-1], other[:, :-1]) and not torch.equal(whole[:, -1], other[:, -1])


def test_training_does_not_look_ahead_either(vlm_options, tmp_path, monkeypatch):
    """The model is the one that the Trainer gets, in train mode, and not one that was saved and loaded since."""
    moved = []
    forward = LlavaStyleForConditionalGeneration.forward

    def look(self, **kwargs):
        if self.training and not moved:
            self.eval()
            ids = kwargs["input_ids"]
            kwargs |= {"labels": None, "attention_mask": torch.ones_like(ids)}
            changed = torch.cat([ids[:, :-1], ids[:, -1:] % 5 + 10], dim=1)
            with torch.no_grad():
                first, second = (forward(self, **kwargs | {"input_ids": i}).logits for i in (ids, changed))
            moved.append((first - second).abs().amax(dim=(0, 2)))  # [L]
        raise KeyboardInterrupt

    monkeypatch.setattr(LlavaStyleForConditionalGeneration, "forward", look)
    with pytest.raises(KeyboardInterrupt):
        train_vlm(vlm_options(tmp_path, max_steps=1))
    assert moved[0][-1] > 0 and moved[0][:-1].max() == 0


@pytest.mark.parametrize(
    "encoder",
    ["digit_vmamba.digitscenes_64", "digit_vit.digitscenes_64", "digit_window_attention.digitscenes_64"],
)
def test_one_field_swaps_the_encoder(encoder, vlm_options, vlm_run, tmp_path):
    arguments = vlm_options(tmp_path, max_steps=2)
    swapped = [f"--vision_encoder={encoder}" if a.startswith("--vision_encoder=") else a for a in arguments]
    assert sum(a != b for a, b in zip(arguments, swapped, strict=True)) == 1
    run = train_vlm(swapped)
    model = AutoModelForImageTextToText.from_pretrained(run.path)
    expected = load_encoder(encoder, pretrained=False)
    assert {n: p.shape for n, p in model.vision_tower.named_parameters()} == {
        n: p.shape for n, p in expected.named_parameters()
    }
    recipes = [yaml.safe_load((r.path / "recipe.yaml").read_text()) for r in (run, vlm_run)]
    assert {key for key in recipes[0] if recipes[0][key] != recipes[1][key]} == {"vision_encoder"}
    same = [load_file(r.path / "model.safetensors") for r in (run, vlm_run)]
    assert same[0]["connector.layers.0.weight"].shape == same[1]["connector.layers.0.weight"].shape


def test_weights_come_from_a_folder_by_name_or_from_the_folder_itself(vlm_options, encoder_run, tmp_path):
    backbone = load_file(encoder_run.path / "backbone" / "model.safetensors")
    ways = [
        {
            "vision_encoder": "digit_vit.digitscenes_64",
            "vision_weights_dir": encoder_run.path.parent / link(encoder_run),
            "vision_pretrained": True,
        },
        {"vision_encoder": encoder_run.path / "backbone", "vision_pretrained": True},
    ]
    for number, way in enumerate(ways):
        run = train_vlm(vlm_options(tmp_path / str(number), max_steps=1, **way))
        trained = load_file(run.path / "model.safetensors")
        assert all(torch.equal(trained[f"vision_tower.{name}"], tensor) for name, tensor in backbone.items())


def test_any_vision_model_is_an_encoder_with_a_tap_by_name(vlm_options, tmp_path):
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    stock = ViTForImageClassification(config)
    stock.save_pretrained(tmp_path / "vit")
    different = {"vision_encoder": tmp_path / "vit", "vision_pretrained": True, "max_steps": 1}
    with pytest.raises(OSError, match=r"vit' holds no image processor that can be read, .*: save one beside the model"):
        train_vlm(vlm_options(tmp_path / "runs", **different))
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path / "vit")
    origin = {"encoder": None, "layout": "timm_vit", "source": "vit_published.safetensors"}
    (tmp_path / "vit" / "origin.json").write_text(json.dumps(origin))
    for tap, block in ((None, "block3"), ("block2", "block2")):
        run = train_vlm(vlm_options(tmp_path / "runs", **different, **({"vision_tap": tap} if tap else {})))
        model = AutoModelForImageTextToText.from_pretrained(run.path)
        image_processor = AutoProcessor.from_pretrained(run.path).image_processor
        assert model.config.vision_config.out_features == [block]
        weights = model.vision_tower.vision_model.layers[0].mlp.fc1.weight
        assert torch.equal(weights, stock.vit.layers[0].mlp.fc1.weight)
        assert image_processor.geometry == "letterbox" and image_processor.downsampling == [[8, "floor"]]
        assert list(image_processor.image_mean) == [0.1, 0.2, 0.3]
        assert "file `vit_published.safetensors`" in (run.path / "README.md").read_text()


def test_other_pictures_or_weights_or_words_give_another_run(vlm_options, tmp_path, scenes, language_model):
    """And the same things elsewhere give the same."""
    import shutil

    monitored = {"max_steps": 1, "save_strategy": "no"}
    first = train_vlm(vlm_options(tmp_path / "a", **monitored)).path.name
    moved = shutil.copytree(scenes, tmp_path / "moved")
    lm = shutil.copytree(language_model, tmp_path / "lm")
    places = {"data_path": moved / "mixed.json", "image_root": moved / "images", "language_model": lm}
    assert train_vlm(vlm_options(tmp_path / "b", **monitored, **places)).path.name == first

    picture = moved / "images" / json.loads((moved / "mixed.json").read_text())[0]["image"]
    picture.write_bytes(picture.read_bytes() + b"\0")
    names = {first, train_vlm(vlm_options(tmp_path / "c", **monitored, **places)).path.name}
    template = lm / "chat_template.jinja"
    template.write_text(template.read_text().replace("A chat between", "A talk between"))
    names.add(train_vlm(vlm_options(tmp_path / "d", **monitored, **places)).path.name)
    assert len(names) == 3


def test_a_language_model_without_image_or_padding_token_gets_both(vlm_options, tmp_path):
    words = ["USER:", "ASSISTANT:", "Which", "digit", "is", "?", "the", "word", "image", ".", "a", "chat", "between"]
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *dict.fromkeys(words)])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    tokenizer.save_pretrained(tmp_path / "lm")
    sizes = {key: value for key, value in LLAMA.items() if key != "model_type"}
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "lm")

    run = train_vlm(vlm_options(tmp_path, max_steps=1, language_model=tmp_path / "lm", chat_template="vicuna"))
    processor = AutoProcessor.from_pretrained(run.path)
    model = AutoModelForImageTextToText.from_pretrained(run.path)
    image, pad = processor.image_token_id, processor.tokenizer.pad_token_id
    assert image == model.config.image_token_id and pad is not None and len({image, pad, 0, 1, 2}) == 5
    assert processor.tokenizer.encode("<image>", add_special_tokens=False) == [image]
    assert model.get_input_embeddings().num_embeddings == 64 > max(image, pad)
    assert "USER:" in processor.chat_template


@pytest.mark.parametrize(
    ("different", "message"),
    [
        ({"vision_encoder": "digit_vmama.digitscenes_64"}, "digit_vmamba.digitscenes_64"),
        ({"vision_encoder": "nobody-here/no-model"}, "No folder or model on the Hub is 'nobody-here/no-model': "),
        ({"vision_tap": "stage9"}, "has no tap 'stage9'; choose stem, stage1, stage2"),
        ({"chat_template": "vicunna"}, "the key 'chat_template' has a bad value: invalid choice: 'vicunna'"),
        ({"connector": "mlp9"}, "mlp9"),
        ({"tap_norm": "batchnorm"}, "the key 'tap_norm' has a bad value: invalid choice: 'batchnorm'"),
        ({"box_frame": "square"}, "the key 'box_frame' has a bad value: invalid choice: 'square'"),
        ({"geometry": "letterbocks"}, "letterbocks"),
        ({"data_path": "missing.json"}, "missing.json: no such file of conversations"),
        ({"image_root": "missing"}, "missing: no such folder of images"),
        ({"on_bad_row": "ignore"}, "the key 'on_bad_row' has a bad value: invalid choice: 'ignore'"),
        ({"vision_pretrained": True}, "This project trains it: give weights_dir=FOLDER"),
        ({"vision_pretrained": True, "vision_weights_dir": "nowhere"}, "There is no saved encoder in"),
        ({"language_model": "missing/model"}, "language_model: 'missing/model' cannot be loaded: "),
    ],
)
def test_bad_recipes_end_in_one_sentence_and_leave_nothing(different, message, vlm_options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError)) as error:
        train_vlm(vlm_options(tmp_path / "runs", **different))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("different", "message"),
    [
        ({"vision_encoder": "digit_vmama.digitscenes_64"}, "nearest names are digit_vmamba.digitscenes_64"),
        ({"vision_encoder": "."}, "The folder '.' holds no config.json"),
        ({"vision_tap": "stage9"}, "has no tap 'stage9'"),
        ({"connector": "mlp9"}, "mlp9"),
        ({"connector": "average_pool_mlp2", "connector_grid": "[0,1]"}, "both at least 1"),
    ],
)
def test_the_model_is_checked_before_the_data_are_read(different, message, vlm_options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        train_vlm(vlm_options(tmp_path / "runs", data_path="missing.json", **different))


@pytest.mark.parametrize(
    ("main", "given", "message"),
    [
        (train_vlm, {}, "The recipe lacks the key 'vision_encoder': Name in the table"),
        (train_vlm, {"vision_encoder": "x"}, "The recipe lacks the key 'language_model': Hub id or folder"),
        (train_vlm, {"vision_encoder": "x", "language_model": "y"}, "The recipe lacks the key 'data_path'"),
        (train_encoder, {}, "The recipe lacks the key 'vision_encoder'"),
        (train_encoder, {"vision_encoder": "x", "train_folder": "y"}, "The recipe lacks the key 'val_folder'"),
        (train_language_model, {}, "The recipe lacks the key 'language_model_config'"),
        (train_language_model, {"language_model_config": "{a: 1}"}, "The recipe lacks the key 'data_path'"),
        (train_language_model, {"language_model_config": "{a: 1}", "data_path": "x"}, "lacks the key 'model_type'"),
    ],
)  # fmt: skip
def test_missing_keys_are_named(main, given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        main(options({**given, "output_dir": tmp_path / "runs"}))
    assert not (tmp_path / "runs").exists()


def test_a_picture_that_will_not_decode_is_named(vlm_options, scenes, tmp_path):
    import shutil

    moved = shutil.copytree(scenes, tmp_path / "moved")
    (moved / "images" / "train" / "000003.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="000003.png"):
        train_vlm(vlm_options(tmp_path, data_path=moved / "mixed.json", image_root=moved / "images"))


# --- as programs ---------------------------------------------------------------------------------------------------

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "warning"}
SCRIPT = ["-m", "ssm_vlm.training.train_vlm"]


def program(*command: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=280, check=False, **kwargs)


@pytest.mark.slow
def test_a_recipe_file_is_trained_quietly_by_the_script(vlm_options, tmp_path):
    """With the verbosity that users have, nothing but the losses and where the run is."""
    arguments = dict(argument.removeprefix("--").split("=", 1) for argument in vlm_options(tmp_path / "runs"))
    del arguments["max_steps"], arguments["use_cpu"]
    lines = [f"{key}: {value}" for key, value in arguments.items()]
    (tmp_path / "recipe.yaml").write_text("\n".join(lines) + "\n")
    done = program(sys.executable, *SCRIPT, str(tmp_path / "recipe.yaml"), "--max_steps", "2")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    *losses, last = done.stdout.splitlines()
    assert last == f"finished: {folder}" and all(line.startswith("{'") for line in losses) and len(losses) == 3
    assert done.stderr == ""
    again = program(sys.executable, *SCRIPT, str(tmp_path / "recipe.yaml"), "--max_steps", "2")
    assert again.stdout == f"finished: {folder}\n" and again.stderr == ""


@pytest.mark.slow
def test_what_a_user_can_put_right_is_one_line_without_a_traceback(tmp_path):
    (tmp_path / "recipe.yaml").write_text("vision_encodr: x\n")
    done = program(sys.executable, *SCRIPT, str(tmp_path / "recipe.yaml"))
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        f"error: {tmp_path}/recipe.yaml has the key 'vision_encodr', which is no key of a recipe; did you mean "
        "'vision_encoder'.\n"
    )


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "--standalone"],
    "accelerate launch": [
        "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
    ],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_train_one_model(launcher, vlm_options, tmp_path):
    """Six pictures and six texts in batches of 2 x 2: pictures, text, and in the last batch one process with each."""
    arguments = [
        argument
        for argument in vlm_options(tmp_path / "runs", max_steps=3, per_device_train_batch_size=2)
        if not argument.startswith("--use_cpu")
    ]
    done = program(sys.executable, "-m", *LAUNCHERS[launcher], *SCRIPT, *arguments)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert done.stdout.count("finished:") == 1 and "Warning" not in done.stderr, done.stderr
    summary = json.loads((folder / "finished.json").read_text())
    assert summary["steps"] == 3 and [entry["epoch"] for entry in summary["log"]] == pytest.approx([1 / 3, 2 / 3, 1])
    AutoModelForImageTextToText.from_pretrained(folder)
    assert not list(folder.glob("checkpoint-*")) and not list(folder.glob("*.partial"))

    whole = [a for a in arguments if not a.startswith("--per_device")] + ["--per_device_train_batch_size=4"]
    whole = [f"--output_dir={tmp_path / 'one'}" if a.startswith("--output_dir") else a for a in whole]
    alone = train_vlm(whole)
    assert alone.path.name != folder.name
    losses = [entry["loss"] for entry in alone.summary["log"]]
    assert [entry["loss"] for entry in summary["log"]] == pytest.approx(losses, rel=0.02), "dropout differs a little"


@pytest.mark.slow
def test_two_processes_resume_exactly(vlm_options, tmp_path):
    def launch(output: Path, **different) -> subprocess.Popen:
        arguments = vlm_options(output, max_steps=40, save_steps=4, per_device_train_batch_size=2, **different)
        launcher = ["torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
        return subprocess.Popen(
            [sys.executable, "-m", *launcher, *SCRIPT, *arguments],
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    assert launch(tmp_path / "whole").wait(280) == 0
    kill_after_a_checkpoint(launch(tmp_path / "killed"), tmp_path / "killed")
    assert launch(tmp_path / "killed").wait(280) == 0
    (whole,), (killed,) = (list((tmp_path / name).iterdir()) for name in ("whole", "killed"))
    assert same_files(whole, killed)


def kill_after_a_checkpoint(process: subprocess.Popen, output: Path) -> str:
    """Kills a process and its children once a checkpoint is whole, and gives its name."""
    deadline = time.monotonic() + 280
    while not (found := list(output.glob("*/checkpoint-*/trainer_state.json"))):
        assert process.poll() is None and time.monotonic() < deadline, "it ended before there was a checkpoint"
        time.sleep(0.005)
    # torchrun's workers are in sessions of their own and would go on
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.kill()
    process.wait(60)
    psutil.wait_procs(family, timeout=60)
    (folder,) = output.iterdir()
    assert not (folder / "finished.json").exists(), "it was too fast to be killed"
    return found[0].parent.name


def same_files(first: Path, second: Path) -> bool:
    """Whether two runs ended in the same weights, losses and number of steps."""
    weights = [(folder / "model.safetensors").read_bytes() for folder in (first, second)]
    logs = [json.loads((folder / "finished.json").read_text()) for folder in (first, second)]
    return weights[0] == weights[1] and all(logs[0][key] == logs[1][key] for key in ("log", "steps"))


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_been(vlm_options, tmp_path):
    def launch(output: Path) -> subprocess.Popen:
        command = [sys.executable, *SCRIPT, *vlm_options(output, max_steps=60, save_steps=4)]
        return subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, stdout=subprocess.DEVNULL)

    assert launch(tmp_path / "whole").wait(280) == 0
    kill_after_a_checkpoint(launch(tmp_path / "killed"), tmp_path / "killed")
    assert launch(tmp_path / "killed").wait(280) == 0
    (whole,), (killed,) = (list((tmp_path / name).iterdir()) for name in ("whole", "killed"))
    assert same_files(whole, killed)


@pytest.mark.slow
def test_a_second_command_on_a_run_in_progress_is_refused(vlm_options, tmp_path):
    arguments = vlm_options(tmp_path, max_steps=2000, save_steps=4)
    command = [sys.executable, *SCRIPT, *arguments]
    first = subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        while not list(tmp_path.glob("*/checkpoint-*")):
            assert first.poll() is None
            time.sleep(0.01)
        second = program(*command)
        assert second.returncode == 1
        assert re.fullmatch(r"error: .* is being trained by another command: wait for it\.\n", second.stderr)
        assert first.poll() is None
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait(60)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_is_really_full(vlm_options, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        arguments = vlm_options(disk, max_steps=8, save_steps=2, save_total_limit=20)
        failed = program(sys.executable, *SCRIPT, *arguments)
        assert failed.returncode == 1
        (folder,) = disk.iterdir()
        assert failed.stderr.endswith("\n") and failed.stderr.splitlines()[-1] == (
            f"error: [Errno 28] The disk that holds {folder} is full: make room and run the same command again; it "
            "goes on from the last complete checkpoint"
        )
        assert "Traceback" not in failed.stderr
        whole = [c for c in folder.glob("checkpoint-*") if (c / "trainer_state.json").is_file()]
        assert whole
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        done = program(sys.executable, *SCRIPT, *arguments)
        assert done.returncode == 0 and (folder / "finished.json").is_file(), done.stderr
    finally:
        subprocess.run(["umount", str(disk)], check=True)
