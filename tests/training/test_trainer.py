"""Runs: exact resumption, weight decay, what is frozen, losses that are not finite, a full disk."""

import errno
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Dinov2Config,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    SwinConfig,
    Trainer,
    set_seed,
)

from ssm_vlm import (
    HiddenStateBackbone,
    HiddenStateBackboneConfig,
    LlavaStyleForConditionalGeneration,
    SSMVisionBackbone,
    load_encoder,
)
from ssm_vlm.training import trainer as trainer_module
from ssm_vlm.training.recipe import RunArguments, RunDirectory
from ssm_vlm.training.train_encoder import main as train_encoder
from ssm_vlm.training.train_vlm import DataArguments, ModelArguments, build_model, parse_recipe
from ssm_vlm.training.train_vlm import main as train_vlm
from ssm_vlm.training.trainer import ControlledTrainer, NotFiniteLossError

PARTS = (ModelArguments, DataArguments, RunArguments)


class Interrupted(BaseException):
    """Ends a run as a signal would: nothing in the library catches it."""


@pytest.fixture
def interrupt(monkeypatch):
    """Makes the next run end in the middle of a step, or when its model is saved."""

    def at_step(step: int) -> None:
        whole_step = ControlledTrainer.training_step

        def training_step(self, *args, **kwargs):
            if self.state.global_step + 1 == step:
                monkeypatch.setattr(ControlledTrainer, "training_step", whole_step)
                raise Interrupted
            return whole_step(self, *args, **kwargs)

        monkeypatch.setattr(ControlledTrainer, "training_step", training_step)

    return at_step


def weights(run: RunDirectory | Path) -> dict[str, torch.Tensor]:
    return load_file(getattr(run, "path", run) / "model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def run_folder(arguments: list[str]) -> Path:
    """The only run directory below the `output_dir` of these arguments."""
    (folder,) = Path(dict(a.removeprefix("--").split("=", 1) for a in arguments)["output_dir"]).iterdir()
    return folder


# --- resumption ----------------------------------------------------------------------------------------------------

LONG = {"max_steps": 6, "lr_scheduler_type": "linear"}  # two epochs of three batches


@pytest.fixture(scope="session")
def uninterrupted(vlm_options, tmp_path_factory):
    """Weights and summary of a run from start to end."""
    run = train_vlm(vlm_options(tmp_path_factory.mktemp("whole"), **LONG))
    return weights(run), run.summary


@pytest.mark.parametrize(
    ("save_steps", "step"),
    [(2, 2), (2, 4), (3, 5), (5, 6)],
    ids=["before any checkpoint", "in the first epoch", "at the end of an epoch", "in the second epoch"],
)
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(save_steps, step, vlm_arguments, interrupt, uninterrupted):
    arguments = vlm_arguments(**LONG, save_steps=save_steps)
    interrupt(step)
    with pytest.raises(Interrupted):
        train_vlm(arguments)
    folder = run_folder(arguments)
    assert not (folder / "finished.json").exists() and not (folder / "model.safetensors").exists()
    run = train_vlm(arguments)
    expected, summary = uninterrupted
    assert run.path == folder and same(weights(run), expected)
    assert run.summary["steps"] == 6 and run.summary["log"] == summary["log"]
    assert not list(folder.glob("checkpoint-*")) and not (folder / "model.partial").exists()


def test_a_run_interrupted_twice_and_with_leftovers_of_a_save(vlm_arguments, interrupt, uninterrupted):
    arguments = vlm_arguments(**LONG)
    for step in (4, 5):
        interrupt(step)
        with pytest.raises(Interrupted):
            train_vlm(arguments)
    folder = run_folder(arguments)
    shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-8")
    (folder / "checkpoint-8" / "trainer_state.json").unlink()
    (folder / "model.partial" / "backbone").mkdir(parents=True)
    for name in ("model.safetensors", "backbone/half.bin", "config.json"):
        (folder / "model.partial" / name).write_bytes(b"half")
    (folder / "config.json").write_text("moved before the interruption")
    run = train_vlm(arguments)
    assert same(weights(run), uninterrupted[0])
    assert "llava_style" in (folder / "config.json").read_text()
    names = {path.name for path in folder.iterdir()}
    assert {"model.partial", "checkpoint-8", "checkpoint-4", "backbone"}.isdisjoint(names)


def test_a_run_interrupted_after_its_last_step_trains_no_further(vlm_arguments, monkeypatch, uninterrupted):
    """Six steps end in the middle of an epoch of four, where the Trainer by itself would add a seventh."""
    arguments = vlm_arguments(max_steps=6, per_device_train_batch_size=3, lr_scheduler_type="constant")
    saved = []

    def fail_once(self, folder, **kwargs):
        if Path(folder).name == "model.partial" and not saved:
            saved.append({key: tensor.clone() for key, tensor in self.model.state_dict().items()})
            raise Interrupted
        save_model(self, folder, **kwargs)

    save_model = Trainer.save_model
    monkeypatch.setattr(Trainer, "save_model", fail_once)
    with pytest.raises(Interrupted):
        train_vlm(arguments)
    run = train_vlm(arguments)
    assert run.summary["steps"] == 6 and len(run.summary["log"]) == 6
    assert same(weights(run), {key: saved[0][key] for key in weights(run)})


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_every_part_of_a_checkpoint_matters(name, vlm_arguments, interrupt, uninterrupted):
    """So the tests above would notice if a part were not restored."""
    arguments = vlm_arguments(**LONG)
    interrupt(5)
    with pytest.raises(Interrupted):
        train_vlm(arguments)
    part = run_folder(arguments) / "checkpoint-4" / name
    if name == "trainer_state.json":  # the position in the data
        part.write_text(json.dumps(json.loads(part.read_text()) | {"global_step": 3}))
    else:
        part.unlink()
    assert not same(weights(train_vlm(arguments)), uninterrupted[0])


def test_an_interrupted_encoder_goes_on_as_if_nothing_had_been(scenes, tmp_path, interrupt):
    """Drawn by the Trainer's own sampler, with everything trainable."""

    def arguments(output: str) -> list[str]:
        folders = {key: scenes / "classification" / key.partition("_")[0] for key in ("train_folder", "val_folder")}
        settings = {"attributes": True, "pooling": "max", "max_steps": 5, "per_device_train_batch_size": 7}
        run = {"save_steps": 3, "learning_rate": 0.01, "use_cpu": True, "output_dir": tmp_path / output}
        values = {"vision_encoder": "digit_dwconv.digitscenes_64", **folders, **settings, **run}
        return [f"--{key}={value}" for key, value in values.items()]

    expected = train_encoder(arguments("whole"))
    interrupt(5)
    with pytest.raises(Interrupted):
        train_encoder(arguments("interrupted"))
    run = train_encoder(arguments("interrupted"))
    assert run.path.name == expected.path.name and same(weights(run), weights(expected))
    assert run.summary["accuracy"] == expected.summary["accuracy"]


def test_seconds_count_all_legs(vlm_arguments, interrupt, monkeypatch):
    clock = [1000.0]
    whole_step = ControlledTrainer.training_step

    def training_step(self, *args, **kwargs):
        clock[0] += 10
        return whole_step(self, *args, **kwargs)

    monkeypatch.setattr(trainer_module.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(ControlledTrainer, "training_step", training_step)
    arguments = vlm_arguments(max_steps=5, save_steps=2)
    interrupt(4)  # after three steps, of which the checkpoint has two
    with pytest.raises(Interrupted):
        train_vlm(arguments)
    clock[0] += 5000  # a pause
    assert train_vlm(arguments).summary["seconds"] == pytest.approx(50)


def test_a_finished_run_is_not_repeated(vlm_arguments, monkeypatch):
    run = train_vlm(vlm_arguments(max_steps=1))
    before = {path: path.stat().st_mtime_ns for path in run.path.iterdir()}
    monkeypatch.setattr(ControlledTrainer, "train", None)
    monkeypatch.setattr("ssm_vlm.training.train_vlm.build_model", None)
    again = train_vlm(vlm_arguments(max_steps=1, logging_steps=7))
    assert again.path == run.path and again.summary == run.summary
    assert {path: path.stat().st_mtime_ns for path in run.path.iterdir()} == before


# --- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_its_samples(value, vlm_arguments, scenes, monkeypatch):
    whole = LlavaStyleForConditionalGeneration.forward
    calls = []

    def forward(self, *args, **kwargs):
        output = whole(self, *args, **kwargs)
        calls.append(kwargs)
        if len(calls) == 4:
            output.loss = output.loss * value
        return output

    monkeypatch.setattr(LlavaStyleForConditionalGeneration, "forward", forward)
    arguments = vlm_arguments(save_steps=2, gradient_accumulation_steps=1)
    with pytest.raises(NotFiniteLossError) as error:
        train_vlm(arguments)
    folder = run_folder(arguments)
    dump = folder / "not_finite_step_4_rank_0.json"
    assert re.match(
        rf"The loss is {value} at step 4; its sample ids are in {re.escape(str(dump))}\. ", str(error.value)
    )
    content = json.loads(dump.read_text())
    assert content["step"] == 4 and content["loss"] == str(value)
    known = {row["id"] for row in json.loads((scenes / "mixed.json").read_text())}
    assert len(content["sample_ids"]) == 4 and set(content["sample_ids"]) <= known
    pictures = "pixel_values" in calls[3]
    assert all(name.startswith("train" if pictures else "text") for name in content["sample_ids"])
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]

    monkeypatch.setattr(LlavaStyleForConditionalGeneration, "forward", whole)
    assert train_vlm(arguments).summary["steps"] == 5, "the run can go on"


def no_room_for_plain_files():
    with open("/dev/full", "w") as file:
        file.write("x")


def no_room_for_pickles():
    torch.save({"a": torch.zeros(10000)}, "/dev/full")


def no_room_for_small_pickles():
    raise RuntimeError("basic_ios::clear: iostream error")  # as it came from a disk that became full in the middle


def no_room_for_safetensors():
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    "write", [no_room_for_plain_files, no_room_for_pickles, no_room_for_small_pickles, no_room_for_safetensors]
)
@pytest.mark.parametrize("method", ["_save_optimizer_and_scheduler", "save_model"])
def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stays(method, write, vlm_arguments, monkeypatch):
    """The errors are those of a full disk: `/dev/full` gives them, and safetensors' was copied from one."""
    whole = getattr(Trainer, method)

    def fail(self, *args, **kwargs):
        if self.state.global_step >= 4:
            write()
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, method, fail)
    arguments = vlm_arguments(save_steps=2)
    with pytest.raises(OSError) as error:
        train_vlm(arguments)
    folder = run_folder(arguments)
    assert error.value.errno == errno.ENOSPC
    assert str(error.value).removeprefix("[Errno 28] ") == (
        f"The disk that holds {folder} is full: make room and run the same command again; it goes on from the last "
        "complete checkpoint"
    )
    with RunDirectory(folder).begin():
        assert RunDirectory(folder).last_checkpoint() == str(folder / "checkpoint-2")


def test_other_errors_are_not_taken_for_a_full_disk(vlm_arguments, monkeypatch):
    def fail(self, *args, **kwargs):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(ControlledTrainer, "training_step", fail)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train_vlm(vlm_arguments())


# --- what is learned -----------------------------------------------------------------------------------------------


def started_from(vlm_arguments, **different) -> dict[str, torch.Tensor]:
    """Weights before the first step."""
    model_args, _, args = parse_recipe(vlm_arguments(**different), *PARTS)
    set_seed(args.seed)
    model, _ = build_model(model_args)
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {key.partition(".")[0] for key in after if not torch.equal(before[key], after[key])}


PIECES = {"vision_tower", "connector", "language_model"}


@pytest.mark.parametrize(
    ("different", "expected"),
    [
        ({}, {"connector", "language_model"}),
        ({"freeze_connector": True}, {"language_model"}),
        ({"freeze_language_model": True}, {"connector"}),
        ({"freeze_vision": False}, PIECES),
        ({"freeze_language_model": True, "freeze_connector": True, "freeze_vision": False}, {"vision_tower"}),
        ({"vision_train_mode": True}, {"connector", "language_model"}),
    ],
)
def test_frozen_parts_stay_as_they_are_and_the_others_learn(different, expected, vlm_arguments, scenes):
    different = {"max_steps": 2, "save_strategy": "no", "data_path": scenes / "train.json"} | different
    before = started_from(vlm_arguments, **different)
    run = train_vlm(vlm_arguments(**different))
    assert changed(before, weights(run)) == expected


@pytest.mark.parametrize("train_mode", [False, True])
def test_batch_norm_of_a_frozen_encoder_does_not_move(train_mode, vlm_arguments, scenes, monkeypatch):
    """Unless the paper's train mode is asked for, which moves statistics but no weight."""

    def with_batch_norm(*args, **kwargs):
        encoder = load_encoder("digit_identity.digitscenes_64", pretrained=False)
        norm = nn.BatchNorm2d(3)
        encoder.add_module("input_norm", norm)
        encoder.register_forward_pre_hook(lambda module, inputs: (norm(inputs[0]), *inputs[1:]))
        norms.append((norm, {key: value.clone() for key, value in norm.state_dict().items()}))
        return encoder

    norms = []
    monkeypatch.setattr("ssm_vlm.training.train_vlm.load_encoder", with_batch_norm)
    pictures = {"data_path": scenes / "train.json", "save_strategy": "no"}
    train_vlm(vlm_arguments(max_steps=2, vision_train_mode=train_mode, **pictures))
    norm, before = norms[0]
    assert torch.equal(norm.weight, before["weight"]) and torch.equal(norm.bias, before["bias"])
    assert torch.equal(norm.running_mean, before["running_mean"]) != train_mode
    assert norm.num_batches_tracked.item() == (2 if train_mode else 0)


def test_nothing_to_train_is_an_error_in_words(vlm_arguments, scenes):
    frozen = {"freeze_connector": True, "freeze_language_model": True}
    with pytest.raises(ValueError, match="Nothing is left to train: every part of the model is frozen; unfreeze one"):
        train_vlm(vlm_arguments(**frozen, data_path=scenes / "train.json"))


def test_text_cannot_teach_a_frozen_language_model(vlm_arguments):
    with pytest.raises(ValueError, match="mixed.json has 6 conversations without a picture, which teach nothing"):
        train_vlm(vlm_arguments(freeze_language_model=True))


# --- weight decay --------------------------------------------------------------------------------------------------


def decayed(model: nn.Module, tmp_path: Path) -> tuple[set[str], set[str]]:
    """Names of the parameters that the optimizer decays, and of those that it does not."""
    args = RunArguments(output_dir=str(tmp_path), weight_decay=0.1, use_cpu=True, learning_rate=1.0)
    optimizer = ControlledTrainer(model, args, train_dataset=[0]).create_optimizer()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {True: set(), False: set()}
    for group in optimizer.param_groups:
        assert group["weight_decay"] in (0.0, 0.1)
        groups[group["weight_decay"] > 0] |= {names[id(parameter)] for parameter in group["params"]}
    assert groups[True] | groups[False] == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not groups[True] & groups[False]
    return groups[True], groups[False]


LAYER = r"language_model\.model\.layers\.\d+\."
VLM_DECAYED = {
    r"connector\.layers\.\d+\.weight",
    rf"{LAYER}self_attn\.[qkvo]_proj\.weight",
    rf"{LAYER}mlp\.(gate|up|down)_proj\.weight",
    r"language_model\.(model\.embed_tokens|lm_head)\.weight",
}
VLM_NOT_DECAYED = {
    r"connector\.layers\.\d+\.bias",
    rf"{LAYER}(input|post_attention)_layernorm\.weight",
    r"language_model\.model\.norm\.weight",
}


def fits(names: set[str], patterns: set[str]) -> None:
    """Every name fits a pattern, and every pattern a name."""
    for name in names:
        assert any(re.fullmatch(pattern, name) for pattern in patterns), f"{name} is in the wrong group"
    for pattern in patterns:
        assert any(re.fullmatch(pattern, name) for name in names), f"nothing is named like {pattern}"


@pytest.mark.parametrize("mixer", ["vmamba", "window_attention"])
def test_decay_of_a_vlm_whose_encoder_learns_too(mixer, tmp_path):
    encoder = load_encoder(f"digit_{mixer}.digitscenes_64", pretrained=False)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    language_model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=50, **sizes, tie_word_embeddings=False))
    model = LlavaStyleForConditionalGeneration.from_parts(
        encoder, language_model, image_token_id=3, freeze_vision=False
    )
    yes, no = decayed(model, tmp_path)
    fits({name for name in yes if not name.startswith("vision_tower")}, VLM_DECAYED)
    fits({name for name in no if not name.startswith("vision_tower")}, VLM_NOT_DECAYED)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    never = re.compile(r".*\.(a_log|d|dt_bias|relative_position_bias_table|bias)")
    for name in (name for name in yes | no if name.startswith("vision_tower")):
        assert (name in yes) == (len(shapes[name]) > 1 and not never.fullmatch(name)), name
    if mixer == "vmamba":
        assert {name.rpartition(".")[2] for name in no} >= {"a_log", "d", "dt_bias"}
        assert any(name.endswith(".dt_weight") for name in yes)
        assert all(len(shapes[name]) > 1 for name in no if name.endswith((".a_log", ".d", ".dt_bias")))


SMALL = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
PICTURE = {"image_size": 16, "patch_size": 8}


@pytest.mark.parametrize(
    ("stock", "not_decayed"),
    [
        ({"model_type": "vit", **SMALL, **PICTURE}, {"cls_token", "position_embeddings"}),
        ({"model_type": "deit", **SMALL, **PICTURE}, {"cls_token", "distillation_token", "position_embeddings"}),
        (CLIPVisionConfig(**SMALL, **PICTURE), {"class_embedding", "position_embedding.weight"}),
        ({"model_type": "siglip_vision_model", **SMALL, **PICTURE}, {"position_embedding.weight"}),
        (
            Dinov2Config(hidden_size=12, num_hidden_layers=2, num_attention_heads=2, **PICTURE),
            {"cls_token", "position_embeddings"},
        ),
    ],
    ids=["vit", "deit", "clip", "siglip", "dinov2"],
)
def test_embeddings_of_places_and_tokens_do_not_decay(stock, not_decayed, tmp_path):
    yes, no = decayed(HiddenStateBackbone(HiddenStateBackboneConfig(vision_config=stock, tap_layer=-2)), tmp_path)
    of_patches = {"patch_embeddings.projection.bias", "patch_embedding.bias"}
    embeddings = {name.partition("embeddings.")[2] for name in no if "embeddings." in name}
    assert embeddings - of_patches == not_decayed
    assert all(name.endswith((".weight", ".projection.weight")) and "norm" not in name for name in yes)
    assert any("patch_embedding" in name for name in yes)


@pytest.mark.parametrize(
    ("config", "place"),
    [
        (GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2), "transformer.wpe.weight"),
        (
            OPTConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, ffn_dim=8),
            "model.decoder.embed_positions.weight",
        ),
    ],
    ids=["gpt2", "opt"],
)
def test_position_embeddings_of_language_models_do_not_decay(config, place, tmp_path):
    model = AutoModelForCausalLM.from_config(config)
    yes, no = decayed(model, tmp_path)
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    assert no & matrices == {place} and yes == matrices - {place}


def test_bias_tables_of_swin_do_not_decay(tmp_path):
    from transformers import SwinBackbone

    config = SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=2, image_size=16, patch_size=4)
    yes, no = decayed(SwinBackbone(config), tmp_path)
    assert any(name.endswith("relative_position_bias_table") for name in no)
    assert all(name.endswith(".weight") and "norm" not in name for name in yes) and yes


def test_frozen_parameters_are_in_no_group(tmp_path):
    encoder = SSMVisionBackbone(load_encoder("digit_identity.digitscenes_64", pretrained=False).config)
    for parameter in encoder.stem.parameters():
        parameter.requires_grad_(False)
    yes, no = decayed(encoder, tmp_path)
    assert yes and no and not any(name.startswith("stem") for name in yes | no)
