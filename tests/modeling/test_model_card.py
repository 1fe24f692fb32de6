"""Model cards: they say what the folder holds, and nothing that nobody knows, and the Hub accepts their metadata."""

import json
import re
import shutil
from fnmatch import fnmatchcase

import pytest
import yaml
from card_toys import ENCODER, SCORES, save_encoder, save_photo, save_vlm
from hub_stub import LICENCES, metadata_errors
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, ViTConfig, ViTForImageClassification
from transformers.pipelines import PIPELINE_REGISTRY

from ssm_vlm import ENCODERS, BackboneClassifierConfig, BackboneForImageClassification
from ssm_vlm.cli import main
from ssm_vlm.modeling.card_parts import TEMPLATES, origin_of, origins
from ssm_vlm.modeling.intervals import wilson_interval
from ssm_vlm.modeling.model_card import is_untouched, render_card, write_card
from ssm_vlm.push_command import push_folder


@pytest.fixture(scope="module")
def saved_vlm(tmp_path_factory):
    return save_vlm(tmp_path_factory.mktemp("cards") / "toy_vlm")


@pytest.fixture
def vlm(saved_vlm, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(saved_vlm, tmp_path / "toy_vlm")


@pytest.fixture(scope="module")
def saved_classifier(tmp_path_factory):
    """As `train_encoder` leaves it."""
    folder = save_encoder(tmp_path_factory.mktemp("cards") / "toy_classifier")
    config = BackboneClassifierConfig(backbone_config=ENCODERS[ENCODER].config(), id2label={0: "cup", 1: "pot"})
    BackboneForImageClassification(config).save_pretrained(folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"vision_encoder": ENCODER, "val_folder": "a/b/cups/val"}))
    summary = {"accuracy": 0.9, "accuracy_items": 400, "accuracy_floor": 0.6}
    (folder / "finished.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture(scope="module")
def saved_whole(tmp_path_factory):
    """A whole published classifier, as `ssm-vlm convert` leaves it."""
    folder = save_encoder(tmp_path_factory.mktemp("cards") / "toy_whole", "vit_small_patch16.augreg_in1k_224")
    config = ViTConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=12, num_attention_heads=1)
    ViTForImageClassification(config).save_pretrained(folder)
    origin = {"encoder": "vit_small_patch16.augreg_in1k_224", "source": "vit.safetensors", "sha256": "ab" * 32}
    (folder / "origin.json").write_text(json.dumps(origin))
    return folder


def change(file, **changes):
    """Sets keys of a JSON or YAML file; None takes a key out."""
    read, write = (json.loads, json.dumps) if file.suffix == ".json" else (yaml.safe_load, yaml.safe_dump)
    content = read(file.read_text()) | changes
    file.write_text(write({key: value for key, value in content.items() if value is not None}))


def table(card: ModelCard) -> dict[str, str]:
    """First two columns of every table of a card; of rows of one name the first."""
    rows = [line.split(" | ") for line in card.text.splitlines() if line.startswith("| ")]
    return {row[0].strip("| "): row[1].strip("| ") for row in reversed(rows) if len(row) > 1}


# Licences and origins


def test_every_named_encoder_has_one_origin_and_its_licence_agrees():
    records = origins()["encoders"].values()
    for name, entry in ENCODERS.items():
        matching = [r for r in records if any(fnmatchcase(name, pattern) for pattern in r["names"])]
        assert len(matching) == 1, f"{name}: {len(matching)} records in model_cards/origins.yaml instead of one"
        assert origin_of(name)["licence"] == entry.licence, f"{name}: another licence in origins.yaml than in the table"


def test_records_are_complete():
    records = origins()
    for record in [*records["encoders"].values()]:
        assert {"names", "title", "by", "licence", "origin"} <= set(record) and record["origin"].startswith("https://")
    everything = [*records["encoders"].values(), *records["language_models"].values()]
    licences = {r["licence"] for r in [*everything, *records["conversations"].values()]}
    assert licences <= {*records["licences"], "NOASSERTION"}
    for licence in records["licences"].values():
        assert licence["id"] in LICENCES
        assert licence["id"] != "other" or {"name", "link"} <= set(licence)


def test_citations_are_bibtex():
    found = [r["citation"] for r in origins()["encoders"].values() if "citation" in r] + [origins()["paper"]]
    for entry in found:
        assert re.match(r"@\w+\{[a-z0-9]+,\n", entry) and entry.count("{") == entry.count("}")
        assert {"title", "author", "year"} <= set(re.findall(r"^  (\w+) = \{", entry, re.MULTILINE))
    assert len({re.match(r"@\w+\{(\w+)", entry)[1] for entry in found}) == len(found)


def test_every_file_of_the_folder_is_explained():
    readme = (TEMPLATES / "README.md").read_text()
    for path in TEMPLATES.iterdir():
        assert path.name in ("README.md", "__init__.py", "__pycache__") or f"`{path.name}`" in readme


# Metadata


def hold_metadata(card: ModelCard, hub=None):
    """The metadata is valid by the Hub's documented rules, and the Hub's own classes read what they wrote."""
    assert metadata_errors(str(card)) == []
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict() and again.text == card.text
    assert card.data.pipeline_tag in PIPELINE_REGISTRY.get_supported_tasks()
    assert card.data.library_name == "transformers"
    if card.data.eval_results:
        name, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
        assert (name, results) == (card.data.model_name, card.data.eval_results)


@pytest.mark.parametrize("kind", ["vlm", "classifier", "whole"])
@pytest.mark.parametrize("repo_id", [None, "somebody/some-model"])
def test_metadata_is_valid(request, hub, monkeypatch, tmp_path, kind, repo_id):
    card = render_card(request.getfixturevalue(f"saved_{kind}"), repo_id=repo_id)
    hold_metadata(card)
    hub.patch(monkeypatch, tmp_path)
    card.validate()
    assert hub.requests == ["POST /api/validate-yaml"]
    card.data.license = "my own"
    with pytest.raises(ValueError, match="not allowed"):
        card.validate()


@pytest.mark.parametrize("name", ENCODERS)
def test_every_named_encoder_gets_a_valid_card(name, tmp_path):
    ENCODERS[name].config().save_pretrained(tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    (tmp_path / "origin.json").write_text(json.dumps({"encoder": name, "source": "weights.pth"}))
    card = render_card(tmp_path)
    hold_metadata(card)
    licence = origins()["licences"].get(ENCODERS[name].licence, {})  # NOASSERTION is none
    assert (card.data.license, card.data.license_name) == (licence.get("id"), licence.get("name"))
    assert f"`{name}`" in card.text and origin_of(name)["origin"] in card.text


def test_metadata_of_a_vlm(saved_vlm):
    data = render_card(saved_vlm, repo_id="somebody/cups").data
    assert data.pipeline_tag == "image-text-to-text" and "llava-style" in data.tags
    assert data.base_model == ["lmsys/vicuna-7b-v1.5"] and data.datasets == ["liuhaotian/LLaVA-Instruct-150K"]
    assert (data.license, data.license_name) == ("other", "apache-2.0-and-llama2")
    vqa, boxes = data.eval_results
    assert data.model_name == "cups"
    assert (vqa.task_type, vqa.dataset_name, vqa.metric_value) == ("visual-question-answering", "Cups, test", 50.0)
    assert vqa.metric_args["num_items"] == 200 and vqa.metric_args["floors"] == {
        "constant_answer": 10.0,
        "blank_image": 20.0,
    }
    assert vqa.metric_args["interval_95"] == pytest.approx([43.14, 56.86], abs=0.01)
    assert "95 % interval 43.1 to 56.9, 200 items" in vqa.metric_name
    assert boxes.metric_args["box_frame"] == "centered_square" and boxes.metric_args["iou_threshold"] == 0.5


def test_the_licence_of_parts_that_agree_is_said_once(vlm):
    change(vlm / "recipe.yaml", vision_encoder="vmamba_tiny_s2l5.in1k_224", language_model="meta-llama/Llama-2-7b-hf")
    assert render_card(vlm).data.license == "other"
    change(vlm / "recipe.yaml", language_model="some/where")
    assert render_card(vlm).data.license is None  # nobody knows the language model's
    classifier = render_card(save_encoder(vlm.parent / "encoder", encoder="vmamba_tiny_s2l5.in1k_224")).data
    assert (classifier.license, classifier.license_name) == ("mit", None)


# What is said, and what changes with the files


FACTS = {
    "encoder": f"`{ENCODER}`, `ssm_vision`, 0.409 M parameters",
    "frozen in training": "yes",
    "tap": "`stage2`",
    "tap norm": "LayerNorm without parameters",
    "token positions": "none",
    "connector": "`mlp2`, 0.00182 M parameters",
    "geometry": "`letterbox`, canvas 64x64 (height x width), bilinear",
    "image tokens": "8x8 = 64 for a full canvas",
    "data": "[LLaVA-1.5's mix of 665k conversations](https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K) "
    "(CC-BY-4.0), 665298 conversations",
    "trained": "connector, language model",
    "batch": "128",
    "steps": "5198",
    "peak learning rate": "2e-05",
    "time": "1.5 minutes",
    "software": "torch 2.13.0",
}


def test_facts_of_a_vlm(saved_vlm):
    card = render_card(saved_vlm)
    assert {name: table(card).get(name) for name in FACTS} == FACTS
    assert table(card)["box frame"].startswith("`centered_square`: corners [x1, y1, x2, y2]")
    assert "`lmsys/vicuna-7b-v1.5`" in table(card)["language model"]
    assert "| 50.0 | 43.1 to 56.9 | 200 | 20.0 (same model, blank pictures); 10.0 (best constant answer) |" in card.text
    assert "| 20.0 | 11.2 to 33.0 | 50 | 15.0 (mean box) |" in card.text and "frame `centered_square`" in card.text
    assert "| Visual question answering | count | 150 | 40.0 |" in card.text
    assert "Llama-2-Community" in card.text and "2603.19209" in card.text


@pytest.mark.parametrize(
    ("file", "changes", "name", "value"),
    [
        ("config.json", {"tap_norm": "none"}, "tap norm", "none: the features as they are"),
        ("config.json", {"token_positions": "sincos2d"}, "token positions", "`sincos2d`"),
        ("config.json", {"freeze_vision": False}, "frozen in training", "no"),
        (
            "config.json",
            {"connector": "average_pool_mlp2", "connector_grid": [4, 6]},
            "connector",
            "`average_pool_mlp2`, to at most 4x6 tokens, 0.00182 M parameters",
        ),
        ("config.json", {"connector": "linear"}, "connector", "`linear`, 0.00182 M parameters"),
        ("recipe.yaml", {"learning_rate": 0.5}, "peak learning rate", "0.5"),
        ("recipe.yaml", {"freeze_connector": True}, "trained", "language model"),
        ("recipe.yaml", {"data_path": "my/pots.json"}, "data", "`pots.json`, 665298 conversations"),
        ("recipe.yaml", {"max_steps": None}, "steps", "5198"),
        ("finished.json", {"batch": 7}, "batch", "7"),
    ],
)  # fmt: skip
def test_what_a_file_says_is_what_the_card_says(vlm, file, changes, name, value):
    change(vlm / file, **changes)
    assert table(render_card(vlm))[name] == value


def test_another_canvas_has_another_number_of_tokens(vlm):
    settings = json.loads((vlm / "processor_config.json").read_text())
    settings["image_processor"]["size"] = {"height": 64, "width": 100}
    (vlm / "processor_config.json").write_text(json.dumps(settings))
    assert table(render_card(vlm))["image tokens"] == "8x13 = 104 for a full canvas"


def test_facts_of_a_classifier(saved_classifier):
    card = render_card(saved_classifier)
    assert card.data.pipeline_tag == "image-classification" and card.data.license == "apache-2.0"
    (accuracy,) = card.data.eval_results
    assert (accuracy.dataset_name, accuracy.metric_value) == ("cups/val", 90.0)
    assert accuracy.metric_args["num_items"] == 400 and accuracy.metric_args["floors"] == {"constant_answer": 60.0}
    assert table(card)["tap"] == "`stage2`; nothing after it is saved"


def test_facts_of_a_whole_model(saved_whole):
    card = render_card(saved_whole)
    entry = ENCODERS["vit_small_patch16.augreg_in1k_224"]
    assert card.data.base_model == ["timm/vit_small_patch16_224.augreg_in1k"]
    assert card.data.datasets == ["ILSVRC/imagenet-1k"] and card.data.license == "apache-2.0"
    assert table(card)["converted from"] == f"`vit.safetensors`, sha256 `{'ab' * 32}`"
    assert f"{entry.imagenet_top1} %" in table(card)["published ImageNet top-1"]
    assert "not measured here" in table(card)["published ImageNet top-1"] and "whole model" in table(card)["tap"]
    assert "steiner2022train" in card.text and 'tap="block11"' in card.text


# What nobody knows


def test_nothing_is_invented(tmp_path):
    card = render_card(save_vlm(tmp_path / "bare", recipe=None, scores=None))
    data = card.data.to_dict()
    assert set(data) == {"library_name", "pipeline_tag", "tags"}
    assert table(card)["encoder"] == "of type `ssm_vision`, 0.409 M parameters"
    assert "The folder does not say how the weights were trained." in card.text
    assert "It has not been evaluated, or its scores were not saved beside it." in card.text
    assert "The licence of the encoder and the language model is not known here" in card.text
    assert "DigitScenes" not in card.text and "icuna" not in card.text.replace("vicuna", "")


def test_a_folder_is_no_repository(vlm):
    """`weights/cups` may be a folder on the machine that trained, or a repository: only the run knows."""
    change(vlm / "recipe.yaml", language_model="weights/cups")
    assert render_card(vlm).data.base_model is None
    change(vlm / "finished.json", local=["language_model"])
    assert render_card(vlm).data.base_model is None
    change(vlm / "finished.json", local=[])
    assert render_card(vlm).data.base_model == ["weights/cups"]


def test_scores_without_number_of_items_have_no_interval(tmp_path, saved_classifier):
    folder = shutil.copytree(saved_classifier, tmp_path / "old")
    change(folder / "finished.json", accuracy_items=None, accuracy_floor=None)
    (accuracy,) = render_card(folder).data.eval_results
    assert accuracy.metric_args is None and "interval" not in accuracy.metric_name
    assert "| 90.0 | unknown | unknown | unknown |" in render_card(folder).text


def test_guesses_with_blank_pictures_are_no_scores(vlm):
    (vlm / "answers.blank.scores.json").write_text(json.dumps(SCORES | {"blank_images": True}))
    assert len(render_card(vlm).data.eval_results) == 2


# Limits


def test_limits_follow_from_the_scores(vlm):
    text = render_card(vlm).text
    assert "the score of 20.0 is not clearly above mean box (15.0)" in text  # 15 lies in the interval
    assert "Visual question answering: the score" not in text
    assert "DigitScenes: handwritten digits on plain canvases" in text
    change(vlm / "recipe.yaml", vision_encoder="vmamba_tiny_s2l5.in1k_224")
    text = render_card(vlm).text
    assert "handwritten digits" not in text and "The encoder started from random weights." not in text
    assert "nobody is known to have loaded the published file of `vmamba_tiny_s2l5.in1k_224`" in text


@pytest.mark.parametrize(
    ("recipe", "run", "weights", "published"),
    [
        ({}, {}, None, True),
        ({"vision_pretrained": False}, {}, "random at the start", False),
        ({"train_folder": "a/b"}, {}, "trained anew", False),
        ({"vision_weights_dir": "weights"}, {}, "from a folder on the machine that made this model", False),
        (
            {"vision_weights_dir": "weights"},
            {"encoder_origin": {"encoder": "swin_tiny.in1k_224", "source": "swin.pth"}},
            None,
            True,
        ),
    ],
)
def test_weights_of_other_makers_are_not_taken_for_the_published_ones(vlm, recipe, run, weights, published):
    change(
        vlm / "recipe.yaml", vision_encoder="swin_tiny.in1k_224", language_model="meta-llama/Llama-2-7b-hf", **recipe
    )
    change(vlm / "finished.json", **run)
    card = render_card(vlm)
    assert table(card).get("encoder's weights") == weights
    assert ("ILSVRC/imagenet-1k" in card.data.datasets) == published == ("ImageNet-1K" in card.text)
    assert (card.data.license == "other") == published and ("Microsoft" in card.text) == published
    assert "liu2021swin" in card.text and "https://github.com/microsoft/Swin-Transformer" in card.text
    assert ("file `swin.pth`" in card.text) == bool(run)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("items", [1, 10, 1339])
def test_the_interval_is_wilsons(share, items):
    """Its ends are the shares from which the observed one lies 1.96 standard errors away."""
    low, high = wilson_interval(share, items)
    assert 0 <= low <= share <= high <= 1
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:
            assert abs(share - end) == pytest.approx(1.959964 * (end * (1 - end) / items) ** 0.5, rel=1e-5)


# Writing


def test_a_card_is_written_over_only_while_it_is_ours(vlm, capsys):
    assert main(["card", str(vlm)]) == 0
    printed = capsys.readouterr().out
    assert "README.md: image-text-to-text, licence other (apache-2.0-and-llama2), 2 scores" in printed
    readme = vlm / "README.md"
    first = readme.read_text()
    assert is_untouched(first) and main(["card", str(vlm), "--repo", "somebody/cups"]) == 0
    assert 'from_pretrained("somebody/cups")' in readme.read_text()
    readme.write_text(first.replace("A LLaVA-style", "My LLaVA-style"))
    capsys.readouterr()
    assert main(["card", str(vlm)]) == 1
    assert "changed by hand" in capsys.readouterr().err and "My LLaVA-style" in readme.read_text()
    assert main(["card", str(vlm), "--force"]) == 0 and readme.read_text() == first


def test_saving_a_model_writes_a_card_and_leaves_one_of_somebodys_own(vlm):
    model = AutoModelForImageTextToText.from_pretrained(vlm)
    model.save_pretrained(vlm)
    assert is_untouched((vlm / "README.md").read_text())
    written = (vlm / "README.md").stat().st_mtime_ns
    model.save_pretrained(vlm)
    assert (vlm / "README.md").stat().st_mtime_ns == written  # the same card is not written again
    (vlm / "README.md").write_text("Mine.")
    model.save_pretrained(vlm)
    assert (vlm / "README.md").read_text() == "Mine."


def test_a_processor_that_is_saved_after_its_model_is_on_the_card(vlm, tmp_path):
    model, processor = AutoModelForImageTextToText.from_pretrained(vlm), AutoProcessor.from_pretrained(vlm)
    for one, first in ((processor, tmp_path / "a"), (processor.image_processor, tmp_path / "b")):
        model.save_pretrained(first)
        assert "does not say how pictures are prepared" in (first / "README.md").read_text()
        one.save_pretrained(first)
        card = (first / "README.md").read_text()
        assert "Pictures are brought to 64x64 pixels" in card and is_untouched(card)
        (first / "README.md").write_text(card + "Mine.")
        one.save_pretrained(first)
        assert (first / "README.md").read_text() == card + "Mine."
    processor.save_pretrained(tmp_path / "alone")
    processor.save_pretrained(vlm)  # a model whose card somebody took away
    assert not (tmp_path / "alone" / "README.md").exists() and not (vlm / "README.md").exists()


def scores(**changes):
    return json.dumps({"scores": {"vqa": SCORES["scores"]["vqa"] | changes}})


BROKEN_VALUES = [
    (
        "answers.scores.json",
        scores(num_items=0),
        r"scores\.vqa\.num_items is 0; it must be a whole number of at least 1",
    ),
    ("answers.scores.json", scores(num_items="2"), r"scores\.vqa\.num_items is '2'"),
    ("answers.scores.json", scores(score=float("nan")), r"scores\.vqa\.score is nan; it must be a number from 0 to 1"),
    ("answers.scores.json", scores(score=50), r"scores\.vqa\.score is 50"),
    ("answers.scores.json", scores(floors={"mean_box": None}), r"scores\.vqa\.floors\.mean_box is None"),
    ("answers.scores.json", scores(kinds={"all": {"num_items": 0, "score": 0}}), r"scores\.vqa\.kinds\.all\.num_items"),
    ("answers.scores.json", scores(task="chess"), r"scores\.vqa\.task is 'chess'; it must be one of vqa,"),
    ("answers.scores.json", json.dumps({"scores": {}, "data": 3}), r"data is 3; it must say in words"),
    ("finished.json", '{"accuracy": NaN}', "accuracy is nan; it must be a number from 0 to 1"),
    ("finished.json", '{"accuracy": 0.5, "accuracy_items": 0}', "accuracy_items is 0"),
    ("finished.json", '{"versions": []}', r"versions is \[\]; it must be an object"),
    ("finished.json", '{"encoder_origin": {"encoder": 5}}', r"encoder_origin\.encoder is 5; it must be text"),
    ("origin.json", '{"encoder": 5}', "encoder is 5; it must be text"),
    ("recipe.yaml", "vision_encoder: [a]", r"vision_encoder is \['a'\]; it must be text"),
]


@pytest.mark.parametrize(("file", "content", "message"), BROKEN_VALUES)
def test_values_that_cannot_be_are_named(vlm, capsys, file, content, message):
    (vlm / file).write_text(content)
    assert main(["card", str(vlm)]) == 1
    error = capsys.readouterr().err
    assert re.search(rf"{re.escape(file)}: {message}", error) and error.count("\n") == 1
    assert not (vlm / "README.md").exists()


def test_empty_values_are_as_if_they_were_not_there(vlm):
    before = str(render_card(vlm))
    recipe = (vlm / "recipe.yaml").read_text()
    (vlm / "recipe.yaml").write_text(f"{recipe}val_folder: null\nweight_decay: null\n")
    assert str(render_card(vlm)) == before


@pytest.mark.parametrize("size", [224, {"shortest_edge": 224}])
def test_sizes_of_other_image_processors_are_left_out(vlm, size):
    settings = json.loads((vlm / "processor_config.json").read_text())
    settings["image_processor"]["size"] = size
    (vlm / "processor_config.json").write_text(json.dumps(settings))
    assert "geometry" not in table(render_card(vlm))


@pytest.mark.parametrize("repo", ["a b/c", "a/b/c", ""])
def test_a_name_that_the_hub_cannot_have(vlm, capsys, repo):
    assert main(["card", str(vlm), "--repo", repo]) == 1
    error = capsys.readouterr().err
    assert "Repo id must" in error and error.count("\n") == 1 and not (vlm / "README.md").exists()


def test_no_card_without_weights(vlm, capsys):
    model = AutoModelForImageTextToText.from_pretrained(vlm)
    (vlm / "model.safetensors").unlink()
    assert main(["card", str(vlm)]) == 1
    assert "a config.json but not the weights: it lacks model.safetensors" in capsys.readouterr().err
    model.save_pretrained(vlm, max_shard_size="1MB")
    lost = sorted(vlm.glob("model-*.safetensors"))[0]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=f"it lacks {lost.name}"):
        render_card(vlm)


def test_the_archive_of_a_release_is_not_the_encoders_file(vlm):
    """Nor is its encoder without a norm, where the norm is the encoder's own."""
    origin = {"layout": "paper_vlm", "encoder": "vmamba_small_s2l15.in1k_224", "source": "vmamba-s.tar"}
    (vlm / "origin.json").write_text(json.dumps(origin))
    for name in ("recipe.yaml", "finished.json"):
        (vlm / name).unlink()
    encoder = next(part for part in render_card(vlm).text.splitlines() if part.startswith("| encoder | `vmamba_small"))
    text = render_card(vlm).text
    assert "vmamba-s.tar" not in encoder
    assert all("vmamba-s.tar" not in line for line in text.splitlines() if line.startswith("| encoder |"))
    assert table(render_card(vlm))["converted from"] == "`vmamba-s.tar`"


@pytest.mark.parametrize(
    ("encoder", "norm"),
    [
        ("vmamba_tiny_s2l5.in1k_224", "LayerNorm without parameters"),
        ("swin_tiny.in1k_224", "LayerNorm without parameters"),
        ("vit_small_patch16.augreg_in1k_224", "none"),
    ],
)
def test_the_norm_of_the_tap_is_the_encoders(tmp_path, encoder, norm):
    config = ENCODERS[encoder].config()
    config.architectures = ["SomeBackbone"]
    config.save_pretrained(tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    assert table(render_card(tmp_path))["tap norm"] == norm


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("finished.json", "{", r"finished\.json is not JSON"),
        ("finished.json", "[]", r"finished\.json must hold a JSON object"),
        ("recipe.yaml", "a: [", r"recipe\.yaml is not YAML"),
        ("recipe.yaml", "just text", r"recipe\.yaml must hold"),
        ("answers.scores.json", '{"scores": 3}', r"answers\.scores\.json does not hold scores"),
        ("model.safetensors", "none", r"model\.safetensors is not a whole safetensors file"),
    ],
)
def test_broken_files_are_named(vlm, file, content, message):
    (vlm / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        write_card(vlm)
    assert not (vlm / "README.md").exists()


def test_no_model(tmp_path, capsys):
    assert main(["card", str(tmp_path)]) == 1
    assert "holds no config.json, so no saved model" in capsys.readouterr().err


# The code of a card


def code_blocks(folder, repo_id=None) -> list[str]:
    return re.findall(r"```python\n(.*?)```", render_card(folder, repo_id=repo_id).text, re.DOTALL)


def test_the_code_of_a_vlms_card_runs(saved_vlm, monkeypatch, capsys):
    monkeypatch.chdir(saved_vlm.parent)
    save_photo(saved_vlm.parent)
    load, *with_code, ask = code_blocks(saved_vlm)
    assert len(load.strip().splitlines()) == 5 and len(with_code) == 1 and "trust_remote_code=True" in with_code[0]
    for way in (load, *with_code):
        names: dict = {}
        exec(way, names)
        exec(ask, names)
        assert capsys.readouterr().out


@pytest.mark.parametrize("kind", ["classifier", "whole", "encoder"])
def test_the_code_of_an_encoders_card_runs(request, hub, tmp_path, monkeypatch, kind):
    """By its name on the Hub: `AutoBackbone` takes no folders."""
    folder = save_encoder(tmp_path / "toy_encoder") if kind == "encoder" else request.getfixturevalue(f"saved_{kind}")
    hub.patch(monkeypatch, tmp_path / "cache")
    push_folder(folder, "somebody/toy")
    monkeypatch.chdir(tmp_path)
    save_photo(tmp_path)
    blocks = code_blocks(folder, "somebody/toy")
    assert blocks
    for block in blocks:
        names: dict = {}
        exec(block, names)
        if "features" in names:
            assert names["features"].ndim == 4 and names["features"].shape[0] == 1
        elif "logits" in names:
            assert names["logits"].shape == (1, 2)
        else:
            assert "trust_remote_code=True" in block and {"model", "processor"} <= set(names)
