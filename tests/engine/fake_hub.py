"""A small Hub on loopback: what huggingface_hub asks for, for folders of this machine."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee00" * 5
ERRORS = {
    "gated": (403, "GatedRepo", "Access to this repository is restricted"),
    "repository": (404, "RepoNotFound", "Repository Not Found"),
    "revision": (404, "RevisionNotFound", "Invalid rev id"),
    "file": (404, "EntryNotFound", "Entry not found"),
}


@dataclass
class FakeHub:
    """Repositories by name, and what was asked for."""

    url: str = ""
    folders: dict[str, Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    revisions: tuple[str, ...] = ("main", "v1", COMMIT)
    cut_once: str = ""
    """The first answer with this file ends half way, as if the line were cut."""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """(method, path, Range header)."""

    def downloads(self) -> list[str]:
        """Names of the files that were fetched."""
        return [
            path.partition(f"/resolve/{COMMIT}/")[2] for method, path, _ in self.requests if method == "GET"
        ]


@contextmanager
def serve() -> Iterator[FakeHub]:
    """A running fake Hub."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        match = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+)/(revision|tree|resolve)/([^/]+)/?(.*)", path)
        repository, kind, revision, file = match.groups() if match else ("", "", "", "")
        folder = self.hub.folders.get(repository)
        if repository in self.hub.gated:
            self._error("gated")
        elif folder is None:
            self._error("repository")
        elif revision not in self.hub.revisions:
            self._error("revision")
        elif kind == "revision":
            self._json({"id": repository, "modelId": repository, "sha": COMMIT, "siblings": []})
        elif kind == "tree":
            self._json(_tree(folder))
        elif not (folder / file).is_file():
            self._error("file")
        else:
            self._file(folder / file)

    def _json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _error(self, name: str) -> None:
        status, code, message = ERRORS[name]
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _file(self, path: Path) -> None:
        body = path.read_bytes()
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        self.send_response(206 if match else 200)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body) - start))
        if match:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        if self.command != "GET":
            return
        if self.hub.cut_once and path.as_posix().endswith(self.hub.cut_once):
            self.hub.cut_once = ""
            self.wfile.write(body[start : len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.wfile.write(body[start:])


def _tree(folder: Path) -> list[dict[str, Any]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        {
            "type": "file",
            "path": path.relative_to(folder).as_posix(),
            "size": path.stat().st_size,
            "oid": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in paths
    ]
