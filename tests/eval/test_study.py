"""The whole study, tiny: pretraining, language model, two VLMs, evaluation and report, interrupted once on the way."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from ssm_vlm import get_named_encoder
from ssm_vlm.eval import study
from ssm_vlm.eval.study import RECIPES, StudyArguments, read_items, run_study
from ssm_vlm.training import train_vlm
from ssm_vlm.training.trainer import ControlledTrainer

ENCODERS = ["digit_vmamba.digitscenes_64", "digit_vit.digitscenes_64"]
DATA = {
    "train_scenes": 16,
    "text_scenes": 24,
    "val_scenes": 2,
    "test_scenes": 3,
    "classification_train": 64,
    "classification_val": 20,
    "turns": 3,
}
SETTINGS = {
    "data": DATA,
    "encoder_steps": 2,
    "language_model_steps": 2,
    "vlm_steps": 3,
    "max_new_tokens": 5,
    "eval_batch_size": 16,
}


def arguments(folder: Path, **different) -> StudyArguments:
    return StudyArguments(study_dir=str(folder), **SETTINGS | different)


def times(folder: Path) -> dict[str, int]:
    """When each file of finished work was written, without what the end of every study writes anew."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    anew = {"seconds.json", "table.json", "table.md", "samples.png", "report.html"}
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files if path.name not in anew}


@dataclass
class Done:
    folder: Path
    rows: list
    printed: str
    before: dict[str, int]  # times after the interruption
    after: dict[str, int]

    def run(self, name: str) -> Path:
        (folder,) = self.folder.glob(f"{name}-??????????")
        return folder


def run_and_print(given: StudyArguments) -> tuple[list, str]:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        rows = run_study(given)
    return rows, text.getvalue()


@pytest.fixture(scope="session")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "study"
    whole_step = ControlledTrainer.training_step

    def interrupted(self, model, *rest, **kwargs):
        if "vlm-digit_vit" in self.args.output_dir and self.state.global_step == 1:
            raise KeyboardInterrupt
        return whole_step(self, model, *rest, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "100")
        patch.setattr(ControlledTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_and_print(arguments(folder))
        before = times(folder)
        patch.setattr(ControlledTrainer, "training_step", whole_step)
        rows, printed = run_and_print(arguments(folder))
    return Done(folder, rows, printed, before, times(folder))


def test_an_interrupted_study_goes_on_without_repeating_anything(done):
    finished = {name for name in done.before if name.endswith("finished.json")}
    assert {Path(name).parent.name[:-11] for name in finished} == {
        "encoder-digit_vmamba.digitscenes_64",
        "encoder-digit_vit.digitscenes_64",
        "language_model",
        "vlm-digit_vmamba.digitscenes_64",
    }
    kept = {name for name in done.before if not name.startswith("vlm-digit_vit")}
    kept = {name for name in kept if not name.endswith(("lock", "README.md"))}  # a card grows with the scores
    assert {name for name in kept if done.before[name] != done.after.get(name)} == set()
    assert (done.run("vlm-digit_vit.digitscenes_64") / "finished.json").is_file()


def test_there_is_a_row_for_each_encoder(done):
    assert [row.encoder for row in done.rows] == ENCODERS
    vqa = json.loads((done.folder / "data" / "vqa_test_questions.json").read_text())["questions"]
    refs = json.loads((done.folder / "data" / "refs(digits).json").read_text())
    for row in done.rows:
        entry = get_named_encoder(row.encoder)
        assert (row.parameters, row.flops, row.tokens) == (entry.parameters, entry.flops, 64)
        assert row.vqa_items == len(vqa) and row.localisation_items == sum(r["split"] == "test" for r in refs)
        summary = json.loads((done.run(f"encoder-{row.encoder}") / "finished.json").read_text())
        assert row.accuracy == summary["accuracy"]
        assert set(row.kinds) == {"count", "digit", "colour", "presence", "position"}
        assert "grounding: blank_image" in row.floors and "vqa: constant_answer_per_kind" in row.floors
        assert row.box_frame == "centered_square"


def test_everything_for_people_is_written(done):
    table = json.loads((done.folder / "table.json").read_text())
    assert [row["encoder"] for row in table["rows"]] == ENCODERS
    assert table["settings"]["vlm_steps"] == 3
    for name in ENCODERS:
        assert name.partition(".")[0] in (done.folder / "table.md").read_text()
        assert name.partition(".")[0] in (done.folder / "report.html").read_text()
    assert Image.open(done.folder / "samples.png").width > 300
    for file in ("report.html", "samples.png", "table.json"):
        assert file in done.printed


def test_every_model_has_a_card_with_its_scores(done):
    for name in ENCODERS:
        card = ModelCard.load(done.run(f"vlm-{name}") / "README.md")
        scored = {(result.task_type, result.metric_args["num_items"]) for result in card.data.eval_results}
        row = next(row for row in done.rows if row.encoder == name)
        assert scored == {("visual-question-answering", row.vqa_items), ("image-text-to-text", row.localisation_items)}
        assert {result.dataset_name for result in card.data.eval_results} == {"DigitScenes test"}
        assert "same model, blank pictures" in card.text and "do not read it as skill" in card.text
        encoder = ModelCard.load(done.run(f"encoder-{name}") / "README.md")
        (accuracy,) = encoder.data.eval_results
        assert accuracy.metric_value == round(100 * row.accuracy, 2) and accuracy.metric_args["interval_95"]


def test_models_that_learned_nothing_are_printed_with_loud_warnings(done):
    for name in ENCODERS:
        assert name.partition(".")[0] in done.printed
    assert "VQA" in done.printed and "Loc" in done.printed
    assert all(row.warnings for row in done.rows), "three steps teach nothing"
    text = " ".join(done.printed.split())
    assert text.lower().count("warning") >= 2 and "is not 5 points above" in text
    assert "Ten symbols on plain canvases prove the plumbing, not the science." in text
    assert done.printed.index("1/9  data") < done.printed.index("9/9  report")


def test_seconds_are_those_of_the_runs(done):
    seconds = json.loads((done.folder / "table.json").read_text())["seconds"]
    for step, run in [("language model", "language_model"), *((f"vlm {n}", f"vlm-{n}") for n in ENCODERS)]:
        assert seconds[step] == json.loads((done.run(run) / "finished.json").read_text())["seconds"] > 0
    for row in done.rows:
        assert row.seconds == sum(seconds[f"{step} {row.encoder}"] for step in ("encoder", "vlm", "evaluation"))


def test_models_can_be_found_by_name(done):
    for name in ENCODERS:
        assert (done.folder / "models" / name).resolve() == done.run(f"vlm-{name}").resolve()
        assert (done.folder / "encoders" / name).resolve() == (done.run(f"encoder-{name}") / "backbone").resolve()
    assert (done.folder / "models" / "language_model").resolve() == done.run("language_model").resolve()


def test_all_vlms_have_the_same_recipe_but_for_the_encoder(done):
    first, second = (yaml.safe_load((done.run(f"vlm-{name}") / "recipe.yaml").read_text()) for name in ENCODERS)
    assert {key for key in first if first[key] != second[key]} == {"vision_encoder", "name"}
    assert first["vision_weights_dir"] == f"{done.folder}/encoders"


def test_a_second_call_repeats_nothing(done, monkeypatch):
    for name in ("train", "evaluate"):
        monkeypatch.setattr(ControlledTrainer, name, None)
    rows, printed = run_and_print(arguments(done.folder))
    assert times(done.folder) == done.after
    assert rows == done.rows and "9/9  report" in printed


def test_another_encoder_reuses_what_is_there(done, monkeypatch, tmp_path):
    """Only the runs of the new one are missing; they are stopped here as they begin."""
    started = []

    def note(self, *args, **kwargs):
        started.append(Path(self.args.output_dir).name[:-11])
        raise KeyboardInterrupt

    monkeypatch.setattr(ControlledTrainer, "train", note)
    moved = shutil.copytree(done.folder, tmp_path / "moved", symlinks=True)
    with pytest.raises(KeyboardInterrupt):
        run_and_print(arguments(moved, encoders=[*ENCODERS, "digit_identity.digitscenes_64"]))
    assert started == ["encoder-digit_identity.digitscenes_64"], "a study that was moved is not run again either"


def test_the_other_split_is_asked_with_the_same_models(done, monkeypatch, tmp_path):
    monkeypatch.setattr(ControlledTrainer, "train", None)
    folder = shutil.copytree(done.folder, tmp_path / "copy", symlinks=True)
    rows, _ = run_and_print(arguments(folder, split="val", encoders=ENCODERS[:1]))
    (run,) = folder.glob("vlm-digit_vmamba*")
    assert rows[0].vqa_items == len(read_items(folder / "data", "val")) - rows[0].localisation_items
    assert (run / "answers_val.jsonl").is_file() and (run / "answers_test.jsonl").is_file()


@pytest.mark.parametrize(
    ("different", "message"),
    [
        ({"encoders": ["digit_vmamba.digitscenes_64", "digit_vitt.digitscenes_64"]}, "digit_vit.digitscenes_64"),
        (
            {"data": {"train_scene": 3}},
            "data has the key 'train_scene', but the fields of DigitScenes are train_scenes",
        ),
        ({"data": {"max_digits": 0}}, "max_digits is 0"),
        ({"encoder_recipe": "digit_encodr.yaml"}, "digit_encodr.yaml: no such recipe file"),
        ({"vlm_recipe": "bad.yaml"}, "bad.yaml has the key 'tap_nrom', which is no key of a recipe; did you mean"),
        ({"language_model_recipe": "bad.yaml"}, "bad.yaml has the key 'tap_nrom'"),
    ],
)
def test_bad_settings_are_told_before_anything_is_written(different, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text("tap_nrom: none\n")
    with pytest.raises(ValueError) as error:
        run_study(arguments(tmp_path / "study", **different))
    assert message in str(error.value) and not (tmp_path / "study").exists()


def test_bad_settings_on_the_command_line(tmp_path):
    with pytest.raises(ValueError, match="the key 'split' has a bad value: invalid choice: 'train'"):
        study.main(["--split", "train", "--study_dir", str(tmp_path)])


def test_a_folder_with_other_data_is_refused(done):
    with pytest.raises(ValueError, match="data exists and was not written with this DigitScenes config"):
        run_and_print(arguments(done.folder, data=DATA | {"train_scenes": 17}))


def test_the_embedded_study_is_the_default():
    given = StudyArguments()
    assert given.encoders == ENCODERS and given.study_dir == "runs/study" and given.data is None
    for name in (given.encoder_recipe, given.language_model_recipe, given.vlm_recipe):
        assert (RECIPES / name).is_file()


def test_a_recipe_of_ones_own_takes_the_place_of_the_shipped_one(done, monkeypatch, tmp_path):
    recipe = yaml.safe_load((RECIPES / StudyArguments().vlm_recipe).read_text()) | {"tap_norm": "none"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    seen = []

    def look(model_args):
        seen.append(model_args)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_vlm, "build_model", look)
    with pytest.raises(KeyboardInterrupt):
        run_and_print(arguments(done.folder, vlm_recipe=str(tmp_path / "mine.yaml")))
    assert seen[0].tap_norm == "none" and seen[0].vision_encoder == ENCODERS[0]


# --- in a new process ----------------------------------------------------------------------------------------------

LOAD = """
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import (
    AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification,
    AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline,
)

import ssm_vlm

study = Path(sys.argv[1])
picture = Image.open(next((study / "data" / "images" / "eval").glob("*_test_*.png")))
for name, backbone_class in (("digit_vmamba", ssm_vlm.SSMVisionBackbone), ("digit_vit", ssm_vlm.HiddenStateBackbone)):
    vlm, = study.glob(f"vlm-{name}.*")
    encoder, = study.glob(f"encoder-{name}.*")
    base, model = AutoModel.from_pretrained(vlm), AutoModelForImageTextToText.from_pretrained(vlm)
    assert type(base) is ssm_vlm.LlavaStyleModel and type(model) is ssm_vlm.LlavaStyleForConditionalGeneration
    processor = AutoProcessor.from_pretrained(vlm)
    assert type(processor) is ssm_vlm.LlavaStyleProcessor
    assert type(AutoImageProcessor.from_pretrained(vlm)) is ssm_vlm.LlavaStyleImageProcessor
    assert AutoTokenizer.from_pretrained(vlm).image_token == "<image>"
    inputs = processor(images=[picture], text=["<image>\\nHi"], return_tensors="pt")
    with torch.no_grad():
        hidden, logits = base(**inputs).last_hidden_state, model(**inputs).logits
    assert torch.equal(model.get_output_embeddings()(hidden), logits)

    pixels = AutoImageProcessor.from_pretrained(encoder)(picture, return_tensors="pt")["pixel_values"]
    classifier = AutoModelForImageClassification.from_pretrained(encoder)
    assert classifier(pixels).logits.shape == (1, 16)
    backbone = backbone_class.from_pretrained(encoder / "backbone")
    feature_map = backbone(pixels).feature_maps[-1]
    assert feature_map.shape == (1, 96, 8, 8)
    assert torch.equal(feature_map, classifier.backbone(pixels).feature_maps[-1])
    assert torch.equal(feature_map, model.vision_tower(pixels).feature_maps[-1]), "frozen, and saved as it was"
    assert torch.equal(feature_map, ssm_vlm.load_encoder(encoder / "backbone")(pixels).feature_maps[-1])
    built = AutoBackbone.from_config(AutoConfig.from_pretrained(encoder / "backbone"))
    assert type(built) is backbone_class
    assert {k: v.shape for k, v in built.state_dict().items()} == {k: v.shape for k, v in backbone.state_dict().items()}

    answer = pipeline("image-text-to-text", model=str(vlm), device="cpu")
    def ask(question):
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        return [{"role": "user", "content": content}]
    questions = ["How many digits are in the image?", "Which digit is red, if there is one?", "Hi"]
    short = {"max_new_tokens": 4, "do_sample": False}
    together = answer(text=[ask(question) for question in questions], batch_size=3, **short)
    alone = [answer(text=ask(question), **short) for question in questions]
    def said(output):
        return output[0]["generated_text"][-1]["content"]
    assert [said(output) for output in together] == [said(output) for output in alone]
    plain = answer(images=[picture, picture], text=["<image>\\nA", "<image>\\nanother one"], batch_size=2, **short)
    assert len(plain) == 2
print("all is well")
"""


@pytest.mark.slow
def test_what_a_study_saves_loads_in_a_new_process(done, tmp_path):
    (tmp_path / "load.py").write_text(LOAD)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "warning"}
    command = [sys.executable, "-W", "error::UserWarning", str(tmp_path / "load.py"), str(done.folder)]
    loaded = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, cwd=tmp_path)
    assert loaded.returncode == 0 and loaded.stdout == "all is well\n", loaded.stderr


@pytest.mark.slow
def test_two_processes_run_a_study_together(tmp_path):
    (tmp_path / "study.yaml").write_text(
        yaml.safe_dump(SETTINGS | {"study_dir": str(tmp_path / "study"), "encoders": ["digit_identity.digitscenes_64"]})
    )
    launcher = ["torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m", "ssm_vlm.eval.study"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "warning", "COLUMNS": "100"}
    command = [sys.executable, "-m", *launcher, str(tmp_path / "study.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("1/6  data") == 1 and done.stdout.count("report.html") == 1
    assert len(json.loads((tmp_path / "study" / "table.json").read_text())["rows"]) == 1
