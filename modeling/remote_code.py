"""Saved folders that hold their own code: `register_for_auto_class` of Transformers, for a library in folders.

With `trust_remote_code=True` Transformers loads classes from Python files that lie flat beside `config.json` and import
each other as `from .name import ...`; the entry `auto_map` of the JSON file says which class of which file to take.
Here these files are made from the library's own source, by rewriting its relative imports. Models that were loaded from
such a folder save their code by Transformers' own means.
"""

import ast
import functools
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ProcessorMixin
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

PACKAGE = __name__.split(".")[0]
_NOT_IN_NAMES = {PACKAGE, "configuration", "modeling", "ops"}
_SAVED_AS = {CONFIG_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME}
_FOUND_THROUGH: dict[type, Mapping[str, type]] = {}  # what `save_with_code` was told
_LOOKS_LIKE_IMPORT = re.compile(r"^\s*(?:from\s+\.\S+\s+import|import\s+\.)", re.MULTILINE)


def flat_name(module: str) -> str:
    """Name of the file, without suffix, that holds a module of this library: `modeling.ops.x.y` becomes `x_y`."""
    return "_".join(part for part in module.split(".") if part not in _NOT_IN_NAMES)


@functools.cache
def flatten(module: str) -> tuple[str, frozenset[str]]:
    """The source of a module of this library for a flat folder, and the modules that it imports.

    Raises:
        ValueError: the module imports something in a way that a flat folder cannot.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"There is no file of the module {module}.")
    source = Path(spec.origin).read_text(encoding="utf-8")
    lines, rewritten = source.splitlines(keepends=True), 0
    imported: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(name.name.split(".")[0] == PACKAGE for name in node.names):
            raise ValueError(f"{spec.origin}:{node.lineno} imports {PACKAGE} by name: use a relative import.")
        if not isinstance(node, ast.ImportFrom) or not (node.level or f"{node.module}.".startswith(f"{PACKAGE}.")):
            continue
        if not (node.level and node.module):
            raise ValueError(f"{spec.origin}:{node.lineno} must be of the form 'from .module import name'.")
        target = importlib.util.resolve_name("." * node.level + node.module, spec.parent)
        imported.add(target)
        written, line = f"from {'.' * node.level}{node.module} import", lines[node.lineno - 1]
        before, after = line[: node.col_offset], line[node.col_offset :]
        if not after.startswith(written):
            raise ValueError(f"{spec.origin}:{node.lineno} must begin with {written!r}.")
        lines[node.lineno - 1] = f"{before}from .{flat_name(target)} import{after.removeprefix(written)}"
        rewritten += 1
    text = "".join(lines)
    if len(_LOOKS_LIKE_IMPORT.findall(text)) != rewritten:
        raise ValueError(f"{spec.origin} has text that Transformers takes for a relative import: word it otherwise.")
    version = importlib.import_module(PACKAGE).__version__
    return f"# ssm-vlm {version} (Apache-2.0), made from {module}: change it there.\n{text}", frozenset(imported)


def flat_files(*modules: str) -> dict[str, str]:
    """Name -> content of the files that hold these modules and every other of this library that they need."""
    files: dict[str, str] = {}
    found, open_modules = set(), set(modules)
    while open_modules:
        found |= open_modules
        imports: set[str] = set()
        for module in open_modules:
            text, imported = flatten(module)
            name = f"{flat_name(module)}.py"
            if name in files:
                raise ValueError(f"Two modules would be saved as {name}; {module} is one of them: rename it.")
            files[name] = text
            imports |= imported
        open_modules = imports - found
    return dict(sorted(files.items()))


def save_with_code(saved: type[PreTrainedConfig | BaseImageProcessor | ProcessorMixin], classes: Mapping[str, type]):
    """From now on `saved` writes, with its JSON file, an `auto_map` and the code that this names.

    Models need nothing more, since saving one saves its config. The code is written in the place where Transformers
    writes the JSON file, so that it is uploaded, written by one process only, and left out with adapters, as that is.

    Args:
        saved: a class with `to_json_file`, as its `save_pretrained` calls it.
        classes: name of an Auto class -> the class that it is to find.
    """
    _FOUND_THROUGH[saved] = classes
    to_json_file = saved.to_json_file

    @functools.wraps(to_json_file)
    def to_json_file_with_code(self, json_file_path, *args, **kwargs):
        path, modules = Path(json_file_path), set()
        parts = [self] if path.name in _SAVED_AS else []  # no Auto class reads JSON files of other names
        if parts and isinstance(self, ProcessorMixin):
            parts += [getattr(self, name) for name in self.get_attributes()]
        for part in parts:
            found = _FOUND_THROUGH.get(type(part), {})  # not for a class that others derive, whose code this is not
            modules |= {each.__module__ for each in found.values()}
            if found:
                part.auto_map = {auto: f"{flat_name(each.__module__)}.{each.__name__}" for auto, each in found.items()}
        for name, text in flat_files(*modules).items():
            path.with_name(name).write_text(text, encoding="utf-8")
        to_json_file(self, json_file_path, *args, **kwargs)
        if isinstance(self, ProcessorMixin):
            vars(self).pop("auto_map", None)  # Transformers reads a processor without it

    saved.to_json_file = to_json_file_with_code  # type: ignore[method-assign]


__all__ = ["flat_files", "flat_name", "save_with_code"]
