"""Giving weights to a vLLM, and its word for it: the names it lists, the checksums its workers give.

An adapter is loaded under a name of its own, `pegbox-<digest>-v<version>`, and every answer names it. Full weights take
the place of the base model's: read from a folder, by broadcast, or in place (see `routes.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pegbox.errors import RunError
from pegbox.record import Record

from pegbox_rollout_vllm.cargo import Cargo, Deliver, Folder
from pegbox_rollout_vllm.checksums import Readable, readable, require_equal

if TYPE_CHECKING:
    from pegbox_rollout_vllm.serving import Vllm

Kind = Literal["adapter", "full"]


class Sent(Record):
    """Weights that vLLM was given, and what the trainer computed with them.

    Attributes:
        name: the adapter's name; for full weights the label of the version.
        expected: the trainer's log-probabilities of the probes, and `tolerance`, how far vLLM's mean may be off.
    """

    version: int
    kind: Kind
    name: str
    cargo: Cargo
    expected: tuple[float, ...]
    tolerance: float


class Weights:
    """The weights of one vLLM: what it was given, and what it says about it."""

    def __init__(self, vllm: Vllm, deliver: Deliver) -> None:
        self._vllm, self._deliver = vllm, deliver
        self._readable: dict[str, Readable] | None = None
        self._loaded: tuple[int, str] | None = None
        self._left: set[str] = set()
        self._replaced = False

    def served(self, sent: Sent | None) -> str:
        """The name to ask for."""
        return sent.name if sent is not None and sent.kind == "adapter" else self._vllm.base

    def put(self, sent: Sent) -> None:
        """Give it to vLLM.

        Raises:
            RunError: it refuses, or was sent something else than it says.
            ConfigError: the server was not started for updates.
        """
        if sent.kind == "adapter":
            self._load_adapter(sent)
            return
        self._replaced = True
        self._deliver(sent.name, sent.cargo)
        self._vllm.settle(sent.name)

    def _load_adapter(self, sent: Sent) -> None:
        assert isinstance(sent.cargo, Folder), "adapters are exported"
        if self._loaded == (self._vllm.met, sent.name):
            return
        if sent.name in self._vllm.adapters():
            self._vllm.unload_adapter(sent.name)
        self._left.add(sent.name)
        self._vllm.load_adapter(sent.name, sent.cargo.path)
        listed = self._vllm.adapters().get(sent.name)
        if listed != str(sent.cargo.path):
            raise RunError(
                f"{self._vllm.title} said that it loaded '{sent.name}', but lists "
                + ("no such adapter" if listed is None else f"{listed} under that name"),
                "It keeps its old weights.",
                "Look at the server's log, and at what stands between the run and the server.",
            )

    def forget_older(self, sent: Sent) -> None:
        """Unload the adapter before this one."""
        now = (self._vllm.met, sent.name)
        if sent.kind != "adapter" or now == self._loaded:
            return
        if self._loaded is not None and self._loaded[0] == self._vllm.met:
            self._vllm.unload_adapter(self._loaded[1])
            self._left.discard(self._loaded[1])
        self._loaded = now

    def leave(self) -> None:
        """Leave a vLLM that goes on without the run as it was found."""
        for name in self._left & set(self._vllm.adapters()) if self._left else ():
            self._vllm.unload_adapter(name)
        if self._replaced:
            self._vllm.read_base()

    def evidence(self, sent: Sent) -> str:
        """Read back what vLLM holds, once the probes agree.

        Raises:
            RunError: a checksum says otherwise.
        """
        if sent.kind == "adapter":
            return f"adapter {sent.name} is listed and answers under its name"
        checksums = self._vllm.checksums()
        if checksums is None:
            return "this vLLM gives no checksums"
        if self._readable is None:
            self._readable = readable(checksums, sent.cargo)
        require_equal(checksums, sent.cargo, self._readable, sent.name)
        return f"{len(self._readable)} of {len(checksums)} parameters of the workers read back with our checksums"

    def require_untouched(self, sent: Sent) -> None:
        """After completions were made: vLLM still says that it holds this version.

        Raises:
            RunError: it was restarted, or somebody else changed its weights.
        """
        if sent.kind == "adapter":
            return
        label = self._vllm.label()
        if label is not None and label != sent.name:
            raise RunError(
                f"{self._vllm.title} says its weights are '{label}', it was given '{sent.name}'",
                "It was restarted, or somebody else sent it weights while completions were made.",
                "Let nothing but this run update the server.",
            )
