"""A Hugging Face Hub on localhost, as small as the client allows: repositories, commits, LFS uploads, downloads.

`HubStub` is a server in a thread; `hub.environment(folder)` makes child processes talk to it, `hub.patch(monkeypatch,
folder)` this one. What was received is in `hub.files(repo_id)`, byte for byte; `hub.requests` says who asked for what.
Xet, the Hub's own protocol for large files, is switched off in clients, so that they fall back to LFS.
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_token_of_the_stub"
USER = "somebody"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt")

_LICENCES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0
artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0
cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0
cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0
epl-1.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by
odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license llama2 gemma unknown
other
"""
LICENCES = frozenset(_LICENCES.split())
"""Identifiers of huggingface.co/docs/hub/repositories-licenses, as far as known."""

_PIPELINE_TAGS = """
depth-estimation feature-extraction image-classification image-feature-extraction image-segmentation image-text-to-text
image-to-image image-to-text mask-generation object-detection text-classification text-generation
visual-question-answering zero-shot-image-classification zero-shot-object-detection
"""
PIPELINE_TAGS = frozenset(_PIPELINE_TAGS.split())
"""Tasks of huggingface.co/tasks that have to do with pictures or text, as far as known."""

_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def metadata_errors(content: str) -> list[str]:
    """What the Hub would refuse in a card's metadata, by its documented rules."""
    if not content.startswith("---\n"):
        return ["no metadata"]
    try:
        metadata = yaml.safe_load(content.split("---\n")[1])
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    errors = []

    def hold(condition: Any, message: str) -> None:
        if not condition:
            errors.append(message)

    def is_list_of_text(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(entry, str) for entry in value)

    if "license" in metadata:
        hold(metadata["license"] in LICENCES, f"license {metadata['license']!r} is not allowed")
    if metadata.get("license") == "other":
        hold(re.fullmatch(r"[a-z0-9][a-z0-9.-]*", metadata.get("license_name", "")), "other needs a license_name")
    hold("license" in metadata or "license_name" not in metadata, "license_name without license")
    if "license_link" in metadata:
        link = metadata["license_link"]
        hold(link.startswith("https://") or link in ("LICENSE", "LICENSE.md"), f"license_link {link!r} is no link")
    if "pipeline_tag" in metadata:
        hold(metadata["pipeline_tag"] in PIPELINE_TAGS, f"pipeline_tag {metadata['pipeline_tag']!r} is unknown")
    if "language" in metadata:
        hold(re.fullmatch("[a-z]{2,3}", metadata["language"]), "language must be an ISO code")
    for key in ("tags", "datasets", "metrics", "base_model"):
        if key in metadata:
            hold(is_list_of_text(metadata[key]), f"{key} must be a list of texts")
    for key in ("datasets", "base_model"):
        hold(all(_REPO_ID.fullmatch(entry) for entry in metadata.get(key, [])), f"{key} must be ids on the Hub")
    for model in metadata.get("model-index", []):
        hold(isinstance(model.get("name"), str), "model-index needs a name")
        for result in model["results"]:
            hold(isinstance(result.get("task", {}).get("type"), str), "a result needs task.type")
            for key in ("type", "name"):
                hold(isinstance(result.get("dataset", {}).get(key), str), f"a result needs dataset.{key}")
            hold(result.get("metrics"), "a result needs metrics")
            for metric in result.get("metrics", []):
                hold(isinstance(metric.get("type"), str), "a metric needs a type")
                hold(isinstance(metric.get("value"), int | float), "a metric needs a value")
    return errors


@dataclass
class Repository:
    """Branch -> path -> content, and the id of each branch's last commit."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b""}})
    commits: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    messages: list[str] = field(default_factory=list)
    lfs: set[str] = field(default_factory=set)  # sha256 of files that came as LFS


class HubStub:
    """The server; use it as a context manager."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}  # LFS objects by sha256
        self.requests: list[str] = []
        stub = self

        class Handler(_Handler):
            hub = stub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "HubStub":
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        """What a branch holds."""
        return {name: data for name, data in self.repositories[repo_id].branches[branch].items() if name[0] != "."}

    def environment(self, folder: str | Path, token: str | None = TOKEN) -> dict[str, str]:
        """Environment of a child process that takes this for the Hub; its caches go into `folder`."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        kept |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(folder), "HF_HUB_DISABLE_XET": "1"}
        kept |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0", "NO_PROXY": "*", "no_proxy": "*"}
        return kept | ({"HF_TOKEN": token} if token else {})

    def patch(self, monkeypatch: Any, folder: str | Path, token: str | None = TOKEN) -> None:
        """Makes this process take it for the Hub, which clients that exist already do not notice otherwise."""
        import transformers.utils.hub
        from huggingface_hub import constants, hf_api

        for name, value in {
            "ENDPOINT": self.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(folder),
            "HF_TOKEN_PATH": str(Path(folder) / "token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", self.endpoint)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.setenv(name, "*")
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        else:
            monkeypatch.delenv("HF_TOKEN", raising=False)


class _Handler(BaseHTTPRequestHandler):
    hub: HubStub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    # Answers

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, content: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(content).encode(), Content_Type="application/json")

    def refuse(self, status: int, code: str, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        self.answer(status, body, X_Error_Code=code, X_Error_Message=message, Content_Type="application/json")

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    # Requests

    def serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.body()
        for pattern, route in _ROUTES:
            match = re.fullmatch(pattern, f"{self.command} {path}")
            if match:
                writes = self.command in ("POST", "PUT") and not path.endswith(("validate-yaml", "paths-info"))
                if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}" and "/lfs/" not in path:
                    self.refuse(401, "", "Invalid credentials in Authorization header")
                else:
                    route(self, body, **match.groupdict())
                return
        self.refuse(404, "", f"The stub knows no {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def repository(self, repo: str) -> Repository | None:
        found = self.hub.repositories.get(repo)
        hidden = found is not None and found.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        if found is None or hidden:
            self.refuse(401 if hidden else 404, "RepoNotFound", "Repository not found")
            return None
        return found

    def branch(self, repo: str, revision: str) -> tuple[Repository, str] | None:
        """The repository, and the branch that a name or the id of a commit means."""
        found = self.repository(repo)
        if found is None:
            return None
        by_commit = {commit: branch for branch, commit in found.commits.items()}
        branch = by_commit.get(revision, revision)
        if branch not in found.branches:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return found, branch

    def whoami(self, _: bytes) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.refuse(401, "", "Invalid credentials in Authorization header")
        else:
            self.answer_json({"name": USER, "type": "user", "orgs": [], "auth": {"type": "access_token"}})

    def create_repo(self, body: bytes) -> None:
        wanted = json.loads(body)
        repo = f"{wanted.get('organization') or USER}/{wanted['name']}"
        status = 409 if repo in self.hub.repositories else 200
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.repositories.setdefault(repo, Repository(private))
        self.answer_json({"url": f"{self.hub.endpoint}/{repo}", "name": repo, "id": repo}, status)

    def create_branch(self, _: bytes, repo: str, branch: str) -> None:
        found = self.repository(repo)
        if found is not None:
            status = 409 if branch in found.branches else 200
            found.branches.setdefault(branch, dict(found.branches["main"]))
            found.commits.setdefault(branch, found.commits["main"][:-1] + str(len(found.commits)))
            self.answer_json({}, status)

    def validate(self, body: bytes) -> None:
        errors = metadata_errors(json.loads(body)["content"])
        answer = {"errors": [{"message": error} for error in errors], "warnings": []}
        self.answer_json(answer, 400 if errors else 200)

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        if self.branch(repo, revision) is not None:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer_json({"files": files})

    def lfs_batch(self, body: bytes, repo: str) -> None:
        if self.repository(repo) is None:
            return
        objects = []
        for wanted in json.loads(body)["objects"]:
            upload = {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}", "header": {}}
            known = wanted["oid"] in self.hub.stored
            objects.append({**wanted, **({} if known else {"actions": {"upload": upload}})})
        self.answer_json({"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self.refuse(400, "", "The content is not what its sha256 says")
        else:
            self.hub.stored[oid] = body
            self.answer(200)

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        found = self.branch(repo, revision)
        if found is None:
            return
        repository, branch = found
        files = dict(repository.branches[branch])
        for line in map(json.loads, body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                repository.messages.append(value["summary"])
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
                repository.lfs.add(value["oid"])
            elif key == "deletedFile":
                del files[value["path"]]
        if "README.md" in files:
            errors = metadata_errors(files["README.md"].decode())
            if errors:
                self.refuse(400, "", f"Invalid metadata in README.md: {'; '.join(errors)}")
                return
        repository.branches[branch] = files
        commit = hashlib.sha1(body + branch.encode()).hexdigest()
        repository.commits[branch] = commit
        url = f"{self.hub.endpoint}/{repo}/commit/{commit}"
        self.answer_json({"commitUrl": url, "commitOid": commit, "success": True, "hookOutput": ""})

    def info(self, _: bytes, repo: str, revision: str | None = None) -> None:
        found = self.branch(repo, revision or "main")
        if found is not None:
            repository, branch = found
            siblings = [{"rfilename": name} for name in repository.branches[branch]]
            content = {"id": repo, "modelId": repo, "sha": repository.commits[branch], "private": repository.private}
            self.answer_json({**content, "siblings": siblings, "tags": []})

    def tree(self, _: bytes, repo: str, revision: str, folder: str | None = None) -> None:
        found = self.branch(repo, revision)
        if found is None:
            return
        repository, branch = found
        files = repository.branches[branch]
        inside = {name: data for name, data in files.items() if name.startswith(f"{folder}/" if folder else "")}
        if folder and not inside:
            self.refuse(404, "EntryNotFound", f"{folder} does not exist")
            return
        entries = []
        for name, data in inside.items():
            oid = hashlib.sha256(data).hexdigest()
            lfs = {"lfs": {"oid": oid, "size": len(data), "pointerSize": 134}} if oid in repository.lfs else {}
            entries.append({"type": "file", "path": name, "size": len(data), "oid": _git_id(data), **lfs})
        self.answer_json(entries)

    def download(self, _: bytes, repo: str, revision: str, path: str) -> None:
        found = self.branch(repo, revision)
        if found is None:
            return
        repository, branch = found
        data = repository.branches[branch].get(path)
        if data is None:
            self.refuse(404, "EntryNotFound", f"{path} does not exist")
            return
        oid = hashlib.sha256(data).hexdigest()
        etag = oid if oid in repository.lfs else _git_id(data)
        headers = {"ETag": f'"{etag}"', "X_Repo_Commit": repository.commits[branch]}
        if oid in repository.lfs:
            headers |= {"X_Linked_ETag": f'"{etag}"', "X_Linked_Size": str(len(data))}
        self.answer(200, data, **headers)


def _git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_REPO, _REVISION = r"(?P<repo>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)"
_ROUTES = [
    (r"GET /api/whoami-v2", _Handler.whoami),
    (r"POST /api/repos/create", _Handler.create_repo),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"POST /api/models/{_REPO}/branch/(?P<branch>.+)", _Handler.create_branch),
    (rf"POST /api/models/{_REPO}/preupload/{_REVISION}", _Handler.preupload),
    (rf"POST /api/models/{_REPO}/commit/{_REVISION}", _Handler.commit),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (r"PUT /lfs/(?P<oid>[0-9a-f]{64})", _Handler.store),
    (rf"GET /api/models/{_REPO}", _Handler.info),
    (rf"GET /api/models/{_REPO}/revision/{_REVISION}", _Handler.info),
    (rf"GET /api/models/{_REPO}/tree/{_REVISION}(/(?P<folder>.+))?", _Handler.tree),
    (rf"(GET|HEAD) /{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _Handler.download),
]
