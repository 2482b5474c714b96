"""A hub on this machine: the few addresses that a login and a push use, and what they received."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


class LocalHub(ThreadingHTTPServer):
    """Knows the user `me` by the token `good`.

    Attributes:
        files: what was committed, by repository, branch and path.
        created: bodies of requests that made repositories.
        refuse_commits: answer 403 to a commit.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[tuple[str, str, str], bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.branches: list[str] = []
        self.requests: list[str] = []
        self.refuse_commits = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: LocalHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._body()
        if self.headers.get("Authorization") != "Bearer good":
            self._answer(401, {"error": "Invalid credentials"})
        elif self.path == "/api/whoami-v2":
            self._answer(200, {"name": "me", "type": "user", "orgs": [{"name": "us"}], "auth": {}})
        elif self.path.startswith("/api/models/"):
            self._answer(200, {"id": "me/model", "sha": "0" * 40, "private": True, "siblings": []})
        else:
            self._answer(404, {"error": "not here"})

    def do_POST(self) -> None:
        body = self._body()
        parts = self.path.split("?")[0].strip("/").split("/")
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self._answer(200, {"url": f"{self.server.address}/me/model", "id": "me/model", "name": "me/model"})
        elif "branch" in parts:
            self.server.branches.append(parts[-1])
            self._answer(200, {})
        elif "preupload" in parts:
            paths = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            self._answer(200, {"files": files})
        elif "commit" in parts and self.server.refuse_commits:
            self._answer(403, {"error": "not yours"})
        elif "commit" in parts:
            repo, branch = "/".join(parts[2:4]), parts[-1]
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.server.files[repo, branch, value["path"]] = base64.b64decode(value["content"])
            url = f"{self.server.address}/{repo}/commit/{'0' * 40}"
            self._answer(200, {"success": True, "commitOid": "0" * 40, "commitUrl": url})
        else:
            self._answer(200, {})

    def _body(self) -> bytes:
        self.server.requests.append(f"{self.command} {self.path}")
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """The hub, running, and a login for it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "good")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = LocalHub()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
