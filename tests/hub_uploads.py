"""The hub on localhost, with everything that a push asks of it.

Users with tokens, repositories that are made, the YAML check, preupload, large files by the LFS
protocol (batch, PUT, verify), commits in NDJSON, branches and pull requests. Answers are those of
the real hub, as ``huggingface_hub`` 2.4 reads them. (The Xet protocol, which that library prefers
where ``hf_xet`` is installed, is binary; tests switch it off.)
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub import Hub, Repository, _files, commit_of

_LARGE = 10_000_000  # bytes from which the real hub wants a file of any kind as a large one


class User(NamedTuple):
    """Who a token is of, and what it may do."""

    name: str
    organizations: tuple[str, ...] = ()
    may_write: bool = True


class UploadHub(Hub):
    """The double.

    Attributes:
        users: token → user.
        objects: large files that were uploaded, SHA-256 → content, committed or not.
        put: SHA-256 of every large file that was really sent.
        fails_after: so many large files are taken, then the storage refuses; None: no limit.
        pull_requests: repository → reference → branch that it is for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.users: dict[str, User] = {}
        self.objects: dict[str, bytes] = {}
        self.put: list[str] = []
        self.fails_after: int | None = None
        self.tokens_seen: set[str | None] = set()
        self.pull_requests: dict[str, dict[str, str]] = {}
        self._store = tempfile.TemporaryDirectory(prefix="epmq-hub-")

    def __exit__(self, *_) -> None:
        super().__exit__()
        self._store.cleanup()

    def folder(self, name: str, revision: str = "main") -> Path:
        """The files of a revision."""
        repository = self.repositories[name]
        return repository.commits[repository.find(revision)]

    def files(self, name: str, revision: str = "main") -> set[str]:
        """The names of the files of a revision."""
        return set(_files(self.folder(name, revision)))

    def commits(self, name: str) -> int:
        """How many commits there are."""
        return len(self.repositories[name].commits)

    # ---- answers -----------------------------------------------------------------------------

    def answer(self, request) -> None:
        """Answer one request."""
        body = request.body()
        parts = unquote(urlsplit(request.path).path).strip("/").split("/")
        token = request.headers.get("Authorization", "").removeprefix("Bearer ") or None
        self.tokens_seen.add(token)
        user = self.users.get(token)
        if self.is_down:
            request.reply(503, b"down for maintenance")
        elif token is not None and user is None:
            request.refuse(401, "", "Invalid credentials in Authorization header")
        elif parts == ["api", "whoami-v2"]:
            self._whoami(request, user)
        elif parts == ["api", "repos", "create"]:
            self._create(request, json.loads(body), user)
        elif parts == ["api", "validate-yaml"]:
            self._validate(request, json.loads(body)["content"])
        elif parts[:2] == ["lfs", "upload"]:
            self._take(request, parts[2], body)
        elif parts[:2] == ["lfs", "verify"]:
            known = json.loads(body)["oid"] in self.objects
            request.reply_json({}) if known else request.refuse(404, "", "no such object")
        elif parts[2:] == ["info", "lfs", "objects", "batch"]:
            name = "/".join(parts[:2]).removesuffix(".git")
            asked = json.loads(body)
            # Without a branch it is for a pull request, which whoever may read may open.
            if self._may(request, name, user, "write" if "ref" in asked else "read"):
                self._batch(request, asked)
        elif parts[:2] == ["api", "models"] and len(parts) >= 5 and request.command == "POST":
            self._write(request, "/".join(parts[2:4]), parts[4], "/".join(parts[5:]), body, user)
        elif parts[:2] == ["api", "models"] and parts[4:] == ["refs"]:
            self._refs(request, "/".join(parts[2:4]), user)
        elif self._is_hidden(parts, user):
            request.refuse(401, "RepoNotFound", "Invalid username or password.")
        else:
            super().answer(request)

    def _is_hidden(self, parts: list[str], user: User | None) -> bool:
        name = "/".join(parts[2:4] if parts[:2] == ["api", "models"] else parts[:2])
        repository = self.repositories.get(name)
        return repository is not None and repository.private and not self._owns(name, user)

    def _owns(self, name: str, user: User | None) -> bool:
        owner = name.partition("/")[0]
        return user is not None and (owner == user.name or owner in user.organizations)

    def _may(self, request, name: str, user: User | None, right: str) -> bool:
        repository = self.repositories.get(name)
        if (
            user is None
            or repository is None
            or (repository.private and not self._owns(name, user))
        ):
            request.refuse(401, "RepoNotFound", "Invalid username or password.")
            return False
        if right == "write" and not (self._owns(name, user) and user.may_write):
            request.refuse(403, "", "Forbidden: you don't have the required permissions")
            return False
        return True

    def _whoami(self, request, user: User | None) -> None:
        if user is None:
            request.refuse(401, "", "Invalid username or password.")
        else:
            organizations = [{"name": name} for name in user.organizations]
            request.reply_json({"type": "user", "name": user.name, "orgs": organizations})

    def _create(self, request, asked: dict, user: User | None) -> None:
        if user is None:
            request.refuse(401, "", "Invalid username or password.")
            return
        name = f"{asked['organization'] or user.name}/{asked['name']}"
        if not (self._owns(name, user) and user.may_write):
            message = f'You don\'t have the rights to create a model under "{name.split("/")[0]}"'
            request.refuse(403, "", message)
        elif name in self.repositories:
            answer = {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
            request.reply(409, json.dumps(answer).encode(), {"Content-Type": "application/json"})
        else:
            first = Path(self._store.name) / commit_of(f"{name} first")
            first.mkdir()
            (first / ".gitattributes").write_text("*.safetensors filter=lfs -text\n")
            self.add(name, first)
            self.repositories[name].private = asked.get("visibility") == "private"
            request.reply_json({"url": f"{self.url}/{name}", "name": name})

    def _validate(self, request, content: str) -> None:
        front = content.split("---")[1] if content.startswith("---") else ""
        try:
            data = yaml.safe_load(front)
            wrong = None if isinstance(data, dict) else "metadata should be a mapping"
            if wrong is None and not isinstance(data.get("tags", []), list):
                wrong = '"tags" must be an array'
        except yaml.YAMLError as error:
            wrong = str(error)
        answer = {"errors": [{"message": wrong}] if wrong else [], "warnings": []}
        kind = {"Content-Type": "application/json"}
        request.reply(400 if wrong else 200, json.dumps(answer).encode(), kind)

    # ---- large files -------------------------------------------------------------------------

    def _batch(self, request, asked: dict) -> None:
        objects = []
        for each in asked["objects"]:
            found = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.objects:
                found["actions"] = {
                    "upload": {"href": f"{self.url}/lfs/upload/{each['oid']}"},
                    "verify": {"href": f"{self.url}/lfs/verify"},
                }
            objects.append(found)
        request.reply_json({"transfer": "basic", "objects": objects})

    def _take(self, request, oid: str, body: bytes) -> None:
        if self.fails_after is not None and len(self.put) >= self.fails_after:
            request.refuse(403, "", "Request has expired")  # the storage's own words
        elif hashlib.sha256(body).hexdigest() != oid:
            request.refuse(400, "", "the content is not what was announced")
        else:
            self.objects[oid] = body
            self.put.append(oid)
            request.reply(200, b"")

    # ---- commits -----------------------------------------------------------------------------

    def _write(self, request, name, action, revision, body, user: User | None) -> None:
        options = parse_qs(urlsplit(request.path).query)
        as_proposal = "create_pr" in options
        if action not in ("preupload", "commit", "branch"):
            request.refuse(404, "", "Sorry, we can't find the page you are looking for.")
        elif not self._may(request, name, user, "read" if as_proposal else "write"):
            return
        elif action == "branch":
            self._branch(request, self.repositories[name], revision)
        elif self.repositories[name].find(revision) is None:
            request.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif action == "preupload":
            self._preupload(request, self.folder(name, revision), json.loads(body))
        else:
            self._commit(request, name, revision, body, as_proposal)

    def _branch(self, request, repository: Repository, branch: str) -> None:
        if branch in repository.branches:
            request.refuse(409, "", "Reference already exists")
        else:
            repository.branches[branch] = repository.branches["main"]
            request.reply_json({})

    def _refs(self, request, name: str, user: User | None) -> None:
        if not self._may(request, name, user, "read"):
            return
        branches = self.repositories[name].branches.items()
        rows = [
            {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": commit}
            for branch, commit in branches
            if not branch.startswith("refs/")
        ]
        request.reply_json({"branches": rows, "tags": [], "converts": []})

    def _preupload(self, request, folder: Path, asked: dict) -> None:
        ignore_file = folder / ".gitignore"
        ignore = asked.get("gitIgnore")
        if ignore is None:
            ignore = ignore_file.read_text() if ignore_file.is_file() else ""
        answers = []
        for file in asked["files"]:
            large = file["path"].endswith(".safetensors") or file["size"] > _LARGE
            answer = {
                "path": file["path"],
                "uploadMode": "lfs" if large else "regular",
                "shouldIgnore": any(fnmatchcase(file["path"], p) for p in ignore.split()),
            }
            if (folder / file["path"]).is_file():
                answer["oid"] = _oid(folder / file["path"], large)
            answers.append(answer)
        request.reply_json({"files": answers})

    def _commit(self, request, name: str, revision: str, body: bytes, as_proposal: bool) -> None:
        repository = self.repositories[name]
        parent = repository.find(revision)
        lines = [json.loads(line) for line in body.decode().splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit", parent) != parent and not as_proposal:
            request.refuse(412, "", "A commit has happened since. Please refresh and try again.")
            return
        commit = commit_of(f"{name} {len(repository.commits)} {header['summary']}")
        folder = Path(self._store.name) / commit
        shutil.copytree(repository.commits[parent], folder, symlinks=True)
        for line in lines[1:]:
            value, place = line["value"], folder / line["value"]["path"]
            place.parent.mkdir(parents=True, exist_ok=True)
            if line["key"] == "file":
                place.write_bytes(base64.b64decode(value["content"]))
            elif line["key"] == "deletedFile":
                place.unlink()
            elif value["oid"] not in self.objects:
                shutil.rmtree(folder)
                request.refuse(400, "", f"Your push was rejected: {value['path']} is missing")
                return
            else:
                place.write_bytes(self.objects[value["oid"]])
        repository.commits[commit] = folder
        answer = {"success": True, "commitOid": commit}
        if as_proposal:
            proposals = self.pull_requests.setdefault(name, {})
            number = len(proposals) + 1
            proposals[f"refs/pr/{number}"] = revision
            repository.branches[f"refs/pr/{number}"] = commit
            answer["pullRequestUrl"] = f"{self.url}/{name}/discussions/{number}"
        else:
            repository.branches[revision] = commit
        request.reply_json(answer | {"commitUrl": f"{self.url}/{name}/commit/{commit}"})


def _oid(file: Path, large: bool) -> str:
    content = file.read_bytes()
    if large:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
