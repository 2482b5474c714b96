"""Speaking with a vLLM server over HTTP, with the standard library."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

READY_EVERY_S = 0.5


class ServerGone(Exception):
    """The server does not answer, or it broke off within an answer."""


class Refused(Exception):
    """The server answered with an error."""

    def __init__(self, path: str, status: int, message: str) -> None:
        self.path, self.status, self.message = path, status, message
        super().__init__(f"{path}: {status} {message}")


class Client:
    """Requests to one server; any thread may ask. `close` breaks off what is under way.

    Args:
        url: `http://host:port`.
        timeout_s: for one answer.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._address = urlsplit(self.url)
        self._open: set[http.client.HTTPConnection] = set()
        self._lock = threading.Lock()

    def get(self, path: str, timeout_s: float | None = None) -> Any:
        return self._ask("GET", path, None, timeout_s)

    def post(self, path: str, body: Mapping[str, object] | None = None, timeout_s: float | None = None) -> Any:
        return self._ask("POST", path, body or {}, timeout_s)

    def ready(self) -> bool:
        """Whether the server answers and its engine lives."""
        try:
            self.get("/health", timeout_s=5.0)
        except (ServerGone, Refused):
            return False
        return True

    def wait(self, alive: Any, timeout_s: float) -> bool:
        """Wait until it is ready; False if `alive()` ended or the time did."""
        limit = time.monotonic() + timeout_s
        while not self.ready():
            if not alive() or time.monotonic() > limit:
                return False
            time.sleep(READY_EVERY_S)
        return True

    def close(self) -> None:
        """Break off every request under way: their threads raise ServerGone."""
        with self._lock:
            under_way, self._open = self._open, set()
        for connection in under_way:
            sock = connection.sock
            if sock is not None:
                try:
                    sock.shutdown(2)
                except OSError:
                    continue

    def _ask(self, method: str, path: str, body: Mapping[str, object] | None, timeout_s: float | None) -> Any:
        kind = http.client.HTTPSConnection if self._address.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._address.netloc, timeout=timeout_s or self._timeout_s)
        with self._lock:
            self._open.add(connection)
        try:
            payload = None if body is None else json.dumps(body).encode()
            connection.request(method, path, payload, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace")
        except TimeoutError as error:
            raise ServerGone(f"{self.url}{path} did not answer within {timeout_s or self._timeout_s:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise ServerGone(f"{self.url}{path}: {error!r}") from error
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()
        if answer.status >= 400:
            raise Refused(path, answer.status, _message(text))
        return _parsed(text)


def _parsed(text: str) -> Any:
    """JSON where it is JSON; the endpoints of adapters answer in plain words."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _message(text: str) -> str:
    found = _parsed(text)
    if isinstance(found, dict):
        found = found.get("error") or found.get("detail") or found
        found = found.get("message", found) if isinstance(found, dict) else found
    return str(found).strip()[:600]
