"""A small web server on 127.0.0.1 that speaks what the clients of the Hugging Face hub ask for, and serves files.

It can cut answers off half way, hide behind a token, and leave out parts of files, as real servers do.
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
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_good"
_PAGE = 2  # entries of one answer that lists files, so that clients must ask for the next one


@dataclass
class Repository:
    """A data set repository: its files at each revision."""

    revisions: dict[str, dict[str, bytes]]
    access: str = "public"
    """public; gated: everybody sees it, a token reads it; private: without a token it is not there."""

    def commit(self, revision: str) -> str | None:
        """Commit of a branch or tag, or the commit itself; None when there is no such revision."""
        commits = {name: self._hash(files) for name, files in self.revisions.items()}
        return commits.get(revision) or (revision if revision in commits.values() else None)

    def files(self, commit: str) -> dict[str, bytes]:
        return next(files for files in self.revisions.values() if self._hash(files) == commit)

    @staticmethod
    def _hash(files: dict[str, bytes]) -> str:
        return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


@dataclass
class StandIn:
    """What the server serves, how it misbehaves, and what it was asked."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    """Plain files by path, as `/files/a.parquet`."""
    cuts: int = 0
    """So many of the next answers with content break off after half of their bytes."""
    statuses: list[int] = field(default_factory=list)
    """Statuses with which the next requests are refused, whatever they ask for."""
    has_parts: bool = True
    """Whether parts of files are sent when they are asked for."""
    uploads: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Model repositories that clients created: their files by path."""
    asked: list[str] = field(default_factory=list)
    """`METHOD path` of each request, in order."""


@contextmanager
def serving() -> Iterator[StandIn]:
    """A stand-in that answers until the block ends."""
    state = StandIn()
    handler = type("Handler", (_Handler,), {"state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Refused(Exception):
    def __init__(self, status: int, code: str = "") -> None:
        super().__init__(status)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    state: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.state.asked.append(f"{self.command} {self.path}")
        try:
            if self.state.statuses:
                raise _Refused(self.state.statuses.pop(0))
            path = unquote(urlsplit(self.path).path)
            if path in self.state.files:
                if self.headers.get("Authorization"):
                    raise _Refused(400)  # a token is no business of the host that only stores files
                self._send_file(self.state.files[path])
            elif match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/(.+))?", path):
                self._api(match[1], match[2] or "revision", match[3] or "main", body)
            elif match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self._resolve(match[1], match[2], match[3])
            elif match := re.fullmatch(r"/api/(repos/create|validate-yaml)|/storage/(\w+)", path):
                self._create(match[1] or match[2], body)
            elif match := re.fullmatch(
                r"/(?:api/models/)?([^/]+/[^/.]+)(?:\.git/info/lfs/objects)?/(\w+)(?:/\w+)?", path
            ):
                self._upload(match[1], match[2], body)
            else:
                raise _Refused(404)
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code} if refused.code else {}
            self._send(refused.status, b"{}", headers)

    def _create(self, what: str, body: bytes) -> None:
        """A new repository, metadata to check, or the content of a large file."""
        if what == "validate-yaml":
            return self._send_json({"errors": [], "warnings": []})
        if what != "repos/create":
            self.state.files[f"/storage/{what}"] = body
            return self._send(200, b"", {})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise _Refused(401)
        asked = json.loads(body)
        name = f"{asked.get('organization')}/{asked['name']}"
        self.state.uploads.setdefault(name, {})
        self._send_json({"url": f"{self.state.url}/{name}", "id": name})

    def _upload(self, name: str, what: str, body: bytes) -> None:
        """The steps of a commit: how each file is sent, where large ones go, and the commit itself."""
        files = self.state.uploads[name]
        if what == "preupload":
            modes = [{"path": each["path"], "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                      "shouldIgnore": False} for each in json.loads(body)["files"]]  # fmt: skip
            return self._send_json({"files": modes})
        if what == "batch":
            objects = [{"oid": each["oid"], "size": each["size"],
                        "actions": {"upload": {"href": f"{self.state.url}/storage/{each['oid']}"}}}
                       for each in json.loads(body)["objects"]]  # fmt: skip
            return self._send_json({"transfer": "basic", "objects": objects})
        if what != "commit":
            raise _Refused(404)
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.state.files[f"/storage/{line['value']['oid']}"]
        commit = hashlib.sha1(body).hexdigest()
        self._send_json({"success": True, "commitOid": commit, "commitUrl": f"{self.state.url}/{name}/commit/{commit}"})

    def _repository(self, name: str, *, content: bool) -> Repository:
        repository = self.state.repositories.get(name)
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository.access == "private" and not known):
            raise _Refused(404, "RepoNotFound") if known else _Refused(401)
        if repository.access == "gated" and content and not known:
            raise _Refused(403 if self.headers.get("Authorization") else 401, "GatedRepo")
        return repository

    def _commit(self, repository: Repository, revision: str) -> str:
        commit = repository.commit(revision)
        if commit is None:
            raise _Refused(404, "RevisionNotFound")
        return commit

    def _api(self, name: str, what: str, rest: str, body: bytes) -> None:
        repository = self._repository(name, content=False)
        revision, _, folder = rest.partition("/") if not rest.startswith("refs/") else (rest, "", "")
        commit = self._commit(repository, revision)
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in sorted(repository.files(commit).items())
        ]
        if what == "revision":
            return self._send_json({"id": name, "sha": commit, "private": False, "gated": False, "siblings": []})
        if what == "paths-info":
            asked = parse_qs(body.decode()).get("paths") or json.loads(body or b"{}").get("paths", [])
            return self._send_json([entry for entry in entries if entry["path"] in asked])
        return self._tree(entries, folder)

    def _tree(self, entries: list[dict[str, Any]], folder: str) -> None:
        query = parse_qs(urlsplit(self.path).query)
        start = f"{folder}/" if folder else ""
        below = [entry for entry in entries if entry["path"].startswith(start)]
        if query.get("recursive", ["False"])[0].lower() != "true":
            folders = sorted({start + entry["path"][len(start) :].split("/")[0] for entry in below
                              if "/" in entry["path"][len(start) :]})  # fmt: skip
            below = [entry for entry in below if "/" not in entry["path"][len(start) :]]
            below += [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in folders]
        if folder and not below:
            raise _Refused(404, "EntryNotFound")
        place = int(query.get("cursor", ["0"])[0])
        headers = {}
        if place + _PAGE < len(below):
            plain = self.path.partition("&cursor=")[0]
            mark = "&" if "?" in plain else "?"
            headers["Link"] = f'<{self.state.url}{plain}{mark}cursor={place + _PAGE}>; rel="next"'
        self._send_json(below[place : place + _PAGE], headers)

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repository = self._repository(name, content=True)
        commit = self._commit(repository, revision)
        content = repository.files(commit).get(path)
        if content is None:
            raise _Refused(404, "EntryNotFound")
        etag = hashlib.sha256(content).hexdigest()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}
        if path.endswith((".md", ".gitattributes")):  # kept in git; the others lie on another host, with a redirect
            return self._send_file(content, headers)
        place = f"/storage/{etag}"
        self.state.files[place] = content
        other_host = self.state.url.replace("127.0.0.1", "localhost")
        linked = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content)), "Location": other_host + place}
        self._send(302, b"", {**headers, **linked})

    def _send_file(self, content: bytes, headers: dict[str, str] | None = None) -> None:
        """The content or the part of it that was asked for."""
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', **(headers or {})}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if self.state.has_parts:
            headers["Accept-Ranges"] = "bytes"
        if asked is None or not self.state.has_parts:
            return self._send(200, content, headers, cuttable=True)
        start, end = int(asked[1]), min(int(asked[2] or len(content)) + 1, len(content))
        if start >= len(content):
            raise _Refused(416)
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        self._send(206, content[start:end], headers, cuttable=True)

    def _send_json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str], *, cuttable: bool = False) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if cuttable and self.state.cuts and len(body) > 1:
            self.state.cuts -= 1
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        self.wfile.write(body)
