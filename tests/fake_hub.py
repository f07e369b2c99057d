"""A server on this machine that speaks the part of the Hugging Face hub's HTTP interface that this project uses."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest

TOKEN = "hf_SecretOfTheTests0123456789"


@dataclass
class Model:
    """A model on the hub: its files on each branch."""

    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def head(self, revision: str) -> str | None:
        """Return the commit of a branch, or a commit that is given by its hash; None if there is none."""
        if revision in self.commits:
            return revision
        if (files := self.branches.get(revision)) is None:
            return None
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[commit] = dict(files)
        return commit


@dataclass
class Hub:
    """What the hub holds, and what was asked of it."""

    address: str
    models: dict[str, Model] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    """Method and path of each request."""
    faults: dict[str, list[int]] = field(default_factory=dict)
    """Pattern of method and path → HTTP status of the next answers; 0 cuts an answer off in its middle."""
    wrong: dict[str, bytes] = field(default_factory=dict)
    """File → content that is sent instead of what the hash was published of."""

    def fault(self, asked: str) -> int | None:
        """Return the next fault of a request; None if there is none."""
        for pattern, statuses in self.faults.items():
            if statuses and re.search(pattern, asked):
                return statuses.pop(0)
        return None


def etag(name: str, content: bytes) -> str:
    """Return the name that the hub gives to the content of a file: large files have their SHA-256."""
    if name.endswith(".safetensors"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *unused: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        path = unquote(urlsplit(self.path).path)
        asked = f"{self.command} {path}"
        self.hub.asked.append(asked)
        fault = self.hub.fault(asked)
        self.cut = fault == 0
        if fault:
            return self._json({"error": "a fault of the test"}, fault)
        if self.command in ("POST", "PUT") and "/lfs/" not in path and not self._knows():
            return self._json({"error": "Invalid credentials in Authorization header"}, 401)
        for pattern, answer in _ROUTES:
            if match := re.fullmatch(pattern, asked):
                return answer(self, body, **match.groupdict())
        return self._json({"error": f"unknown: {asked}"}, 404)

    def _knows(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        self._send(json.dumps(value).encode(), status, headers | {"Content-Type": "application/json"})

    def _send(self, content: bytes, status: int, headers: dict[str, str], sent: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:sent])
        if sent is not None:
            self.close_connection = True

    def _model(self, repo: str) -> Model | None:
        model = self.hub.models.get(repo)
        if model is None or (model.private and not self._knows()):
            self._json(
                {"error": "Repository not found"}, 404 if self._knows() else 401, **{"X-Error-Code": "RepoNotFound"}
            )
            return None
        return model

    def _commit_of(self, model: Model, revision: str) -> str | None:
        if (commit := model.head(revision)) is None:
            self._json({"error": "Invalid rev id"}, 404, **{"X-Error-Code": "RevisionNotFound"})
        return commit

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.models:
            url = f"{self.hub.address}/{name}"
            return self._json({"error": "You already created this model repo", "url": url}, 409)
        self.hub.models[name] = Model(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        self._json({"url": f"{self.hub.address}/{name}", "name": name})

    def validate(self, body: bytes) -> None:
        self._json({"errors": [], "warnings": []})

    def info(self, body: bytes, repo: str, revision: str | None = None) -> None:
        if (model := self._model(repo)) and (commit := self._commit_of(model, revision or "main")):
            self._json({"id": repo, "sha": commit, "private": model.private, "siblings": []})

    def tree(self, body: bytes, repo: str, revision: str) -> None:
        if not (model := self._model(repo)) or not (commit := self._commit_of(model, revision)):
            return
        entries = []
        for name, content in model.commits[commit].items():
            oid = etag(name, content)
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": oid}
            if len(oid) == 64:
                entry |= {"oid": oid[:40], "lfs": {"oid": oid, "size": len(content), "pointerSize": 134}}
            entries.append(entry)
        self._json(entries)

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        if self._model(repo):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            self._json({"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]})

    def batch(self, body: bytes, repo: str) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.hub.address}/lfs/{each['oid']}"}}}
            for each in json.loads(body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.stored[oid] = body
        self._send(b"", 200, {})

    def branch(self, body: bytes, repo: str, revision: str) -> None:
        model = self.hub.models[repo]
        if revision in model.branches:
            return self._json({"error": "exists"}, 409)
        model.branches[revision] = dict(model.branches["main"])
        self._json({})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        files = self.hub.models[repo].branches[revision]
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        oid = self.hub.models[repo].head(revision)
        self._json({"commitUrl": f"{self.hub.address}/{repo}/commit/{oid}", "commitOid": oid})

    def resolve(self, body: bytes, repo: str, revision: str, file: str) -> None:
        if not (model := self._model(repo)) or not (commit := self._commit_of(model, revision)):
            return
        content = model.commits[commit].get(file)
        if content is None:
            return self._json({"error": "Entry not found"}, 404, **{"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{etag(file, content)}"', "X-Repo-Commit": commit}
        content, status = self.hub.wrong.get(file, content), 200
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(match[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            content, status = content[start:], 206
        self._send(content, status, headers, len(content) // 2 if self.cut and self.command == "GET" else None)


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES = [
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"GET /api/models/{_REPO}", _Handler.info),
    (rf"GET /api/models/{_REPO}/revision/(?P<revision>.+)", _Handler.info),
    (rf"GET /api/models/{_REPO}/tree/(?P<revision>[^/]+)", _Handler.tree),
    (rf"POST /api/models/{_REPO}/preupload/(?P<revision>.+)", _Handler.preupload),
    (rf"POST /api/models/{_REPO}/branch/(?P<revision>.+)", _Handler.branch),
    (rf"POST /api/models/{_REPO}/commit/(?P<revision>.+)", _Handler.commit),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /lfs/(?P<oid>[0-9a-f]{64})", _Handler.store),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler.resolve),
]


@contextmanager
def serving() -> Iterator[Hub]:
    """Run an empty hub for as long as the block lasts."""
    handler = type("Handler", (_Handler,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        handler.hub = Hub(f"http://127.0.0.1:{server.server_port}")
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield handler.hub
        server.shutdown()
        thread.join()


def use(hub: Hub, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub in this process use that hub, and an empty cache; it reads the environment only once."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
