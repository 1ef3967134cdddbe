"""A hub on localhost: repositories that are folders, branches, gates, and a log of what was asked.

It answers what ``huggingface_hub`` sends for ``snapshot_download``: model info, the list of files,
HEAD and GET of a file. Answers and headers are those of the real hub.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch
from safetensors.torch import save_file


def commit_of(text: str) -> str:
    """A commit id that a test can tell from its text."""
    return hashlib.sha1(text.encode()).hexdigest()


@dataclass
class Repository:
    """One model: commit → folder, branch or tag → commit."""

    commits: dict[str, Path] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def find(self, revision: str) -> str | None:
        """The commit that a branch, a tag or a commit means."""
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None


class Hub:
    """The double. Use it as a context; ``url`` is what ``HF_ENDPOINT`` should be."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []  # (method, path)
        self.is_down = False
        self.sent = 0  # bytes of ranges
        hub = self

        class Handler(_Handler):
            def answer(self) -> None:
                hub.requests.append((self.command, unquote(urlsplit(self.path).path)))
                hub.answer(self)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, folder: Path, *branches: str, gated: bool = False) -> str:
        """Publish a folder as a new commit; without branches it becomes ``main``."""
        repository = self.repositories.setdefault(name, Repository())
        commit = commit_of(f"{name} {len(repository.commits)}")
        repository.commits[commit] = folder
        repository.branches |= dict.fromkeys(branches or ("main",), commit)
        repository.gated = gated
        return commit

    def downloaded(self) -> set[str]:
        """``org/name/file`` of every file whose content was asked for."""
        marked = [path.split("/resolve/") for method, path in self.requests if method == "GET"]
        return {f"{p[0][1:]}/{p[1].partition('/')[2]}" for p in marked if len(p) == 2}

    # ---- answers -----------------------------------------------------------------------------

    def answer(self, request: _Handler) -> None:
        """Answer one request."""
        if self.is_down:
            request.reply(503, b"down for maintenance")
            return
        parts = unquote(urlsplit(request.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            self._api(request, "/".join(parts[2:4]), parts[4:])
        elif len(parts) > 4 and parts[2] == "resolve":
            self._file(request, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            request.reply(404, b"not found")

    def _find(self, request: _Handler, name: str, revision: str) -> tuple[Repository, str] | None:
        repository = self.repositories.get(name)
        if repository is None:
            # The real hub does not tell strangers which private repositories exist.
            request.refuse(401, "RepoNotFound", "Invalid username or password.")
            return None
        commit = repository.find(revision)
        if commit is None:
            request.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repository, commit

    def _api(self, request: _Handler, name: str, rest: list[str]) -> None:
        kind, revision = (rest[0], "/".join(rest[1:])) if rest else ("revision", "main")
        found = self._find(request, name, revision)
        if found is None:
            return
        repository, commit = found
        files = _files(repository.commits[commit])
        if kind == "tree":
            entries = [
                {"type": "file", "path": path, "size": file.stat().st_size, "oid": _etag(file)}
                for path, file in files.items()
            ]
            request.reply_json(entries)
            return
        request.reply_json(
            {
                "id": name,
                "modelId": name,
                "sha": commit,
                "private": repository.private,
                "gated": "manual" if repository.gated else False,
                "disabled": False,
                "tags": [],
                "siblings": [{"rfilename": path} for path in files],
            }
        )

    def _file(self, request: _Handler, name: str, revision: str, path: str) -> None:
        found = self._find(request, name, revision)
        if found is None:
            return
        repository, commit = found
        if repository.gated:
            request.refuse(403, "GatedRepo", f"Access to model {name} is restricted.")
            return
        file = _files(repository.commits[commit]).get(path)
        if file is None:
            request.refuse(404, "EntryNotFound", "Entry not found")
            return
        headers = {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        content = file.read_bytes()
        asked = request.headers.get("Range", "")
        if not asked:
            request.reply(200, content, headers)
            return
        first, last = (int(part) for part in asked.removeprefix("bytes=").split("-"))
        part = content[first : last + 1]
        self.sent += len(part)
        headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
        request.reply(206, part, headers)


def _files(folder: Path) -> dict[str, Path]:
    return {
        str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()
    }


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        raise NotImplementedError

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def body(self) -> bytes:
        """What came with the request; to be read before it is answered, or the next one starts
        in the middle of it."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline().strip(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def log_message(self, *_) -> None:
        """The log is ``Hub.requests``."""

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        """Send an answer; HEAD gets its headers only."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def reply_json(self, data: object) -> None:
        """Send data."""
        self.reply(200, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str, message: str) -> None:
        """Send an error as the hub spells it."""
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self.reply(status, json.dumps({"error": message}).encode(), headers)


def small_model(folder: Path, value: float = 1.0) -> Path:
    """A folder that passes for a checkpoint."""
    folder.mkdir(parents=True)
    save_file({"a.weight": torch.full((2, 2), value)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder
