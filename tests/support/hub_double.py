"""A server on this machine that speaks as much of the Hub's protocol as pushes and downloads of this package need.

It keeps repositories in memory: users and tokens, creating a repository, checking a card, uploading regular files
(base64 in the commit) and large files (the LFS batch protocol), commits, trees and downloads. It does not speak xet,
the protocol in which the Hub itself receives large files; clients use it with HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import yaml

TOKENS = {"hf_write": "write", "hf_read": "read"}
_LARGE = 4096
_API = re.compile(r"/api/(models|datasets)/([^/?]+/[^/?]+)(?:/(revision|preupload|commit|tree)/[^?]+)?(?:\?.*)?")
_LFS = re.compile(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch")
_RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Repository:
    """Hold a repository: its files, its commits' numbers, and whether it is private."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    large: set[str] = field(default_factory=set)

    @property
    def sha(self) -> str:
        return hashlib.sha1(f"{len(self.commits)}{sorted(self.files)}".encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """Serve the protocol.

    Attributes:
        repositories: by kind ("models", "datasets") and name.
        objects: large files that were received, by their SHA-256.
        requests: method and path of each request.
        forbidden: whether commits are refused with 403.
        most_objects: number of large files that are received; later ones fail. None for no limit.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.forbidden = False
        self.most_objects: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def _answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, text: str, code: str = "") -> None:
        headers = {"X-Error-Message": text} | ({"X-Error-Code": code} if code else {})
        self._answer({"error": text}, status, headers)

    @property
    def _role(self) -> str | None:
        return TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _handle(self) -> None:
        hub, path = self.server, unquote(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append(f"{self.command} {path.partition('?')[0]}")
        if path.startswith("/objects/"):
            self._receive(path.removeprefix("/objects/"), body)
        elif path == "/api/validate-yaml":
            self._validate(json.loads(body))
        elif match := _RESOLVE.fullmatch(path):
            self._download("datasets" if match[1] else "models", match[2], match[4])
        elif self._role is None:
            self._refuse(401, "Invalid username or password.")
        elif path == "/api/whoami-v2":
            self._answer({"name": "me", "type": "user", "orgs": [], "auth": {"accessToken": {"role": self._role}}})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif match := _LFS.fullmatch(path):
            self._batch(json.loads(body))
        elif match := _API.fullmatch(path):
            self._api(match, body)
        else:
            self._refuse(404, f"no such page: {path}")

    do_GET = do_POST = do_PUT = do_HEAD = _handle  # noqa: N815 - the names that http.server calls

    def _receive(self, oid: str, body: bytes) -> None:
        most = self.server.most_objects
        if most is not None and len(self.server.objects) >= most:
            self._refuse(400, "the upload broke off")
            return
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self._answer({})

    def _validate(self, card: dict[str, str]) -> None:
        try:
            yaml.safe_load(card["content"].split("---")[1])
        except (yaml.YAMLError, IndexError) as error:
            self._answer({"errors": [{"message": f"bad metadata: {error}"}], "warnings": []}, 400)
        else:
            self._answer({"errors": [], "warnings": []})

    def _create(self, wanted: dict[str, Any]) -> None:
        user = wanted.get("organization") or "me"
        kind, name = f"{wanted.get('type', 'model')}s", f"{user}/{wanted['name']}"
        if user != "me" or self._role != "write":
            self._refuse(403, f"You don't have the rights to create a {kind[:-1]} under the namespace {user}")
        elif (kind, name) in self.server.repositories:
            self._refuse(409, "You already created this repository")
        else:
            private = wanted.get("private") or wanted.get("visibility") == "private"
            self.server.repositories[kind, name] = Repository(bool(private))
            self._answer({"url": f"{self.server.url}/{name}", "name": name})

    def _batch(self, wanted: dict[str, Any]) -> None:
        objects = []
        for item in wanted["objects"]:
            upload = {"href": f"{self.server.url}/objects/{item['oid']}", "header": {}}
            known = item["oid"] in self.server.objects
            objects.append(item | ({} if known else {"actions": {"upload": upload}}))
        self._answer({"transfer": "basic", "objects": objects})

    def _api(self, match: re.Match[str], body: bytes) -> None:
        kind, name, what = match.groups()
        repository = self.server.repositories.get((kind, name))
        if repository is None:
            self._refuse(404, "Repository not found", "RepoNotFound")
        elif what == "preupload":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] > _LARGE else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif what == "commit":
            self._commit(repository, name, [json.loads(line) for line in body.splitlines()])
        elif what == "tree":
            self._answer([self._entry(repository, file) for file in repository.files])
        else:
            siblings = [{"rfilename": file} for file in repository.files]
            facts: dict[str, Any] = {
                "_id": "1",
                "id": name,
                "sha": repository.sha,
                "private": repository.private,
                "tags": [],
            }
            self._answer(facts | {"siblings": siblings, "downloads": 0, "likes": 0})

    def _entry(self, repository: Repository, file: str) -> dict[str, Any]:
        content = repository.files[file]
        entry = {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if file in repository.large:
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 100}
        return entry

    def _commit(self, repository: Repository, name: str, lines: list[dict[str, Any]]) -> None:
        if self.server.forbidden:
            self._refuse(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
            return
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.server.objects[value["oid"]]
                repository.large.add(value["path"])
            else:
                assert line["key"] == "header", line
                repository.commits.append(value["summary"])
        url = f"{self.server.url}/{name}/commit/{repository.sha}"
        self._answer({"commitUrl": url, "commitOid": repository.sha, "success": True})

    def _download(self, kind: str, name: str, file: str) -> None:
        repository = self.server.repositories.get((kind, name))
        if repository is None or file not in repository.files:
            self._refuse(404, "Entry not found", "EntryNotFound" if repository else "RepoNotFound")
            return
        content = repository.files[file]
        headers = {"X-Repo-Commit": repository.sha, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        self._answer(content, headers=headers)


@contextmanager
def local_hub() -> Iterator[Hub]:
    """Run the server while the `with` block runs."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
