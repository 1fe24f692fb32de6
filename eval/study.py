"""The controlled study: the same recipe around every encoder, and one table at the end.

`python -m ssm_vlm.eval.study [study.yaml] [--key value ...]`, or `ssm-vlm study`. By default it is the embedded study
on DigitScenes. Every step is a run directory, so that an interrupted study goes on where it was and a finished step is
not repeated.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from rich.console import Console
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from ..configuration.named_encoders import get_named_encoder
from ..modeling.connectors import model_downsampling
from ..modeling.model_card import leave_card
from ..modeling.token_grid import num_image_tokens
from ..training.digit_scenes import DigitScenesConfig, write_digit_scenes
from ..training.recipe import RunArguments, RunDirectory, parse_recipe, run_script
from ..training.train_encoder import EncoderArguments
from ..training.train_encoder import main as train_encoder
from ..training.train_language_model import LanguageModelArguments
from ..training.train_language_model import main as train_language_model
from ..training.train_vlm import DataArguments, ModelArguments
from ..training.train_vlm import main as train_vlm
from .encoder_cost import encoder_cost
from .evaluate import Result, evaluate
from .report import write_report
from .study_table import StudyRow, print_table
from .tasks import EvalItem, read_refcoco, read_vqa

RECIPES = Path(__file__).parent.parent / "training" / "recipes"


@dataclass
class StudyArguments:
    """What is compared, with what, and where it goes."""

    study_dir: str = field(default="runs/study", metadata={"help": "Folder of the study."})
    encoders: list[str] = field(
        default_factory=lambda: ["digit_vmamba.digitscenes_64", "digit_vit.digitscenes_64"],
        metadata={"help": "Names in the table of encoders, one row of the result each."},
    )
    encoder_recipe: str = field(default="digit_encoder.yaml", metadata={"help": "Recipe of the encoders' pretraining."})
    language_model_recipe: str = field(
        default="digit_language_model.yaml", metadata={"help": "Recipe of the language model."}
    )
    vlm_recipe: str = field(default="digit_vlm.yaml", metadata={"help": "Recipe of every VLM."})
    encoder_steps: int | None = field(default=None, metadata={"help": "Steps instead of the recipe's."})
    language_model_steps: int | None = field(default=None, metadata={"help": "Steps instead of the recipe's."})
    vlm_steps: int | None = field(default=None, metadata={"help": "Steps instead of the recipe's."})
    data: dict[str, Any] | None = field(
        default=None, metadata={"help": "Fields of DigitScenesConfig that differ from its defaults."}
    )
    split: Literal["val", "test"] = field(default="test", metadata={"help": "val to choose settings, test to report."})
    eval_batch_size: int = field(default=64, metadata={"help": "Questions at a time."})
    max_new_tokens: int = field(default=32, metadata={"help": "Longest answer in tokens."})


class StudySteps:
    """Prints each step as it begins and keeps the seconds it took, over interruptions too."""

    def __init__(self, folder: Path, console: Console, total: int):
        self.file, self.console, self.total, self.number = folder / "seconds.json", console, total, 0
        self.seconds: dict[str, float] = json.loads(self.file.read_text()) if self.file.is_file() else {}

    def run(self, name: str, step: Callable[[], Any]) -> Any:
        """Runs a step; one that finds its work done already keeps its first time. A training run knows its own."""
        self.number += 1
        self.console.rule(f"[bold]{self.number}/{self.total}  {name}", align="left")
        started = time.perf_counter()
        result = step()
        if isinstance(result, RunDirectory):
            self.seconds[name] = result.summary["seconds"]
        else:
            self.seconds[name] = max(self.seconds.get(name, 0.0), time.perf_counter() - started)
        if not self.console.quiet:
            self.file.write_text(json.dumps(self.seconds, indent=1))
        return result


def run_study(study: StudyArguments) -> list[StudyRow]:
    """Runs what is not done yet, prints the table and writes `table.json`, `table.md`, `samples.png`, `report.html`.

    Under `torchrun` all processes train; the main one does the rest, and the others return no rows.

    Raises:
        ValueError: no such encoder, recipe, key of a recipe or field of the data's config; nothing is written then.
    """
    processes = RunArguments(output_dir=study.study_dir).distributed_state  # as the runs will find them
    console = Console(quiet=not processes.is_main_process)
    for name in study.encoders:
        get_named_encoder(name)
    config = _data_config(study.data or {})
    parse_recipe([_recipe(study.encoder_recipe)], EncoderArguments, RunArguments)
    parse_recipe([_recipe(study.language_model_recipe)], LanguageModelArguments, RunArguments)
    parse_recipe([_recipe(study.vlm_recipe)], ModelArguments, DataArguments, RunArguments)
    folder = Path(study.study_dir)
    folder.mkdir(parents=True, exist_ok=True)
    steps = StudySteps(folder, console, total=3 + 3 * len(study.encoders))

    with processes.main_process_first():
        data = steps.run(
            "data", lambda: write_digit_scenes(folder / "data", config, lambda line: console.print("  " + line))
        )
    encoder_runs = {
        name: steps.run(f"encoder {name}", partial(_pretrain, study, name, data)) for name in study.encoders
    }
    language_model = steps.run("language model", lambda: _train_language_model(study, data))
    vlms = {
        name: steps.run(f"vlm {name}", partial(_train_vlm, study, name, data, language_model.path))
        for name in study.encoders
    }
    if not processes.is_main_process:
        return []
    items = read_items(data, study.split)
    rows, results = [], {}
    for name in study.encoders:
        result = steps.run(f"evaluation {name}", partial(_evaluate, study, vlms[name].path, items))
        results[name] = result
        entry = get_named_encoder(name)
        size = (entry.preprocessing.height, entry.preprocessing.width)
        cost = encoder_cost(entry.config(), *size)
        rows.append(
            StudyRow.of(
                name,
                parameters=cost.parameters,
                flops=cost.flops,
                tokens=num_image_tokens(*size, model_downsampling(AutoConfig.from_pretrained(vlms[name].path))),
                accuracy=encoder_runs[name].summary["accuracy"],
                result=result,
                seconds=sum(steps.seconds[f"{step} {name}"] for step in ("encoder", "vlm", "evaluation")),
            )
        )
    steps.run("report", lambda: write_report(folder, rows, results, items, asdict(study), steps.seconds, vlms))
    print_table(rows, console)
    console.print(f"\n{folder}/report.html  {folder}/samples.png  {folder}/table.json")
    return rows


def _data_config(fields_given: dict[str, Any]) -> DigitScenesConfig:
    names = [f.name for f in fields(DigitScenesConfig)]
    for name in fields_given:
        if name not in names:
            raise ValueError(f"data has the key {name!r}, but the fields of DigitScenes are {', '.join(names)}.")
    return DigitScenesConfig(**fields_given)


def read_items(data: Path, split: str) -> list[EvalItem]:
    """Every question of a split of DigitScenes, VQA then localisation."""
    images = data / "images" / "eval"
    vqa = read_vqa(data / f"vqa_{split}_questions.json", data / f"vqa_{split}_annotations.json", images)
    return vqa + read_refcoco(data / "refs(digits).json", data / "instances.json", images, split)


def _recipe(name: str) -> str:
    """A recipe file of the user's own, or one that the library ships."""
    return str(RECIPES / name) if not Path(name).is_file() and (RECIPES / name).is_file() else name


def _steps(steps: int | None) -> list[str]:
    return [] if steps is None else ["--max_steps", str(steps)]


def _pretrain(study: StudyArguments, name: str, data: Path) -> RunDirectory:
    folders = ["--train_folder", f"{data}/classification/train", "--val_folder", f"{data}/classification/val"]
    where = ["--vision_encoder", name, "--output_dir", study.study_dir, "--name", f"encoder-{name}"]
    run = train_encoder([_recipe(study.encoder_recipe), *where, *folders, *_steps(study.encoder_steps)])
    _link(Path(study.study_dir) / "encoders" / name, Path(run.path.name) / "backbone")
    return run


def _link(link: Path, target: Path) -> None:
    """A name without hash for the newest run; `target` is relative to the study's folder."""
    processes = PartialState()
    if processes.is_main_process:
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(Path("..") / target)
    processes.wait_for_everyone()


def _train_language_model(study: StudyArguments, data: Path) -> RunDirectory:
    where = ["--data_path", f"{data}/text.json", "--output_dir", study.study_dir]
    run = train_language_model([_recipe(study.language_model_recipe), *where, *_steps(study.language_model_steps)])
    _link(Path(study.study_dir) / "models" / "language_model", Path(run.path.name))
    return run


def _train_vlm(study: StudyArguments, name: str, data: Path, language_model: Path) -> RunDirectory:
    encoder = ["--vision_encoder", name, "--vision_weights_dir", f"{study.study_dir}/encoders"]
    where = ["--language_model", str(language_model), "--output_dir", study.study_dir, "--name", f"vlm-{name}"]
    files = ["--data_path", f"{data}/train.json", "--image_root", f"{data}/images"]
    run = train_vlm([_recipe(study.vlm_recipe), *encoder, *where, *files, *_steps(study.vlm_steps)])
    _link(Path(study.study_dir) / "models" / name, Path(run.path.name))
    return run


def _evaluate(study: StudyArguments, vlm: Path, items: list[EvalItem]) -> Result:
    model = AutoModelForImageTextToText.from_pretrained(vlm)
    result = evaluate(
        model,
        AutoProcessor.from_pretrained(vlm),
        items,
        output_jsonl=vlm / f"answers_{study.split}.jsonl",
        batch_size=study.eval_batch_size,
        max_new_tokens=study.max_new_tokens,
        box_frame=model.config.box_frame,
        blank_floor=True,
        data=f"DigitScenes {study.split}",
    )
    result.save(result.predictions.with_suffix(".scores.json"))
    leave_card(vlm)
    return result


def main(argv: Sequence[str] | None = None) -> list[StudyRow]:
    (study,) = parse_recipe(argv, StudyArguments)
    return run_study(study)


if __name__ == "__main__":
    run_script(main)
