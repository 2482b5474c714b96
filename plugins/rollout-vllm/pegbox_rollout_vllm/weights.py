"""Sending weights to a server, and its word for it: the names it lists, the checksums its workers give.

An adapter is loaded under a name of its own, `pegbox-<digest>-v<version>`, and every answer names it. Full weights are
read by the workers from a folder, in place.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

from pegbox.errors import ConfigError, RunError
from pegbox.record import Record

from pegbox_rollout_vllm.checksums import Readable, readable, require_equal
from pegbox_rollout_vllm.client import Refused, ServerGone
from pegbox_rollout_vllm.connection import Connection

Kind = Literal["adapter", "full"]


class Sent(Record):
    """Weights that a server was given, and what the trainer computed with them.

    Attributes:
        name: the adapter's name; for full weights the label of the version.
        expected: the trainer's log-probabilities of the probes, and `tolerance`, how far the server's mean may be off.
    """

    version: int
    kind: Kind
    name: str
    folder: Path
    expected: tuple[float, ...]
    tolerance: float


def versioned_name(folder: Path, label: str) -> str:
    """`pegbox-<8 hexadecimal digits of the weights>-<label>`.

    Raises:
        RunError: the folder holds no weights.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise RunError(
            f"{folder} holds no safetensors file",
            "vLLM reads weights from such files.",
            "Use a model and an adapter that are exported as safetensors.",
        )
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return f"pegbox-{digest.hexdigest()[:8]}-{label}"


class Weights:
    """The weights of one server: what it was given, and what it says about it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._readable: dict[str, Readable] | None = None
        self._loaded: tuple[int, str] | None = None
        self._left: set[str] = set()
        self._reloaded = False

    def served(self, sent: Sent | None) -> str:
        """The name to ask for."""
        return sent.name if sent is not None and sent.kind == "adapter" else self._connection.base

    def put(self, sent: Sent) -> None:
        """Give it to the server.

        Raises:
            RunError: the server refuses it.
            ConfigError: the server was not started for updates.
        """
        if sent.kind == "adapter":
            self._load_adapter(sent)
        else:
            self._reload(sent)

    def _load_adapter(self, sent: Sent) -> None:
        if self._loaded == (self._connection.met, sent.name):
            return
        if any(card["id"] == sent.name for card in self._cards()):
            self._connection.client.post("/v1/unload_lora_adapter", {"lora_name": sent.name})
        body = {"lora_name": sent.name, "lora_path": str(sent.folder)}
        self._left.add(sent.name)
        self._told("/v1/load_lora_adapter", body, sent, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora")
        card = next((card for card in self._cards() if card["id"] == sent.name), None)
        if card is None or card.get("root") != str(sent.folder):
            raise RunError(
                f"the vLLM server said that it loaded '{sent.name}', but lists "
                + ("no such adapter" if card is None else f"{card.get('root')} under that name"),
                "It keeps its old weights.",
                "Look at the server's log, and at what stands between the run and the server.",
            )

    def forget_older(self, sent: Sent) -> None:
        """Unload the adapter before this one."""
        now = (self._connection.met, sent.name)
        if sent.kind != "adapter" or now == self._loaded:
            return
        if self._loaded is not None and self._loaded[0] == self._connection.met:
            self._connection.client.post("/v1/unload_lora_adapter", {"lora_name": self._loaded[1]})
            self._left.discard(self._loaded[1])
        self._loaded = now

    def leave(self) -> None:
        """Leave a server that goes on without the run as it was found, if it can still be reached."""
        client = self._connection.client
        try:
            for name in self._left & {card["id"] for card in self._cards()} if self._left else ():
                client.post("/v1/unload_lora_adapter", {"lora_name": name})
            if self._reloaded and self._connection.root:
                body = {"method": "reload_weights", "kwargs": {"weights_path": self._connection.root}}
                client.post("/collective_rpc", body)
                client.post("/reset_prefix_cache")
        except (ServerGone, Refused):
            return

    def _reload(self, sent: Sent) -> None:
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(sent.folder)}}
        self._reloaded = True
        self._told("/collective_rpc", body, sent, "VLLM_SERVER_DEV_MODE=1")
        self._connection.client.post("/reset_prefix_cache")
        self._optional("/update_weight_version", {"new_version": sent.name})

    def _told(self, path: str, body: dict[str, object], sent: Sent, needs: str) -> None:
        try:
            self._connection.client.post(path, body)
        except Refused as error:
            if error.status >= 500 and not self._connection.client.ready():
                raise
            if error.status in (404, 405) and "adapter" not in error.message.lower():
                raise ConfigError(
                    f"the vLLM server at {self._connection.client.url} has no {path}",
                    "It was not started for new weights.",
                    f"Start it with {needs}.",
                ) from error
            raise RunError(
                f"the vLLM server did not take the weights {sent.name} from {sent.folder}: {error.message}",
                "It must see this folder, and the adapter's rank must not be above its --max-lora-rank.",
                "Set rollout-vllm.weights to a folder that run and server share, or look at the server's log.",
            ) from error

    def _optional(self, path: str, body: dict[str, object] | None) -> Any:
        """Ask what not every vLLM knows; None if it does not."""
        try:
            return self._connection.client.post(path, body) if body is not None else self._connection.client.get(path)
        except Refused as error:
            if error.status in (404, 405):
                return None
            raise

    def _cards(self) -> list[dict[str, Any]]:
        """What the server says it serves."""
        return list(self._connection.client.get("/v1/models")["data"])

    def evidence(self, sent: Sent) -> str:
        """Read back what the server holds, once the probes agree.

        Raises:
            RunError: a checksum says otherwise.
        """
        if sent.kind == "adapter":
            return f"adapter {sent.name} is listed and answers under its name"
        answer = self._optional("/weight_checker", {"action": "checksum"})
        if answer is None:
            return "this vLLM gives no checksums"
        checksums = answer["checksums"]
        if self._readable is None:
            self._readable = readable(checksums, sent.folder)
        require_equal(checksums, sent.folder, self._readable, sent.name)
        return f"{len(self._readable)} of {len(checksums)} parameters of the workers read back with our checksums"

    def require_untouched(self, sent: Sent) -> None:
        """After completions were made: the server still says that it holds this version.

        Raises:
            RunError: it was restarted, or somebody else changed its weights.
        """
        if sent.kind == "adapter":
            return
        info = self._optional("/weight_info", None)
        if info is not None and info["weight_version"] != sent.name:
            raise RunError(
                f"the vLLM server says its weights are '{info['weight_version']}', it was given '{sent.name}'",
                "It was restarted, or somebody else sent it weights while completions were made.",
                "Let nothing but this run update the server.",
            )
