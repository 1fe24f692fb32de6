"""Asks a model every item of a task and scores its answers: `python -m ssm_vlm.eval.evaluate --help`."""

import argparse
import dataclasses
import hashlib
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from ..modeling.geometry import BOX_FRAMES
from ..modeling.image_processing_llava_style import load_image
from .prediction_log import PredictionLog
from .scores import ANSWER_METRICS, TASKS, BoxFrame, TaskScore, score_answers, score_boxes
from .tasks import EvalItem, read_refcoco, read_vqa, slim

# Plain greedy decoding, whatever the language model's own generation settings say (paper_protocol section 5.3).
GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "temperature": None,
    "top_p": None,
    "top_k": None,
}
_VALUES_PER_TENSOR = 16
_UNSTABLE_CONFIG_KEYS = {"_name_or_path", "architectures", "dtype", "transformers_version"}


@dataclasses.dataclass(frozen=True)
class Result:
    """Scores of one model on a list of items.

    Attributes:
        scores: by task.
        num_items: items in all.
        blank_images: whether the model was shown pictures of one colour instead of the real ones.
        predictions: the file with every answer.
        data: what was asked, in words, for people and model cards.
    """

    scores: dict[str, TaskScore]
    num_items: int
    blank_images: bool
    predictions: Path
    data: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**dataclasses.asdict(self), "predictions": str(self.predictions)}

    def save(self, path: str | os.PathLike) -> None:
        """Writes the scores as JSON, unless they are there already."""
        file, text = Path(path), json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        if not file.is_file() or file.read_text() != text:
            file.write_text(text)


def evaluate(
    model: Any,
    processor: Any,
    items: Sequence[EvalItem],
    *,
    output_jsonl: str | os.PathLike,
    batch_size: int = 8,
    max_new_tokens: int = 128,
    box_frame: str = "centered_square",
    iou_threshold: float = 0.5,
    blank_images: bool = False,
    blank_floor: bool = False,
    floor_items: Sequence[EvalItem] | None = None,
    data: str | None = None,
    progress: bool = True,
) -> Result:
    """Asks `model` every item, one picture and one prompt each, and scores what it says.

    Decoding is greedy. Answers are written to `output_jsonl` as batches end; the same call goes on where an interrupted
    one stopped, and only scores where it had finished. The longest prompts come first, so that running out of memory
    shows at once.

    Args:
        model: has `generate`; is put into eval mode for the time being.
        processor: a `LlavaStyleProcessor`, or one like it.
        items: what to ask; their ids must differ.
        output_jsonl: the file of answers.
        batch_size: items at a time; may differ from the interrupted run's.
        max_new_tokens: the longest answer, in tokens.
        box_frame: the frame the model was taught to give boxes in, one of `BOX_FRAMES`.
        iou_threshold: the overlap that makes a box right.
        blank_images: show a picture of the mean colour, of the same size, in place of each.
        blank_floor: after that, ask everything once more with blank pictures, and note the score among the floors; its
            answers go to a second file, named like the first with `.blank` before the suffix.
        floor_items: items, say of the training set, that the constant answers and the mean box are taken from.
        data: what the items are, in words, such as "VQA v2 validation"; noted in the result.
        progress: show a progress bar.

    Raises:
        ValueError: no items, an id that comes twice, an unknown task or frame, a file of answers of another run, a
            picture whose size is not what the data set says, or a tokenizer that cannot pad.
        FileNotFoundError: a picture is missing; nothing has been asked then.
    """
    _check(processor, items, box_frame, batch_size, max_new_tokens)
    header = {
        "model": model_fingerprint(model),
        "processor": processor_fingerprint(processor),
        "items": _items_fingerprint(items),
        "num_items": len(items),
        "max_new_tokens": max_new_tokens,
        "blank_images": blank_images,
    }
    log = PredictionLog(output_jsonl, header)
    pending = sorted((item for item in items if item.id not in log.answers), key=lambda item: -len(item.prompt))
    _check_images(pending)
    was_training = model.training
    model.eval()
    try:
        with Progress(console=Console(stderr=True), disable=not progress) as bar:
            name = f"{Path(output_jsonl).name}{' (blank pictures)' if blank_images else ''}"
            bar_task = bar.add_task(name, total=len(items), completed=len(items) - len(pending))
            for answers in _generate(model, processor, pending, batch_size, max_new_tokens, blank_images):
                log.append(answers)
                bar.advance(bar_task, len(answers))
    finally:
        model.train(was_training)

    scores = _score(items, log, processor.image_processor, box_frame, iou_threshold, floor_items)
    if blank_floor and not blank_images:
        blank = evaluate(
            model,
            processor,
            items,
            output_jsonl=Path(output_jsonl).with_suffix(f".blank{Path(output_jsonl).suffix}"),
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            box_frame=box_frame,
            iou_threshold=iou_threshold,
            blank_images=True,
            progress=progress,
        )
        scores = {
            task: dataclasses.replace(score, floors={**score.floors, "blank_image": blank.scores[task].score})
            for task, score in scores.items()
        }
    return Result(scores, len(items), blank_images, Path(output_jsonl), data)


def model_fingerprint(model: PreTrainedModel) -> str:
    """A short hash by which a model is known again: its configuration and some values of each weight and buffer."""
    digest = hashlib.sha256(json.dumps(_stable(model.config.to_dict()), sort_keys=True, default=str).encode())
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        step = max(1, tensor.numel() // _VALUES_PER_TENSOR)
        values = tensor.detach().reshape(-1)[::step].float().cpu().numpy()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode() + values.astype(np.float32).tobytes())
    return digest.hexdigest()[:16]


def processor_fingerprint(processor: Any) -> str:
    """A short hash of how pictures and prompts are prepared."""
    parts = [_stable(processor.image_processor.to_dict()), processor.chat_template, processor.tokenizer.get_vocab()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _stable(config: Any) -> Any:
    """A configuration without what changes when it is saved or loaded elsewhere."""
    if not isinstance(config, dict):
        return config
    return {key: _stable(value) for key, value in config.items() if key not in _UNSTABLE_CONFIG_KEYS}


def _items_fingerprint(items: Sequence[EvalItem]) -> str:
    """What is asked, in any order; where the pictures' folder is does not matter, nor what the right answers are."""
    asked = sorted((item.id, os.path.basename(item.image), item.prompt) for item in items)
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def _check(processor: Any, items: Sequence[EvalItem], box_frame: str, batch_size: int, max_new_tokens: int) -> None:
    if not items:
        raise ValueError("There is no item to ask.")
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise ValueError(f"The id {item.id!r} comes twice among the items; give every item its own.")
        seen.add(item.id)
        if item.task not in TASKS:
            raise ValueError(f"The item {item.id!r} has the task {item.task!r}; known are {', '.join(TASKS)}.")
    if box_frame not in BOX_FRAMES:
        raise ValueError(f"The box frame {box_frame!r} is unknown; known are {', '.join(BOX_FRAMES)}.")
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name} is {value}, but must be at least 1.")
    if processor.tokenizer.pad_token_id is None:
        raise ValueError(
            "The tokenizer has no padding token, which prompts of different lengths need; "
            "set one, for example processor.tokenizer.pad_token = processor.tokenizer.eos_token."
        )


def _check_images(items: Sequence[EvalItem]) -> None:
    missing = [item for item in items if not os.path.isfile(item.image)]
    if missing:
        raise FileNotFoundError(
            f"The picture of the item {missing[0].id!r}, {missing[0].image}, is missing "
            f"({len(missing)} of {len(items)} items have none)."
        )


def _generate(
    model: Any, processor: Any, items: Sequence[EvalItem], batch_size: int, max_new_tokens: int, blank_images: bool
) -> Iterator[list[dict[str, Any]]]:
    """Yields the answers of batch after batch.

    One other thread prepares the next batch while the model is busy. It alone uses the processor: fast tokenizers do
    not bear two threads.
    """
    batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    with ThreadPoolExecutor(max_workers=1) as other_thread:

        def prepare(batch: Sequence[EvalItem]) -> Future:
            return other_thread.submit(_prepare, processor, batch, blank_images)

        coming = deque(prepare(batch) for batch in batches[:1])
        for number, batch in enumerate(batches):
            inputs, sizes = coming.popleft().result()
            coming.extend(prepare(following) for following in batches[number + 1 : number + 2])
            inputs = inputs.to(model.device)
            with torch.inference_mode():
                output = model.generate(
                    **inputs, **GREEDY, max_new_tokens=max_new_tokens, pad_token_id=processor.tokenizer.pad_token_id
                )
            answers = output[:, inputs["input_ids"].shape[1] :].cpu()  # [B, new tokens]
            texts = other_thread.submit(processor.batch_decode, answers, skip_special_tokens=True).result()
            yield [
                {"id": item.id, "prediction": text.strip(), "height": height, "width": width, "prompt": item.prompt}
                for item, text, (height, width) in zip(batch, texts, sizes, strict=True)
            ]


def _prepare(processor: Any, items: Sequence[EvalItem], blank_images: bool) -> tuple[Any, list[tuple[int, int]]]:
    """Model inputs of a batch, padded on the left, and each picture's raw (height, width)."""
    conversations, sizes = [], []
    for item in items:
        picture = load_image(item.image)
        size = (picture.height, picture.width)
        if item.image_size is not None and size != tuple(item.image_size):
            raise ValueError(
                f"The picture of the item {item.id!r}, {item.image}, is {size[0]} pixels high and {size[1]} wide, but "
                f"the data set says {item.image_size[0]} and {item.image_size[1]}: its boxes would not fit."
            )
        if blank_images:
            means = np.broadcast_to(processor.image_processor.image_mean, 3)
            picture = Image.new("RGB", picture.size, tuple(int(255 * mean) for mean in means))
        content = [{"type": "image", "image": picture}, {"type": "text", "text": item.prompt}]
        conversations.append([{"role": "user", "content": content}])
        sizes.append(size)
    inputs = processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
    return inputs, sizes


def _score(
    items: Sequence[EvalItem],
    log: PredictionLog,
    image_processor: Any,
    box_frame: str,
    iou_threshold: float,
    floor_items: Sequence[EvalItem] | None,
) -> dict[str, TaskScore]:
    """Scores by task; a task that `floor_items` say nothing about has its floors from the scored items."""
    predictions = {item.id: log.answers[item.id]["prediction"] for item in items}
    sizes = {item.id: (log.answers[item.id]["height"], log.answers[item.id]["width"]) for item in items}
    scores = {}
    for task in TASKS:
        of_task = [item for item in items if item.task == task]
        floor_of_task = [item for item in floor_items or () if item.task == task] or None
        if not of_task:
            continue
        if task in ANSWER_METRICS:
            scores[task] = score_answers(task, of_task, predictions, floor_of_task)
        else:
            frame = BoxFrame(image_processor, box_frame, sizes)
            scores[task] = score_boxes(of_task, predictions, frame, iou_threshold, floor_of_task)
    return scores


def _read_vqa(options: argparse.Namespace) -> list[EvalItem]:
    return read_vqa(options.questions, options.annotations, options.images, image_pattern=options.image_pattern)


def _read_grounding(options: argparse.Namespace) -> list[EvalItem]:
    return read_refcoco(options.questions, options.annotations, options.images, options.split)


def _data_name(options: argparse.Namespace) -> str:
    """The name of the file of questions, and of the split that was taken from it."""
    name = Path(options.questions).name
    return name if options.task == "vqa" else f"{name}, {options.split}"


_READERS: dict[str, Callable[[argparse.Namespace], list[EvalItem]]] = {"vqa": _read_vqa, "grounding": _read_grounding}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("ssm-vlm evaluate", description="Score a model on VQA v2 or RefCOCO files.")
    parser.add_argument("--model", required=True, help="a saved model with its processor: a folder or a Hub name")
    parser.add_argument("--task", required=True, choices=_READERS)
    parser.add_argument("--questions", required=True, help="VQA v2 questions .json, or refs(...).p or .json")
    parser.add_argument("--annotations", required=True, help="VQA v2 annotations .json, or instances.json")
    parser.add_argument("--images", required=True, help="folder of the images")
    parser.add_argument("--image-pattern", help="vqa: name of an image, for example '{image_id:012d}.jpg'")
    parser.add_argument("--split", default="val", help="grounding: val, testA, ... (default: val)")
    parser.add_argument("--output", required=True, help="file of answers, .jsonl; scores go beside it as .scores.json")
    parser.add_argument("--data", help="what this data is, in words, for the model card; default: the file's name")
    parser.add_argument("--limit", type=int, help="ask only so many items, chosen at random but always the same")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--box-frame", choices=BOX_FRAMES, help="default: the one the model's config names")
    parser.add_argument("--iou-threshold", type=float, default=0.5)
    parser.add_argument("--blank-floor", action="store_true", help="also ask everything with blank pictures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", help="auto (as saved), float32, bfloat16, ...")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parser().parse_args(argv)
    try:
        items = _READERS[options.task](options)
        if options.limit is not None:
            items = slim(items, options.limit)
        processor = AutoProcessor.from_pretrained(options.model)
        model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=options.dtype).to(options.device)
        result = evaluate(
            model,
            processor,
            items,
            output_jsonl=options.output,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
            box_frame=options.box_frame or getattr(model.config, "box_frame", "centered_square"),
            iou_threshold=options.iou_threshold,
            blank_floor=options.blank_floor,
            data=options.data or _data_name(options),
        )
        result.save(Path(options.output).with_suffix(".scores.json"))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for score in result.scores.values():
        _print(score, Console())
    return 0


def _print(score: TaskScore, console: Console) -> None:
    table = Table()
    for column in ("kind", "items", "per cent"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for kind, of_kind in score.kinds.items():
        table.add_row(kind, str(of_kind.num_items), f"{100 * of_kind.score:.2f}")
    table.add_section()
    table.add_row("all", str(score.num_items), f"{100 * score.score:.2f}", style="bold")
    for name, floor in score.floors.items():
        table.add_row(f"floor: {name}", "", f"{100 * floor:.2f}")
    notes = [f"constants are chosen on {score.floor_source}"]
    if score.box_frame is not None and score.invalid_share is not None:
        notes += [f"boxes in the frame {score.box_frame}", f"{100 * score.invalid_share:.2f} % of answers are no box"]
    console.print(f"{score.task}: {score.metric}", table, "; ".join(notes), sep="\n", markup=False)


if __name__ == "__main__":
    sys.exit(main())
