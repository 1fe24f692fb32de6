"""Saved folders hold the code that they need: flat, made from the library's source, bit-equal where it is absent."""

import copy
import importlib.metadata
import inspect
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from remote_code_tensors import aligned, tensors
from remote_code_toys import CONFIGS, IMAGE_TOKEN, NEEDS_TIMM, TOYS, VLM, cases, conversation, processor
from transformers import AutoConfig, AutoImageProcessor, PreTrainedModel, Trainer, TrainingArguments
from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_imports, get_relative_import_files
from transformers.utils import is_timm_available

import ssm_vlm
from ssm_vlm.configuration.encoder_configs import OWN_ENCODER_CONFIGS
from ssm_vlm.modeling import remote_code
from ssm_vlm.modeling.own_backbones import OWN_BACKBONES

PROBE = Path(__file__).with_name("remote_code_probe.py")
ALLOWED = {"torch", "transformers", "huggingface_hub", "safetensors", "numpy", "PIL", "jinja2"}


def inputs_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(1, 3, 32, 32, generator=generator)
    if not isinstance(model, ssm_vlm.LlavaStyleModel):
        return {"pixel_values": pixels}
    count = len(model.get_tap_features(pixels)[0])
    return {"pixel_values": pixels, "input_ids": torch.tensor([[0, *[IMAGE_TOKEN] * count, 9, 10]])}


@torch.no_grad()
def outputs_of(model: PreTrainedModel) -> list[torch.Tensor]:
    found = tensors(aligned(model)(**inputs_of(model)))
    assert found and all(tensor.isfinite().all() for tensor in found)
    return found


def code_in(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.py"))}


# The tables


def test_every_model_that_is_public_is_listed_and_has_a_toy():
    things = {name: getattr(ssm_vlm, name) for name in ssm_vlm.__all__}
    public = {name for name, thing in things.items() if inspect.isclass(thing) and issubclass(thing, PreTrainedModel)}
    assert public == {toy.model_class.__name__ for toy in TOYS.values()}
    assert set(CONFIGS) == set(ssm_vlm.MODELS)


def test_every_own_backbone_can_be_inside_another_model():
    backbones = {
        config.model_type: models["AutoBackbone"]
        for config, models in ssm_vlm.MODELS.items()
        if "AutoBackbone" in models
    }
    assert backbones == OWN_BACKBONES
    assert {name: type(backbone).__name__ for name, backbone in backbones.items()}.keys() == OWN_ENCODER_CONFIGS.keys()
    assert all(backbone.config_class is OWN_ENCODER_CONFIGS[name] for name, backbone in backbones.items())


# What is written


@pytest.mark.parametrize("name", cases())
def test_saved_code_is_the_librarys_own_and_closed(name, tmp_path):
    model = TOYS[name].build()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"][TOYS[name].auto_class].endswith(f".{type(model).__name__}")
    code = code_in(tmp_path)
    modules = {f"{type(model).__module__}", f"{type(model.config).__module__}"}
    assert code == remote_code.flat_files(*modules)
    for file, text in code.items():
        assert text.startswith(f"# ssm-vlm {ssm_vlm.__version__} (Apache-2.0), made from "), file
        needed = {Path(other).name for other in get_relative_import_files(tmp_path / file)}
        assert needed <= code.keys(), file
        assert set(get_imports(tmp_path / file)) - sys.stdlib_module_names <= ALLOWED, file
    for reference in saved["auto_map"].values():
        module, found = reference.split(".")
        assert f"class {found}(" in code[f"{module}.py"]


def test_flat_files_follow_the_source():
    """Nothing but the imports differs, so that no copy can fall behind."""
    module = "ssm_vlm.modeling.mixers"
    source = Path(sys.modules[module].__file__).read_text(encoding="utf-8")
    header, text = remote_code.flat_files(module)["mixers.py"].split("\n", 1)
    assert f"made from {module}" in header
    changed = [
        (before, after) for before, after in zip(source.splitlines(), text.splitlines(), strict=True) if before != after
    ]
    assert dict(changed) == {
        "from ..configuration.configuration_ssm_vision import SSMVisionConfig": (
            "from .configuration_ssm_vision import SSMVisionConfig"
        ),
        "from .ops.selective_scan_2d import selective_scan_2d": "from .selective_scan_2d import selective_scan_2d",
    }


def test_modules_of_an_op_keep_apart():
    names = remote_code.flat_files("ssm_vlm.modeling.ops.selective_scan_2d").keys()
    assert {"selective_scan_2d.py", "selective_scan_2d_naive.py", "selective_scan_2d_chunked.py"} <= names


@pytest.mark.skipif(not Path(sys.executable).with_name("ruff").exists(), reason="ruff is not installed")
def test_flat_files_are_sound_python(tmp_path):
    TOYS[VLM.__name__].build().save_pretrained(tmp_path)
    processor(CONFIGS[ssm_vlm.LlavaStyleConfig]()).save_pretrained(tmp_path)
    ruff = Path(sys.executable).with_name("ruff")
    ran = subprocess.run([ruff, "check", "--isolated", "--select", "F", tmp_path], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize(
    "source, problem",
    [
        ("from . import other\n", "must be of the form 'from .module import name'"),
        ("import ssm_vlm.modeling\n", "imports ssm_vlm by name"),
        ("from ssm_vlm.modeling import mixers\n", "must be of the form 'from .module import name'"),
        ('"""Use it so:\n\n    from .other import thing\n"""\n', "takes for a relative import"),
        ("from  .other import thing\n", "must begin with"),
    ],
)
def test_source_that_cannot_lie_flat_is_refused(source, problem, tmp_path, monkeypatch):
    name = f"flat_{abs(hash(source))}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / name / "made.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=problem):
        remote_code.flat_files(f"{name}.made")


def test_two_modules_of_one_flat_name_are_refused(monkeypatch):
    monkeypatch.setattr(remote_code, "flat_name", lambda module: "same")
    with pytest.raises(ValueError, match=r"Two modules would be saved as same\.py"):
        remote_code.flat_files("ssm_vlm.modeling.mixers")


# Loading, in this process


@pytest.fixture
def modules_cache(tmp_path, monkeypatch):
    """Transformers copies the code that it runs to a folder of its own: here one of this test."""
    cache = tmp_path / "modules"
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield cache
    for name in set(sys.modules) - before:
        if name.startswith("transformers_modules"):
            del sys.modules[name]
    sys.modules.pop("transformers_modules", None)


@pytest.mark.parametrize("name", cases())
def test_remote_code_beside_the_library_is_bit_equal(name, tmp_path, modules_cache):
    model, folder = TOYS[name].build(), tmp_path / "saved"
    model.save_pretrained(folder)
    reference = json.loads((folder / "config.json").read_text())["auto_map"][TOYS[name].auto_class]
    remote_class = get_class_from_dynamic_module(reference, folder)
    assert remote_class is not type(model) and remote_class.__name__ == type(model).__name__
    remote, report = remote_class.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    owners = {type(part).__module__.split(".")[0] for part in (remote.config, *remote.modules())}
    assert "transformers_modules" in owners and "ssm_vlm" not in owners
    inputs, expected = inputs_of(model), outputs_of(model)
    with torch.no_grad():
        assert all(map(torch.equal, tensors(aligned(remote)(**inputs)), expected))


@pytest.mark.parametrize("trust", [None, True])
def test_where_the_library_is_imported_its_own_classes_are_used(trust, tmp_path, modules_cache):
    model = TOYS[VLM.__name__].build()
    model.save_pretrained(tmp_path / "saved")
    processor(model.config).save_pretrained(tmp_path / "saved")
    arguments = {"pretrained_model_name_or_path": tmp_path / "saved", "trust_remote_code": trust}
    assert type(AutoConfig.from_pretrained(**arguments)) is ssm_vlm.LlavaStyleConfig
    assert type(transformers.AutoModelForImageTextToText.from_pretrained(**arguments)) is VLM
    assert type(transformers.AutoModel.from_pretrained(**arguments)) is ssm_vlm.LlavaStyleModel
    assert type(transformers.AutoProcessor.from_pretrained(**arguments)) is ssm_vlm.LlavaStyleProcessor
    assert type(AutoImageProcessor.from_pretrained(**arguments)) is ssm_vlm.LlavaStyleImageProcessor
    assert not modules_cache.exists()


# Every way of saving


def test_a_config_or_image_processor_alone_brings_its_code(tmp_path):
    CONFIGS[ssm_vlm.SSMVisionConfig]().save_pretrained(tmp_path / "config")
    assert "modeling_ssm_vision.py" in code_in(tmp_path / "config")
    ssm_vlm.LlavaStyleImageProcessor().save_pretrained(tmp_path / "images")
    saved = json.loads((tmp_path / "images" / "preprocessor_config.json").read_text())
    assert saved["auto_map"] == {"AutoImageProcessor": "image_processing_llava_style.LlavaStyleImageProcessor"}
    assert {"image_processing_llava_style.py", "geometry.py"} <= code_in(tmp_path / "images").keys()


def test_a_processor_names_the_code_of_its_parts(tmp_path):
    processor(CONFIGS[ssm_vlm.LlavaStyleConfig]()).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["auto_map"] == {"AutoProcessor": "processing_llava_style.LlavaStyleProcessor"}
    assert saved["image_processor"]["auto_map"] == {
        "AutoImageProcessor": "image_processing_llava_style.LlavaStyleImageProcessor"
    }
    assert {"processing_llava_style.py", "image_processing_llava_style.py"} <= code_in(tmp_path).keys()
    assert {"chat_template.jinja", "tokenizer.json"} <= {file.name for file in tmp_path.iterdir()}


def test_models_of_others_with_our_encoder_get_no_code(tmp_path):
    transformers.UperNetConfig(backbone_config=CONFIGS[ssm_vlm.SSMVisionConfig]()).save_pretrained(tmp_path)
    assert not code_in(tmp_path)


def test_classes_derived_elsewhere_get_no_code(tmp_path):
    class Theirs(ssm_vlm.SSMVisionConfig):
        model_type = "theirs"

    Theirs().save_pretrained(tmp_path)
    assert not code_in(tmp_path) and "auto_map" not in json.loads((tmp_path / "config.json").read_text())


def test_a_json_file_alone_is_a_json_file_alone(tmp_path):
    CONFIGS[ssm_vlm.SSMVisionConfig]().to_json_file(tmp_path / "of_mine.json")
    assert [file.name for file in tmp_path.iterdir()] == ["of_mine.json"]


def test_a_trainer_saves_the_code(tmp_path):
    model = TOYS["SSMVisionForImageClassification"].build()
    arguments = TrainingArguments(output_dir=tmp_path, report_to=[], use_cpu=True)
    Trainer(model, arguments).save_model(tmp_path / "saved")
    assert "modeling_ssm_vision.py" in code_in(tmp_path / "saved")


def test_a_model_with_merged_adapters_saves_the_code(tmp_path):
    peft = pytest.importorskip("peft")
    model = TOYS[VLM.__name__].build()
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=r".*(q|v)_proj"))
    adapted.save_pretrained(tmp_path / "adapter")
    assert not code_in(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    model.save_pretrained(tmp_path / "plain")
    assert code_in(tmp_path / "merged") == code_in(tmp_path / "plain")


@pytest.fixture
def uploaded(monkeypatch):
    """Names of the files of each commit to a Hub that is not there."""
    from huggingface_hub import HfApi, RepoUrl

    commits: list[set[str]] = []
    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, repo_id, **kwargs: RepoUrl(f"https://huggingface.co/{repo_id}")
    )
    monkeypatch.setattr(
        HfApi, "create_commit", lambda self, operations, **kwargs: commits.append({o.path_in_repo for o in operations})
    )
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *args, **kwargs: _Card())
    return commits


class _Card:
    def save(self, path):
        Path(path).write_text("")


@pytest.mark.parametrize("into", ["a new folder", "the folder of the last save"])
def test_pushing_uploads_the_code(into, uploaded, tmp_path):
    model, folder = TOYS["SSMVisionModel"].build(), str(tmp_path / "saved")
    if into != "a new folder":
        model.save_pretrained(folder)
        for file in Path(folder).iterdir():  # as if it had been a while ago
            os.utime(file, (1, 1))
    model.save_pretrained(folder, push_to_hub=True, repo_id="owner/name")
    model.push_to_hub("owner/name")
    expected = {"config.json", "model.safetensors", *code_in(Path(folder))}
    assert "modeling_ssm_vision.py" in expected
    assert [names - {"README.md"} for names in uploaded] == [expected, expected]


def test_pushing_a_processor_or_config_uploads_its_code(uploaded, tmp_path):
    config = CONFIGS[ssm_vlm.LlavaStyleConfig]()
    for index, thing in enumerate((processor(config), config, ssm_vlm.LlavaStyleImageProcessor())):
        folder = tmp_path / str(index)
        thing.save_pretrained(str(folder), push_to_hub=True, repo_id="owner/name")
        assert code_in(folder).keys() <= uploaded[-1]


# Loading, in processes of their own


def needed_by(*distributions: str) -> set[str]:
    """These distributions and what they need, as pip would install them."""
    found, todo = set(), list(distributions)
    while todo:
        name = todo.pop().lower().replace("_", "-")
        if name in found:
            continue
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        parsed = map(Requirement, requirements)
        todo += [r.name for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def as_on_the_hub(folder: Path, cache: Path, name: str) -> None:
    """Lays a saved folder where a download of the repository `toys/NAME` would lie."""
    commit, repository = "0" * 40, cache / f"models--toys--{name}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of every toy, saved by the library, and what each gives; also as repositories of a Hub."""
    root = tmp_path_factory.mktemp("saved")
    folders = {}
    for number, (name, toy) in enumerate(TOYS.items()):
        if name in NEEDS_TIMM and not is_timm_available():
            continue
        folders[name] = f"toy_{number}"
        model, folder = toy.build(), root / folders[name]
        model.save_pretrained(folder / "model", max_shard_size="5KB")
        assert list((folder / "model").glob("model-00001-of-*.safetensors"))
        expected = {"inputs": inputs_of(model), "outputs": outputs_of(model)}
        picture = conversation()[0]["content"][0]["image"]
        images = None
        if toy.model_class is VLM:
            complete = processor(model.config)
            complete.save_pretrained(folder / "model")
            images = complete.image_processor
            inputs = complete.apply_chat_template(
                conversation(), tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
            )
            expected |= {
                "conversation": conversation(),
                "prompt": inputs["input_ids"],
                "answer": model.generate(**inputs, max_new_tokens=6, do_sample=False),
                "suppressed": model.generation_config.suppress_tokens,
            }
        elif "Classification" in name:  # as a converted encoder, with its own preprocessing
            images = ssm_vlm.LlavaStyleImageProcessor(geometry="resize_crop", size=24, crop_pct=0.9)
            images.save_pretrained(folder / "model")
        if images is not None:
            expected |= {"picture": picture, "pixels": images(picture, return_tensors="pt")["pixel_values"]}
        torch.save(expected, folder / "expected.pt")
        as_on_the_hub(folder / "model", root / "hub", folders[name])
    (root / "cases.json").write_text(json.dumps({folder: TOYS[name].auto_class for name, folder in folders.items()}))
    allowed = needed_by("torch", "transformers", "pillow", *(["timm"] if is_timm_available() else []))
    hidden = {
        module
        for module, names in importlib.metadata.packages_distributions().items()
        if not {name.lower().replace("_", "-") for name in names} & allowed
    }
    assert {"ssm_vlm", "accelerate"} <= hidden and not {"torch", "transformers", "PIL"} & hidden
    environment = {"site_packages": sysconfig.get_path("purelib"), "hidden": sorted(hidden)}
    (root / "environment.json").write_text(json.dumps(environment))
    return root, folders


def probe(root: Path, how: str, *flags: str) -> dict[str, str]:
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(root / "hub"), "HF_MODULES_CACHE": str(root / f"modules_{how}")
    }  # fmt: skip
    command = [sys.executable, *flags, PROBE, how, root]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, stdin=subprocess.DEVNULL)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def absent(saved):
    """Findings where nothing but torch, transformers, pillow and what they need is installed."""
    return probe(saved[0], "absent", "-I", "-S")


@pytest.fixture(scope="module")
def beside(saved):
    """Findings of one process that runs the saved code and then imports the library."""
    return probe(saved[0], "beside")


@pytest.mark.slow
@pytest.mark.parametrize("name", cases())
def test_where_the_library_is_absent_it_loads_bit_equal_and_saves_again(name, saved, absent):
    assert not absent.get(saved[1][name])


@pytest.mark.slow
@pytest.mark.parametrize("name", cases())
def test_before_and_after_the_library_in_one_process(name, saved, beside):
    assert not beside.get(saved[1][name])


@pytest.mark.slow
def test_a_folder_without_its_code_does_not_load_where_the_library_is_absent(saved, absent):
    """The mutation twin: what the probe finds equal, it finds by that code."""
    root, cases = saved
    twin = root / "twin"
    name = cases["SSMVisionModel"]
    shutil.copytree(root / name, twin / name, ignore=shutil.ignore_patterns("mixers.py", "again", "by_remote"))
    shutil.copy(root / "environment.json", twin)
    as_on_the_hub(twin / name / "model", twin / "hub", name)
    (twin / "cases.json").write_text(json.dumps({name: "AutoModel"}))
    assert "in get_cached_module_file" in probe(twin, "absent", "-I", "-S")[name]
