"""A proxy before a real vLLM that does what no proxy should: it swallows updates, or asks for another model."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

Rewrite = Callable[[dict[str, Any]], dict[str, Any]]


def untouched(body: dict[str, Any]) -> dict[str, Any]:
    return body


class Proxy:
    """Passes everything on, but for what its attributes say; they may change while it runs.

    Attributes:
        swallows: paths that are answered with 200 and not passed on; `swallows_methods`: calls of workers likewise.
        asks, answers: what becomes of the body of a completion's request, and of its answer.
        port: where it listens.
    """

    def __init__(self, url: str, port: int = 0) -> None:
        self.swallows: frozenset[str] = frozenset()
        self.swallows_methods: frozenset[str] = frozenset()
        self.asks: Rewrite = untouched
        self.answers: Rewrite = untouched
        self._server = ThreadingHTTPServer(("127.0.0.1", port), _handler(self, urlsplit(url).netloc))
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(proxy: Proxy, target: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._pass_on(None)

        def do_POST(self) -> None:
            self._pass_on(self.rfile.read(int(self.headers["Content-Length"])))

        def _pass_on(self, body: bytes | None) -> None:
            if self.path in proxy.swallows or (
                self.path == "/collective_rpc" and json.loads(body or b"{}")["method"] in proxy.swallows_methods
            ):
                self._reply(200, b'{"results": [null]}')
                return
            completion = body is not None and self.path == "/v1/completions"
            if completion:
                body = json.dumps(proxy.asks(json.loads(body or b"{}"))).encode()
            connection = http.client.HTTPConnection(target, timeout=120)
            connection.request(self.command, self.path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = answer.read()
            if completion and answer.status == 200:
                content = json.dumps(proxy.answers(json.loads(content))).encode()
            self._reply(answer.status, content)

        def _reply(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with suppress(ConnectionError):  # who asked may have gone
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Nothing is printed."""

    return Handler
