"""A conversation with a model about one picture: loading the model, asking, and reading boxes out of answers."""

import contextlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, TextStreamer

from .eval.evaluate import GREEDY
from .eval.grounding import Box, parse_box
from .training.recipe import FINISHED_MARKER, RECIPE_FILE

_BRACKETS = re.compile(r"\[[^\[\]]*\]")
_HUB_NAME = re.compile(r"[\w-]+/[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        text: without special tokens and outer white space.
        is_cut: whether it stopped only because it had as many tokens as it may.
    """

    text: str
    is_cut: bool


class Conversation:
    """Questions and answers about one picture, or none; every question is asked with all that was said before.

    Args:
        model: a `LlavaStyleForConditionalGeneration`.
        processor: its `LlavaStyleProcessor`.
        picture: upright RGB picture in its raw size, as `load_image` gives it.
        max_new_tokens: the longest answer, in tokens.
        temperature: 0 takes the likeliest token each time; above that, tokens are drawn.

    Raises:
        ValueError: see `check_generation`.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        picture: Image.Image | None = None,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
    ):
        check_generation(max_new_tokens, temperature)
        self.model, self.processor = model, processor
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
        self._generation = {**GREEDY, **sampling, "max_new_tokens": max_new_tokens}
        self.start(picture)

    def start(self, picture: Image.Image | None) -> None:
        """Forgets what was said and looks at `picture`."""
        self.picture = picture
        self.messages: list[dict[str, Any]] = []

    def ask(self, question: str, on_text: Callable[[str], None] | None = None) -> Answer:
        """Asks and remembers; a question that fails or is interrupted is forgotten.

        Args:
            question: given to the model as it is.
            on_text: called with each piece of the answer as it comes.

        Raises:
            ValueError: an empty question, or one that holds the placeholder of pictures.
        """
        processor, tokenizer = self.processor, self.processor.tokenizer
        if not question.strip():
            raise ValueError("The question is empty.")
        if processor.image_token in question:
            raise ValueError(f"A question cannot hold {processor.image_token}, which stands for the picture itself.")
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if self.picture is not None and not self.messages:
            content.insert(0, {"type": "image", "image": self.picture})
        messages = [*self.messages, {"role": "user", "content": content}]
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        streamer = None if on_text is None else _Stream(tokenizer, on_text)
        with torch.inference_mode():
            output = self.model.generate(**inputs, **self._generation, streamer=streamer, pad_token_id=padding)
        tokens = output[0, inputs["input_ids"].shape[1] :]
        text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        self.messages = [*messages, {"role": "assistant", "content": text}]
        is_full = len(tokens) == self._generation["max_new_tokens"]
        return Answer(text, is_cut=is_full and int(tokens[-1]) not in self._ends())

    def _ends(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        return {ends} if isinstance(ends, int) else set(ends or ())

    def boxes(self, answer: str) -> list[Box]:
        """The boxes an answer holds, in raw pixels of the picture and cut to it; one beside the picture has no area.

        They are read from the frame that the model's config names, through the geometry of the image processor.
        """
        if self.picture is None:
            return []
        width, height = self.picture.size
        geometry = self.processor.image_processor.get_geometry(height, width)
        boxes = []
        for box in filter(None, map(parse_box, _BRACKETS.findall(answer))):
            x1, y1, x2, y2 = geometry.from_frame(box, self.model.config.box_frame)
            boxes.append(Box(_clamp(x1, width), _clamp(y1, height), _clamp(x2, width), _clamp(y2, height)))
        return boxes


class _Stream(TextStreamer):
    """Hands over the answer as it is generated, without the white space in front."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text, self.has_begun = on_text, False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text if self.has_begun else text.lstrip()
        if text:
            self.has_begun = True
            self.on_text(text)


def _clamp(value: float, limit: int) -> float:
    return min(max(value, 0.0), float(limit))


def check_generation(max_new_tokens: int, temperature: float) -> None:
    """Raises ValueError for `max_new_tokens` below 1 and for a temperature that is negative or not finite."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, but must be at least 1.")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, but must be 0 (always the likeliest token) or more.")


def load_chat_model(name: str, device: str = "cpu", dtype: str = "auto") -> tuple[PreTrainedModel, Any]:
    """Model and processor from a run directory, from any other folder with a saved model, or from the Hub.

    Args:
        name: the folder, or `owner/model` where there is no such folder.
        device: what PyTorch calls it, such as `cuda:1`.
        dtype: `auto` for the one it was saved in, or a dtype's name.

    Raises:
        OSError: no such folder, one without a finished model, or files that cannot be read.
        ValueError: a model of another kind, weights that do not fill it, or a device that is not there.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"The device {device!r} cannot be used: {_first_line(error)}") from None
    folder = Path(name).expanduser()
    is_hub_name = _HUB_NAME.fullmatch(name) is not None and not folder.exists() and not folder.parent.exists()
    if not is_hub_name:
        _check_folder(folder)
        name = str(folder)
    try:
        processor = AutoProcessor.from_pretrained(name)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        where = f"There is no folder {name}, and from the Hub it" if is_hub_name else f"The model in {name}"
        raise OSError(f"{where} cannot be loaded: {_first_line(error)}") from error
    model, report = loaded
    _check_kind(name, model.config.model_type)
    unfit = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if unfit:
        raise ValueError(
            f"The weights in {name} do not fit its config.json: {len(unfit)} tensors are missing or of another shape, "
            f"first {unfit[0]}; save the whole model again."
        )
    return model.to(device).eval(), processor


def _check_folder(folder: Path) -> None:
    wanted = "give the run directory of a finished `ssm-vlm train`, or a folder with a saved model and its processor"
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"The model folder {folder} {what}: {wanted}{_models_in(folder.parent)}.")
    is_complete = all((folder / name).is_file() for name in ("config.json", "processor_config.json"))
    if (folder / RECIPE_FILE).is_file() and not (folder / FINISHED_MARKER).is_file() and not is_complete:
        raise FileNotFoundError(
            f"The run in {folder} has not finished (it has no {FINISHED_MARKER}): start it again with the command that "
            "began it, which goes on from the last checkpoint."
        )
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"The folder {folder} holds no model (no config.json): {wanted}{_models_in(folder)}.")
    _check_kind(str(folder), _model_type(folder / "config.json"))


def _check_kind(name: str, model_type: str | None) -> None:
    if model_type != "llava_style":
        raise ValueError(
            f"{name} holds a model of type {model_type!r}, which cannot be asked about pictures: give one of type "
            "'llava_style', such as `ssm-vlm train` makes."
        )


def _model_type(config: Path) -> str | None:
    try:
        return json.loads(config.read_text()).get("model_type")
    except (ValueError, AttributeError):
        raise ValueError(f"{config} is no model's config: it should be a JSON object with a model_type.") from None


def _models_in(folder: Path) -> str:
    """A hint at the models in a folder, if there are any."""
    names = []
    for config in sorted(folder.glob("*/config.json")):
        with contextlib.suppress(ValueError, OSError):
            if _model_type(config) == "llava_style":
                names.append(config.parent.name)
    return f" ({folder} holds {', '.join(names)})" if names else ""


def _first_line(error: BaseException) -> str:
    """The first line of an error's message, as the end of a sentence."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".:") + "."
