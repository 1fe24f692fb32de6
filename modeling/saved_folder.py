"""What the files of a saved model say about it; nothing is built, and no weight is read."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from ..configuration.named_encoders import ENCODERS, NamedEncoder
from ..configuration.taps import tapped_config, vision_part
from .saved_scores import Evaluation, count, read_scores, share

ORIGIN_FILE = "origin.json"
"""Written by `ssm-vlm convert` beside the weights: which published file they come from."""

SCORES_PATTERN = "*.scores.json"
"""Scores of `ssm-vlm evaluate` and of a study, beside the model that was asked."""


_STRING_KEYS = {
    "origin": ("encoder", "source", "sha256", "layout", "language_model"),
    "recipe": ("vision_encoder", "language_model", "data_path", "train_folder", "val_folder", "vision_weights_dir"),
}
_RUN_KEYS: dict[str, tuple[Any, str]] = {
    "encoder_origin": (Mapping, "an object"),
    "local": (list, "a list"),
    "seconds": ((int, float), "a number"),
    "versions": (Mapping, "an object"),
}


@dataclass(frozen=True)
class SavedFolder:
    """A folder written by `save_pretrained`, by a training run or by `ssm-vlm convert`.

    Raises:
        ValueError: on reading a file that is not what its name says.
        FileNotFoundError: there is no `config.json`, or there are no weights.
    """

    path: Path

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The model's configuration."""
        if not (self.path / "config.json").is_file():
            raise FileNotFoundError(f"{self.path} holds no config.json, so no saved model.")
        return AutoConfig.from_pretrained(self.path)

    def check(self) -> None:
        """Raises ValueError unless it is a LLaVA-style model, a vision encoder, or a classifier of pictures.

        And FileNotFoundError where its weights are not there, or not all of them.
        """
        if not (self.is_vlm or self.is_classifier or self.tap):
            raise ValueError(
                f"{self.path} holds a {self.config.model_type!r} model, which is neither a LLaVA-style model nor a "
                "vision encoder."
            )
        lost = [file.name for file in self.weight_files if not file.is_file()]
        if lost or not (self.weight_files or any(self.path.glob("pytorch_model*.bin"))):
            names = ", ".join(lost) or "model.safetensors"
            raise FileNotFoundError(f"{self.path} holds a config.json but not the weights: it lacks {names}.")

    @property
    def is_vlm(self) -> bool:
        """Whether it is a LLaVA-style model; else it is an encoder, with or without a classifier on it."""
        return self.config.model_type == "llava_style"

    @property
    def model_class(self) -> str:
        """Name of the class that was saved, empty where the config does not say."""
        return (self.config.architectures or [""])[0]

    @property
    def is_classifier(self) -> bool:
        """Whether the model has a classifier for pictures."""
        return self.model_class.endswith("ForImageClassification")

    @property
    def vision_config(self) -> PreTrainedConfig:
        """The encoder's config."""
        return vision_part(self.config)

    @property
    def is_tapped(self) -> bool:
        """Whether nothing of the encoder is saved after its tap."""
        own = self.config.model_type in ("llava_style", "backbone_classifier")
        return own or self.model_class.endswith("Backbone")

    @property
    def tap(self) -> str | None:
        """Where the encoder is tapped, of a whole model by default; None where that is not known."""
        if self.is_tapped:
            return (getattr(self.vision_config, "out_features", None) or [None])[-1]
        try:
            config = self.named_encoder.config() if self.named_encoder else tapped_config(self.config)
        except ValueError:  # a model that is no encoder of this library
            return None
        return config.out_features[-1]

    @cached_property
    def has_code(self) -> bool:
        """Whether the folder brings the code that `trust_remote_code=True` runs."""
        return bool(self._json("config.json").get("auto_map"))

    @cached_property
    def code_files(self) -> list[str]:
        """Names of the files of code that the folder's configs refer to."""
        maps = [self._json(name).get("auto_map", {}) for name in ("config.json", "processor_config.json")]
        references = [ref for auto_map in maps for ref in auto_map.values() if isinstance(ref, str) and "--" not in ref]
        return sorted({f"{reference.partition('.')[0]}.py" for reference in references})

    @cached_property
    def image_processor(self) -> dict[str, Any]:
        """Settings of the image processor, empty where none is saved."""
        settings = self._json("processor_config.json").get("image_processor")
        return settings if isinstance(settings, dict) and settings else self._json("preprocessor_config.json")

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The recipe that the model was trained by, empty where none is saved."""
        file = self.path / "recipe.yaml"
        try:
            recipe = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(recipe, dict):
            raise ValueError(f"{file} must hold `key: value` lines.")
        recipe = _with_strings(file, recipe, _STRING_KEYS["recipe"])
        return {key: value for key, value in recipe.items() if value is not None}

    @cached_property
    def run(self) -> dict[str, Any]:
        """What the training run noted at its end, empty where the model was not trained here."""
        file, run = self.path / "finished.json", self._json("finished.json")
        for key, (kind, what) in _RUN_KEYS.items():
            if run.get(key) is not None and not isinstance(run[key], kind):
                raise ValueError(f"{file}: {key} is {run[key]!r}; it must be {what}.")
        _with_strings(file, run.get("encoder_origin") or {}, _STRING_KEYS["origin"], "encoder_origin.")
        return {key: value for key, value in run.items() if value is not None}

    @cached_property
    def origin(self) -> dict[str, Any]:
        """Which published file the weights were converted from, empty where they were not."""
        return _with_strings(self.path / ORIGIN_FILE, self._json(ORIGIN_FILE), _STRING_KEYS["origin"])

    @property
    def encoder_origin(self) -> dict[str, Any]:
        """Which published file the encoder's weights were converted from, empty where that is not known."""
        return self.run.get("encoder_origin") or ({} if self.is_vlm else self.origin)

    @property
    def encoder_name(self) -> str | None:
        """What the conversion or the recipe calls the encoder."""
        return self.encoder_origin.get("encoder") or self.recipe.get("vision_encoder") or self.origin.get("encoder")

    @property
    def encoder_weights(self) -> str:
        """Where the weights of a named encoder are from: "published", or in words what they are instead."""
        if "train_folder" in self.recipe:
            return "trained anew"
        if self.recipe.get("vision_pretrained") is False:
            return "random at the start"
        if self.recipe.get("vision_weights_dir") and not self.encoder_origin:
            return "from a folder on the machine that made this model"
        return "published"

    @property
    def language_model_name(self) -> str | None:
        """What the recipe or the conversion calls the language model."""
        return self.recipe.get("language_model") or self.origin.get("language_model")

    @property
    def named_encoder(self) -> NamedEncoder | None:
        """The encoder's entry in the table, if it is one of those."""
        return ENCODERS.get(self.encoder_name or "")

    @property
    def is_toy(self) -> bool:
        """Whether the encoder, and so the model, was made on DigitScenes."""
        return "digitscenes" in (self.encoder_name or "").partition(".")[2].split("_")

    @cached_property
    def weight_files(self) -> list[Path]:
        """Safetensors files of the model in order, whether they are there or not; empty where nothing names any."""
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            try:
                return [self.path / name for name in sorted(set(self._json(index.name)["weight_map"].values()))]
            except (KeyError, AttributeError, TypeError):
                raise ValueError(f"{index} holds no weight_map.") from None
        return [file for file in [self.path / "model.safetensors"] if file.is_file()]

    @cached_property
    def parameters(self) -> Counter[str]:
        """Stored numbers (weights and buffers) by the first part of their key, such as `vision_tower`."""
        counts: Counter[str] = Counter()
        for file in self.weight_files:
            if not file.is_file():
                continue
            try:
                with safe_open(file, "pt") as tensors:
                    for key in tensors.keys():  # noqa: SIM118 (it is no mapping)
                        size = 1
                        for side in tensors.get_slice(key).get_shape():
                            size *= side
                        counts[key.partition(".")[0]] += size
            except SafetensorError as error:
                raise ValueError(f"{file} is not a whole safetensors file: {error}.") from None
        return counts

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """Scores that lie in the folder, and a classifier's accuracy at the end of its run."""
        found = []
        if "accuracy" in self.run:
            file = self.path / "finished.json"
            items, floor = self.run.get("accuracy_items"), self.run.get("accuracy_floor")
            found.append(
                Evaluation(
                    task="classification",
                    metric="accuracy",
                    score=share(file, "accuracy", self.run["accuracy"]),
                    data="/".join(Path(self.recipe.get("val_folder") or "").parts[-2:]) or None,
                    items=None if items is None else count(file, "accuracy_items", items),
                    floors={} if floor is None else {"constant_answer": share(file, "accuracy_floor", floor)},
                    floor_source=None if floor is None else "the scored items",
                )
            )
        for file in sorted(self.path.glob(SCORES_PATTERN)):
            result = self._json(file.name)
            if result.get("blank_images"):  # what the model guesses is no score of it
                continue
            found += read_scores(file, result)
        return found

    def _json(self, name: str) -> dict[str, Any]:
        file = self.path / name
        if not file.is_file():
            return {}
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not JSON: {error}.") from None
        if not isinstance(content, dict):
            raise ValueError(f"{file} must hold a JSON object.")
        return content


def _with_strings(file: Path, content: dict[str, Any], keys: Sequence[str], prefix: str = "") -> dict[str, Any]:
    """The content, or a ValueError that names file and key where one of the keys holds something else than text."""
    for key in keys:
        if not isinstance(content.get(key), str | None):
            raise ValueError(f"{file}: {prefix}{key} is {content[key]!r}; it must be text.")
    return content


__all__ = ["ORIGIN_FILE", "SCORES_PATTERN", "SavedFolder"]
