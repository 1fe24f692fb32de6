"""What the tests of saved code run in processes of their own: `absent` or `beside` FOLDER, with findings in JSON.

FOLDER holds `cases.json` (name of a case -> its Auto class), and for each case a saved model `NAME/model`, which lies
also where a download of `toys/NAME` would, and what it gives, `NAME/expected.pt`: keyword arguments, tensors of its
output, where there is preprocessing a picture and its pixels, and of a complete VLM a conversation, its tokens and the
generated ones. This file imports neither the library
nor its tests.
"""

import importlib.machinery
import json
import sys
import traceback
from pathlib import Path

FOLDER = Path(sys.argv[2])


def hide_what_is_not_needed(hidden: set[str]) -> None:
    """Makes modules look as if they were not installed, as `importlib.util.find_spec` sees it, too."""

    class Finder(importlib.machinery.PathFinder):
        @classmethod
        def find_spec(cls, name, path=None, target=None):
            return None if name.split(".")[0] in hidden else super().find_spec(name, path, target)

    sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Finder


if sys.argv[1] == "absent":
    setting = json.loads((FOLDER / "environment.json").read_text())
    sys.path.append(setting["site_packages"])  # python -S: no .pth file is read, so no editable install is found
    hide_what_is_not_needed(set(setting["hidden"]))

sys.path.append(str(Path(__file__).parent))

import torch  # noqa: E402
import transformers  # noqa: E402
from remote_code_tensors import aligned, tensors  # noqa: E402
from transformers.dynamic_module_utils import get_class_from_dynamic_module  # noqa: E402

torch.set_num_threads(1)
TRUST = {"trust_remote_code": True}


def load(auto_class: str, source: Path | str):
    """As a user would, but for `AutoBackbone.from_pretrained`, which asks the Hub even for a folder."""
    if auto_class != "AutoBackbone":
        return getattr(transformers, auto_class).from_pretrained(source, **TRUST)
    config = transformers.AutoConfig.from_pretrained(source, **TRUST)
    if "ssm_vlm" not in sys.modules:
        built = transformers.AutoBackbone.from_config(config, **TRUST)
        return type(built).from_pretrained(source, config=config)
    return transformers.AutoBackbone._model_mapping[type(config)].from_pretrained(source)


def check(source: Path | str, model, expected: dict, home: str) -> None:
    """Model, preprocessing and, of a complete VLM, the whole path from a picture and words to tokens, bit by bit."""
    assert type(model).__module__.startswith(home) and type(model.config).__module__.startswith(home), type(model)
    with torch.no_grad():
        inputs = {name: tensor.clone() for name, tensor in expected["inputs"].items()}
        found = tensors(aligned(model)(**inputs))
    assert len(found) == len(expected["outputs"]), "another number of outputs"
    assert all(map(torch.equal, found, expected["outputs"])), "outputs are not bit-equal"
    if "pixels" in expected:
        images = transformers.AutoImageProcessor.from_pretrained(source, **TRUST)
        assert type(images).__module__.startswith(home), type(images)
        found = images(expected["picture"], return_tensors="pt")["pixel_values"]
        assert torch.equal(found, expected["pixels"]), "other pixels"
    if "conversation" in expected:
        processor = transformers.AutoProcessor.from_pretrained(source, **TRUST)
        for part in (processor, processor.image_processor):
            assert type(part).__module__.startswith(home), type(part)
        inputs = processor.apply_chat_template(
            expected["conversation"], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        assert torch.equal(inputs["input_ids"], expected["prompt"]), "another prompt"
        answer = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert torch.equal(answer, expected["answer"]), "another answer"
        assert model.generation_config.suppress_tokens == expected["suppressed"]


def code_files(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.glob("*.py")}


def absent(name: str, auto_class: str) -> None:
    """The library is not there: load from Hub and folder, compare, save, load again, compare again."""
    folder, again = FOLDER / name / "model", FOLDER / name / "again"
    expected = torch.load(FOLDER / name / "expected.pt", weights_only=False)
    for source in (f"toys/{name}", folder, again):
        model = load(auto_class, source)
        check(source, model, expected, "transformers_modules.")
        if source == folder:
            model.save_pretrained(again, max_shard_size="5KB")
            if "pixels" in expected:
                part = transformers.AutoProcessor if "conversation" in expected else transformers.AutoImageProcessor
                part.from_pretrained(folder, **TRUST).save_pretrained(again)
            assert code_files(again) == code_files(folder), "saving again changed the code"
    assert "ssm_vlm" not in sys.modules


def beside_before(name: str, auto_class: str):
    """Remote code first: the library is there, but was not imported."""
    assert "ssm_vlm" not in sys.modules
    folder = FOLDER / name / "model"
    expected = torch.load(FOLDER / name / "expected.pt", weights_only=False)
    model = load(auto_class, folder)
    check(folder, model, expected, "transformers_modules.")
    return model, expected


def beside_after(name: str, auto_class: str, remote, expected: dict) -> None:
    """Then the library: both give the same, neither takes the other's classes, and each loads what the other saved."""
    folder, again = FOLDER / name / "model", FOLDER / name / "by_remote"
    for trust in (None, True):  # None asks where code would have to be trusted, and there is nobody to answer
        TRUST["trust_remote_code"] = trust
        model = load(auto_class, folder)
        check(folder, model, expected, "ssm_vlm.")
    fresh = get_class_from_dynamic_module(model.config.auto_map[auto_class], folder).from_pretrained(folder)
    for one, home, other in ((fresh, "transformers_modules", "ssm_vlm"), (model, "ssm_vlm", "transformers_modules")):
        owners = {type(part).__module__.split(".")[0] for part in one.modules()}
        assert home in owners and other not in owners, owners
    remote.save_pretrained(again)
    outputs = {key: expected[key] for key in ("inputs", "outputs")}
    for one, home in (
        (remote, "transformers_modules."),
        (fresh, "transformers_modules."),
        (load(auto_class, again), "ssm_vlm."),
    ):
        check(folder, one, outputs, home)


def caught(findings: dict, name: str, check, *arguments):
    try:
        return check(name, *arguments)
    except Exception:
        findings[name] = traceback.format_exc()


cases = json.loads((FOLDER / "cases.json").read_text())
findings: dict[str, str] = {}
if sys.argv[1] == "absent":
    for name, auto_class in cases.items():
        caught(findings, name, absent, auto_class)
else:
    remote = {name: caught(findings, name, beside_before, auto_class) for name, auto_class in cases.items()}
    import ssm_vlm  # noqa: F401

    for name, found in remote.items():
        if found is not None:
            caught(findings, name, beside_after, cases[name], *found)
print(json.dumps(findings))
