"""Recipes: what a file and a command line become, what they are told when they are wrong, and how runs are named."""

import dataclasses
import json
import re
import shutil
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from ssm_vlm.eval.study import StudyArguments
from ssm_vlm.training.recipe import RunArguments, RunDirectory, fingerprint, parse_recipe, require, resolved
from ssm_vlm.training.train_encoder import EncoderArguments
from ssm_vlm.training.train_language_model import LanguageModelArguments
from ssm_vlm.training.train_vlm import DataArguments, ModelArguments

PACKAGE = Path(__file__).parents[2]
PARTS = {
    "encoder": (EncoderArguments, RunArguments),
    "language_model": (LanguageModelArguments, RunArguments),
    "vlm": (ModelArguments, DataArguments, RunArguments),
    "study": (StudyArguments,),
}
RECIPES = {
    **{
        path.name: PARTS["vlm" if path.name.startswith("paper_") else path.stem.removeprefix("digit_")]
        for path in sorted((PACKAGE / "training" / "recipes").glob("*.yaml"))
    },
    **{path.name: PARTS["study"] for path in sorted((PACKAGE / "eval" / "studies").glob("*.yaml"))},
}


@dataclass
class Toy:
    needed: str | None = field(default=None, metadata={"help": "What has to be there."})
    rate: float = 0.5
    count: int = 3
    flag: bool = True
    maybe: int | None = None
    names: list[str] = field(default_factory=lambda: ["a"])
    config: dict[str, typing.Any] | None = None


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "recipe.yaml").write_text(text)
        return str(tmp_path / "recipe.yaml")

    return write


def toy(*argv: str) -> Toy:
    return parse_recipe(argv, Toy)[0]


# --- reading -------------------------------------------------------------------------------------------------------


def test_defaults_without_a_file():
    assert toy() == Toy()


def test_the_file_goes_over_the_defaults_and_the_command_line_over_the_file(recipe):
    path = recipe("rate: 0.25\ncount: 7\nflag: false\nnames: [x, y]\n")
    assert toy(path) == Toy(rate=0.25, count=7, flag=False, names=["x", "y"])
    assert toy(path, "--count", "8", "--names", "z") == Toy(rate=0.25, count=8, flag=False, names=["z"])
    assert toy(path, "--flag", "true", "--rate=1e-5") == Toy(rate=1e-5, count=7, flag=True, names=["x", "y"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rate: 2e-5", Toy(rate=2e-5)),
        ("rate: 2.0E-5", Toy(rate=2e-5)),
        ("rate: 1", Toy(rate=1.0)),
        ("rate: -1", Toy(rate=-1.0)),
        ("rate: -1e-3", Toy(rate=-1e-3)),
        ("maybe: null", Toy()),
        ("flag: no", Toy(flag=False)),
        ("needed: two words", Toy(needed="two words")),
        ("needed: --count", Toy(needed="--count")),
        ("needed: a=b", Toy(needed="a=b")),
        ("needed: 5", Toy(needed="5")),
        ("names: single", Toy(names=["single"])),
        ("config: {eps: 1e-6, a: {b: [1, x], c: null}}", Toy(config={"eps": 1e-6, "a": {"b": [1, "x"], "c": None}})),
    ],
)
def test_values_of_a_file(recipe, text, expected):
    found = toy(recipe(text + "\n"))
    assert found == expected
    assert [type(value) for value in vars(found).values()] == [type(value) for value in vars(expected).values()]


def test_null_takes_a_default_back(recipe):
    (args,) = parse_recipe([recipe("save_total_limit: null\n"), "--use_cpu", "true"], RunArguments)
    assert args.save_total_limit is None


@pytest.mark.parametrize("given", ["{eps: 1e-6}", '{"eps": 1e-06}'])
def test_a_mapping_on_the_command_line(given):
    assert toy("--config", given).config == {"eps": 1e-6}


@pytest.mark.parametrize("given", [["4", "4"], ["[4,4]"], ["[4, 4]"]])
def test_a_list_on_the_command_line(given):
    model, *_ = parse_recipe(["--connector_grid", *given, "--name", "[a]"], *PARTS["vlm"])
    assert model.connector_grid == [4, 4]
    model, _, run = parse_recipe([f"--connector_grid={given[-1]}", "--name", "[a]"], *PARTS["vlm"])
    assert run.name == "[a]" and model.connector_grid in ([4, 4], [4])


def test_mappings_that_transformers_reads_as_json(recipe):
    (args,) = parse_recipe(
        [recipe("lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-6}\n"), "--use_cpu=1"],
        RunArguments,
    )
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-6}


def test_several_parts_share_one_file(recipe):
    path = recipe("needed: here\nlearning_rate: 2e-5\nmax_steps: 3\n")
    part, args = parse_recipe([path, "--learning_rate", "1e-5", "--use_cpu", "true"], Toy, RunArguments)
    assert part.needed == "here" and args.learning_rate == 1e-5 and args.max_steps == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ratee: 1", "{0} has the key 'ratee', which is no key of a recipe; did you mean 'rate'"),
        ("zzzzzz: 1", "{0} has the key 'zzzzzz', which is no key of a recipe."),
        ("rate: fast", "{0}: the key 'rate' has a bad value: invalid float value: 'fast'."),
        ("count: 1.5", "{0}: the key 'count' has a bad value: invalid int value: '1.5'."),
        ("count: yes", "{0}: the key 'count' has a bad value: invalid int value: 'True'."),
        ("maybe: [1, 2]", "{0}: the key 'maybe' has a bad value: [1, 2], where one value would be right."),
        ("flag: 7", "{0}: the key 'flag' has a bad value: Truthy value expected: got 7"),
        ("needed: off", "{0}: the key 'needed' has a bad value: YAML reads yes, no, on, off as False"),
        ("needed: {a: 1}", "{0}: the key 'needed' has a bad value: {{'a': 1}}, where one value would be right."),
        ("names: []", "{0}: the key 'names' has a bad value: [], where a list of at least one value would be right."),
        ("config: 3", "{0}: the key 'config' has a bad value: '3' is no mapping"),
        ("config: [3]", "{0}: the key 'config' has a bad value: [3], where a mapping would be right."),
        ("rate: 1\ncount: 2\nrate: 2", "{0} has the key 'rate' twice."),
        ("- rate", "{0} must hold `key: value` lines."),
        ("", "{0} must hold `key: value` lines."),
        ("rate: [", "{0} is not YAML:"),
        ("1: 2", "{0} has the key '1', which is no key of a recipe."),
        ("[1]: 2", "{0} is not YAML:"),
    ],
)
def test_bad_files_are_told_what_is_wrong(recipe, text, message):
    path = recipe(text)
    with pytest.raises(ValueError) as error:
        toy(path)
    assert str(error.value).startswith(message.format(path)) and "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "missing.yaml", tmp_path):
        with pytest.raises(ValueError, match=re.escape(f"{path}: no such recipe file.")):
            toy(str(path))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ratee", "1"], "The command line has '--ratee', which is no key of a recipe; did you mean 'rate'"),
        (["--count-s", "1"], "The command line has '--count-s', which is no key of a recipe; did you mean 'count'"),
        (["--rat", "1"], "The command line has '--rat', which is no key"),  # not taken for --rate
        (["--rate", "fast"], "The command line: the key 'rate' has a bad value: invalid float value: 'fast'."),
        (["--rate"], "The command line: the key 'rate' has a bad value: expected one argument."),
        (["--config", "3"], "The command line: the key 'config' has a bad value: '3' is no mapping"),
        (["--count", "4", "recipe.yaml"], "The command line has 'recipe.yaml', which is no key"),
    ],
)
def test_bad_command_lines_are_told_what_is_wrong(argv, message):
    with pytest.raises(ValueError) as error:
        toy(*argv)
    assert str(error.value).startswith(message)


def test_values_that_only_transformers_knows_are_wrong_are_laid_to_the_file(recipe):
    path = recipe("lr_scheduler_type: cosin\n")
    with pytest.raises(ValueError, match=re.escape(f"The recipe ({path}) cannot be used: cosin is not a valid")):
        parse_recipe([path], RunArguments)


def test_the_command_line_is_that_of_the_process_by_default(recipe, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", recipe("count: 4\n"), "--rate", "3"])
    assert parse_recipe(None, Toy)[0] == Toy(count=4, rate=3.0)


def test_required_keys_are_named_with_their_meaning():
    require(Toy(needed="x"), "needed", "rate")
    with pytest.raises(ValueError, match=re.escape("The recipe lacks the key 'needed': What has to be there.")):
        require(Toy(), "rate", "needed")


# --- the shipped recipes -------------------------------------------------------------------------------------------


def shipped(name: str) -> Path:
    return next(PACKAGE.glob(f"*/*/{name}"))


def test_all_recipes_are_looked_at():
    assert len(RECIPES) >= 6


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_parse_and_every_key_is_read(name):
    values = yaml.safe_load(shipped(name).read_text())
    objects = parse_recipe([str(shipped(name))], *RECIPES[name])
    found = {key: value for part in objects for key, value in vars(part).items()}
    for key, value in values.items():
        expected = float(value) if isinstance(found[key], float) else value
        assert found[key] == expected, key


@pytest.mark.parametrize("name", RECIPES)
def test_every_key_of_a_shipped_recipe_has_its_meaning_and_default_above_it(name):
    """Keys may share one comment when they stand together and it speaks of all."""
    defaults = {f.name: f for part in RECIPES[name] for f in dataclasses.fields(part)}
    comment, keys_since = "", 0
    for line in shipped(name).read_text().splitlines():
        if line.startswith("#"):
            comment = f"{comment} {line.lstrip('# ')}" if keys_since == 0 else line.lstrip("# ")
            keys_since = 0
        elif not line.strip():
            comment, keys_since = "", 0
        elif not line.startswith((" ", "-")):
            key = line.partition(":")[0]
            keys_since += 1
            assert key in defaults, f"{key} is no key"
            assert len(comment) > 20, f"{key} has no comment above it"
            default = re.search(r"Default: ([^.]+(\.\d+)?)|[Rr]equired", comment)
            assert default, f"the comment above {key} names no default and does not say that it is required"
            if default[1] and keys_since == 1:
                check_default(key, default[1].strip(), defaults[key])


def check_default(key: str, said: str, declared: dataclasses.Field) -> None:
    """What a comment calls the default is the default; a default that is None may be put in words."""
    is_factory = declared.default_factory is not dataclasses.MISSING
    default = declared.default_factory() if is_factory else declared.default
    if default is None or isinstance(default, list):
        return
    if isinstance(default, bool):
        assert said.startswith(str(default).lower()), key
    elif isinstance(default, int | float):
        assert float(re.match(r"-?[\d.]+(e-?\d+)?", said)[0]) == default, key
    else:
        assert said.startswith(str(getattr(default, "value", default))), key


def test_the_two_paper_recipes_differ_in_name_and_encoder_alone():
    first, second = (yaml.safe_load(shipped(f"paper_{name}.yaml").read_text()) for name in ("vit_s", "vmamba_s"))
    assert {key for key in first | second if first.get(key) != second.get(key)} == {"name", "vision_encoder"}


# --- the run directory ---------------------------------------------------------------------------------------------


@pytest.fixture
def inputs(tmp_path):
    """A data file and a model folder."""
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "finished.json", "answers.jsonl"):
        (tmp_path / "model" / name).write_text(f"{name} one")
    (tmp_path / "data.json").write_text("rows")
    return tmp_path


@dataclass
class Inputs:
    data: str = ""
    model: str = ""


def run_of(folder: Path, *argv: str, output: str = "runs") -> RunDirectory:
    paths = ["--data", str(folder / "data.json"), "--model", str(folder / "model")]
    where = ["--output_dir", str(folder / output), "--use_cpu", "true"]
    part, args = parse_recipe([*paths, *where, *argv], Inputs, RunArguments)
    contents = {"data": lambda: fingerprint(part.data), "model": lambda: fingerprint(part.model)}
    run = RunDirectory.of(resolved(part, args), contents, args)
    assert args.output_dir == str(run.path) and run.path.parent == folder / output
    return run


def test_the_directory_is_name_and_hash_and_is_not_made_yet(inputs):
    run = run_of(inputs, "--name", "mine")
    assert re.fullmatch(r"mine-[0-9a-f]{10}", run.path.name)
    assert not run.path.parent.exists(), "a recipe that turns out to be bad leaves nothing behind"


def test_the_same_recipe_gives_the_same_directory(inputs):
    assert run_of(inputs).path == run_of(inputs).path
    assert run_of(inputs, "--learning_rate", "5e-5").path == run_of(inputs).path, "5e-5 is the default"


@pytest.mark.parametrize(
    "argv",
    [
        ["--logging_steps", "3"],
        ["--logging_first_step", "true"],
        ["--disable_tqdm", "true"],
        ["--save_steps", "7"],
        ["--save_total_limit", "4"],
        ["--dataloader_num_workers", "2"],
        ["--report_to", "tensorboard"],
        ["--run_name", "other"],
        ["--per_device_eval_batch_size", "3"],
    ],
)
def test_what_does_not_change_learning_does_not_change_the_name(inputs, argv):
    assert run_of(inputs, *argv).path == run_of(inputs).path


def test_the_place_of_the_output_does_not_change_the_name(inputs):
    assert run_of(inputs, output="elsewhere").path.name == run_of(inputs).path.name


@pytest.mark.parametrize(
    "argv",
    [
        ["--learning_rate", "1e-5"],
        ["--seed", "8"],
        ["--max_steps", "3"],
        ["--per_device_train_batch_size", "4"],
        ["--fill_batches", "true"],
        ["--lr_scheduler_type", "linear"],
        ["--gradient_accumulation_steps", "2"],
    ],
)
def test_what_changes_learning_changes_the_name(inputs, argv):
    assert run_of(inputs, *argv).path.name != run_of(inputs).path.name


@pytest.mark.parametrize("name", ["data.json", "model/model.safetensors", "model/config.json", "model/tokenizer.json"])
def test_other_content_of_an_input_gives_another_directory(inputs, name):
    before = run_of(inputs).path
    (inputs / name).write_text("other")
    assert run_of(inputs).path != before


@pytest.mark.parametrize("name", ["model/finished.json", "model/answers.jsonl"])
def test_what_a_model_does_not_read_does_not_count(inputs, name):
    before = run_of(inputs).path
    (inputs / name).write_text("other")
    assert run_of(inputs).path == before


def test_the_place_of_an_input_does_not_count(inputs):
    before = run_of(inputs).path.name
    shutil.copytree(inputs, inputs / "moved", ignore=shutil.ignore_patterns("moved"))
    assert run_of(inputs / "moved").path.name == before
    assert run_of(inputs, "--data", str(inputs / "." / "data.json")).path.name == before


def test_two_inputs_that_change_places_are_not_the_same(inputs):
    (inputs / "other.json").write_text("other rows")
    swapped = ["--data", str(inputs / "other.json"), "--model", str(inputs / "data.json")]
    again = ["--data", str(inputs / "data.json"), "--model", str(inputs / "other.json")]
    assert run_of(inputs, *swapped).path != run_of(inputs, *again).path


def test_an_input_that_is_not_here_counts_by_its_name(inputs):
    names = [run_of(inputs, "--model", name).path.name for name in ("org/a", "org/b", "org/a")]
    assert names[0] == names[2] != names[1]


def test_pictures_count_by_name_and_size(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(b"12")
    before = fingerprint(tmp_path)
    assert fingerprint(str(tmp_path)) == before
    (tmp_path / "cat" / "1.png").write_bytes(b"123")
    longer = fingerprint(tmp_path)
    (tmp_path / "cat" / "1.png").rename(tmp_path / "cat" / "2.png")
    assert len({before, longer, fingerprint(tmp_path)}) == 3
    assert fingerprint(tmp_path / "nothing") is None and fingerprint(None) is None


def test_the_number_of_processes_counts_since_it_multiplies_the_batch(inputs, monkeypatch):
    before = run_of(inputs).path
    monkeypatch.setattr(RunArguments, "world_size", property(lambda self: 2))
    assert run_of(inputs).path != before


def test_the_recipe_that_is_kept_is_a_recipe_for_the_same_run(inputs):
    run = run_of(inputs, "--learning_rate", "3e-4", "--max_steps", "4", "--lr_scheduler_kwargs", "{}")
    with run.begin():
        kept = run.path / "recipe.yaml"
        part, args = parse_recipe([str(kept), "--output_dir", str(inputs / "runs")], Inputs, RunArguments)
    contents = {"data": lambda: fingerprint(part.data), "model": lambda: fingerprint(part.model)}
    assert RunDirectory.of(resolved(part, args), contents, args).path == run.path


def test_a_run_is_finished_once_its_summary_is_whole(inputs):
    run = run_of(inputs)
    with run.begin():
        assert not run.is_finished
        (run.path / "finished.json.partial").write_text("{")
        assert not run.is_finished
        run.finish({"accuracy": 0.5})
    assert run.is_finished and run.summary == {"accuracy": 0.5}
    assert not (run.path / "finished.json.partial").exists()


def test_two_commands_cannot_train_one_run_at_a_time(inputs):
    run = run_of(inputs)
    refused = pytest.raises(ValueError, match="is being trained by another command")
    with run.begin(), refused, run_of(inputs).begin():
        pass
    with run_of(inputs).begin():
        assert yaml.safe_load((run.path / "recipe.yaml").read_text())["model"] == str(inputs / "model")


def test_the_newest_whole_checkpoint_is_found_and_torn_ones_are_deleted(inputs):
    run = run_of(inputs)
    with run.begin():
        assert run.last_checkpoint() is None
        for step, state in {200: "{}", 1000: "{}", 400: "{}", 1200: None, 1400: '{"log_history": ['}.items():
            (run.path / f"checkpoint-{step}").mkdir()
            if state is not None:
                (run.path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
        (run.path / "checkpoint-notes").mkdir()
        assert run.last_checkpoint() == str(run.path / "checkpoint-1000")
        left = sorted(path.name for path in run.path.glob("checkpoint-*"))
        assert left == ["checkpoint-1000", "checkpoint-200", "checkpoint-400", "checkpoint-notes"]


def test_what_is_resolved_is_plain_json(inputs):
    part, args = parse_recipe(["--debug", "underflow_overflow", "--use_cpu", "true"], Inputs, RunArguments)
    values = resolved(part, args)
    assert json.loads(json.dumps(values)) == values and values["debug"]
    assert "learning_rate" not in values, "defaults of the training arguments are left out"
