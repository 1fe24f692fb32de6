"""The parts of a saved model, each with its origin and licence, from `model_cards/origins.yaml`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from .saved_folder import SavedFolder

TEMPLATES = Path(__file__).parent.parent / "model_cards"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Part:
    """One part of a model: what it is, where it comes from, and under which licence.

    Attributes:
        licence: name in `licences` of origins.yaml; None where it is not known.
        hub_id: repository that it was made from.
        note: what else a user must know.
        citation: BibTeX.
    """

    name: str
    what: str
    origin: str
    licence: str | None = None
    hub_id: str | None = None
    note: str | None = None
    citation: str | None = None


@cache
def origins() -> dict[str, Any]:
    return yaml.safe_load((TEMPLATES / "origins.yaml").read_text(encoding="utf-8"))


def origin_of(name: str) -> dict[str, Any] | None:
    """The record of a named encoder's family in origins.yaml, or None."""
    records = origins()["encoders"].values()
    return next((r for r in records if any(fnmatchcase(name, pattern) for pattern in r["names"])), None)


def encoder_part(saved: SavedFolder) -> Part:
    name, entry = saved.encoder_name, saved.named_encoder
    source = Path(saved.encoder_origin.get("source") or "")
    file = source.name if source.is_absolute() else saved.encoder_origin.get("source")
    if entry is None:
        hub_id = _hub_id(saved, "vision_encoder", name) if name else None
        what = f"`{hub_id or Path(name).name}`" if name else f"of type `{saved.vision_config.model_type}`"
        in_layout = f"file `{file}`, its tensors named as in the layout `{saved.encoder_origin.get('layout')}`"
        return Part("encoder", what, _hub_link(hub_id) or (in_layout if file else UNKNOWN), hub_id=hub_id)
    record = origin_of(entry.name) or {}
    link = f"[{record['title']}]({record['origin']})" if record else UNKNOWN
    if entry.weights is not None and saved.encoder_weights != "published":
        origin = f"architecture of {link}; weights {saved.encoder_weights}"
        return Part("encoder", f"`{name}`", origin, citation=record.get("citation"))
    hub_id = entry.weights.hub_id if entry.weights else None
    file = file or (entry.weights and entry.weights.url and entry.weights.url.rpartition("/")[2])
    origin = ", ".join([link, *([record["by"]] if record else [])])
    origin += (f"; {_hub_link(hub_id)}" if hub_id else "") + (f"; file `{file}`" if file else "")
    return Part(
        "encoder", f"`{name}`", origin, _known(entry.licence), hub_id, record.get("note"), record.get("citation")
    )


def language_model_part(saved: SavedFolder) -> Part:
    name = saved.language_model_name
    if name is None:
        return Part("language model", f"of type `{saved.config.text_config.model_type}`", UNKNOWN)
    hub_id = _hub_id(saved, "language_model", name)
    if hub_id is None:
        return Part("language model", f"`{Path(name).name}`", "a folder on the machine that made this model")
    record = origins()["language_models"].get(hub_id, {})
    return Part(
        "language model", f"`{hub_id}`", _hub_link(hub_id), record.get("licence"), hub_id, note=record.get("note")
    )


def _known(licence: str) -> str | None:
    """A licence of the table, or None for the SPDX word that says that its origin states none."""
    return None if licence == "NOASSERTION" else licence


def _hub_id(saved: SavedFolder, key: str, value: str) -> str | None:
    """The value of a recipe's key, if it is known to have been a repository on the Hub and no folder."""
    if value in origins()["language_models"]:
        return value
    noted = saved.run.get("local")  # keys that named something on the machine; runs of older versions do not say
    return value if noted is not None and key not in noted and _HUB_ID.fullmatch(value) else None


def _hub_link(hub_id: str | None) -> str:
    return f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else ""


def part_row(part: Part) -> dict[str, str]:
    licence = part.licence or "not known here: see its origin"
    link = origins()["licences"].get(part.licence, {}).get("link")
    return {
        "name": part.name,
        "what": part.what,
        "origin": part.origin,
        "licence": f"[{licence}]({link})" if link else licence,
        "note": part.note or "",
    }


def licence_metadata(parts: Sequence[Part]) -> dict[str, Any]:
    """The one licence of all parts; `other` where they differ; nothing where one of them is not known."""
    records = origins()["licences"]
    if any(part.licence not in records for part in parts):
        return {}
    licences = list(dict.fromkeys(part.licence for part in parts))
    if len(licences) > 1:
        return {
            "license": "other",
            "license_name": "-and-".join(records[one].get("name", records[one]["id"]) for one in licences),
        }
    record = records[licences[0]]
    if record["id"] != "other":
        return {"license": record["id"]}
    return {"license": "other", "license_name": record["name"], "license_link": record["link"]}


def conversations(saved: SavedFolder) -> Mapping[str, Any]:
    """The record of the training conversations, known by the name of their file or by the release."""
    name = _release(saved).get("conversations") or Path(saved.recipe.get("data_path", "")).name
    return origins()["conversations"].get(name, {})


def release_parts(saved: SavedFolder) -> list[Part]:
    """The connector of a VLM that others released; one that was trained here has no other origin."""
    release = _release(saved)
    if not release:
        return []
    origin = f"[{release['title']}]({release['origin']}), {release['by']}"
    return [Part("connector and fine-tuning", f"`{saved.config.connector}`", origin, release.get("licence"))]


def _release(saved: SavedFolder) -> Mapping[str, Any]:
    return origins()["releases"].get(saved.origin.get("layout"), {})


def hub_data_link(record: Mapping[str, Any]) -> str:
    if "hub_id" not in record:
        return ""
    return f"[{record['title']}](https://huggingface.co/datasets/{record['hub_id']}) ({record['licence']})"


def encoder_data(saved: SavedFolder) -> list[dict[str, Any]]:
    """Records of the data that the tag of a named encoder names, if its weights are those of its name."""
    entry, known = saved.named_encoder, origins()["training_data"]
    if entry is None or (entry.weights is not None and saved.encoder_weights != "published"):
        return []
    return [known[word] for word in entry.name.partition(".")[2].split("_") if word in known]


__all__ = [
    "TEMPLATES",
    "UNKNOWN",
    "Part",
    "conversations",
    "encoder_data",
    "encoder_part",
    "hub_data_link",
    "language_model_part",
    "licence_metadata",
    "origin_of",
    "origins",
    "part_row",
    "release_parts",
]
