"""A tiny DigitScenes, a tiny language model on it, and the arguments of a VLM run that takes a second."""

import json
from functools import partial
from pathlib import Path

import pytest

from ssm_vlm.training.digit_scenes import DigitScenesConfig, write_digit_scenes
from ssm_vlm.training.train_language_model import main as train_language_model

TINY_SCENES = DigitScenesConfig(
    train_scenes=12,
    text_scenes=24,
    val_scenes=3,
    test_scenes=3,
    classification_train=24,
    classification_val=12,
    turns=2,
)
TINY_LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 1024,
    "attention_dropout": 0.1,  # so that the state of the random generators shows
}


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """DigitScenes, and `mixed.json`: six conversations about pictures and six without."""
    folder = write_digit_scenes(tmp_path_factory.mktemp("scenes") / "data", TINY_SCENES)
    rows = [json.loads((folder / f"{name}.json").read_text())[:6] for name in ("train", "text")]
    (folder / "mixed.json").write_text(json.dumps([*rows[0], *rows[1]]))
    return folder


@pytest.fixture(scope="session")
def language_model(scenes, tmp_path_factory) -> Path:
    """The run directory of a Llama that was trained for two steps."""
    arguments = {
        "language_model_config": json.dumps(TINY_LLAMA),
        "vocabulary": 280,
        "data_path": scenes / "text.json",
        "output_dir": tmp_path_factory.mktemp("language_model"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
    }
    return train_language_model(options(arguments)).path


@pytest.fixture(scope="session")
def vlm_options(scenes, language_model):
    """Makes the command line of a small VLM run out of its output folder and what is to be different."""

    def make(output_dir: Path, **different) -> list[str]:
        arguments = {
            "vision_encoder": "digit_identity.digitscenes_64",
            "vision_pretrained": False,
            "language_model": language_model,
            "data_path": scenes / "mixed.json",
            "image_root": scenes / "images",
            "output_dir": output_dir,
            "max_steps": 5,
            "save_steps": 2,
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.01,
            "weight_decay": 0.1,
            "use_cpu": True,
        }
        return options(arguments | different)

    return make


@pytest.fixture
def vlm_arguments(vlm_options, tmp_path):
    """The same for an output folder of the test's own."""
    return partial(vlm_options, tmp_path / "runs")


def options(arguments: dict) -> list[str]:
    return [f"--{key}={value}" for key, value in arguments.items()]
