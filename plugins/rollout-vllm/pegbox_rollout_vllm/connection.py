"""The way to a server: one that exists, or one that the run starts, and starts again after its death."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from pegbox.errors import ConfigError, PegboxError, RunError

from pegbox_rollout_vllm.client import Client, Refused, ServerGone
from pegbox_rollout_vllm.options import SERVED

if TYPE_CHECKING:
    import logging

    from pegbox_rollout_vllm.config import RolloutVllmConfig
    from pegbox_rollout_vllm.server import OwnServer

T = TypeVar("T")
EXISTING_S = 10.0
"""A server that exists answers within this time, or it is not there."""


class Connection:
    """See the module.

    Attributes:
        client: what to ask with; another one after a restart.
        base: the name under which the server serves the base model, and `root`, where it was loaded from.
        longest: tokens of a prompt and its completion together, at most; None: the server does not say.
        met: how often a server was reached anew.
    """

    def __init__(self, config: RolloutVllmConfig, server: OwnServer | None, log: logging.Logger) -> None:
        self._config, self._server, self._log = config, server, log
        self._restarts = config.restarts
        self._asleep = False
        self.client = Client(config.url or "", config.request_timeout_s)
        self.base, self.root = SERVED, ""
        self.longest: int | None = None
        self.met = 0

    @property
    def own(self) -> bool:
        """Whether the run started it."""
        return self._server is not None

    def start(self) -> None:
        """Start a server of our own; nobody waits for it."""
        if self._server is not None:
            self._server.start()

    def close(self) -> None:
        self.client.close()
        if self._server is not None:
            self._server.stop()

    def reach(self) -> None:
        """Wait for the server, and learn what it serves.

        Raises:
            RunError: it does not come up.
            ConfigError: it serves no model of the configured name.
        """
        config, server = self._config, self._server
        if server is not None:
            self.client = Client(server.url, config.request_timeout_s)
        patience = config.start_timeout_s if server is not None else min(EXISTING_S, config.start_timeout_s)
        if not self.client.wait(lambda: server is None or server.alive, patience):
            raise self._not_there(patience)
        cards = {str(card["id"]): card for card in self.client.get("/v1/models")["data"] if not card.get("parent")}
        self.base = SERVED if server is not None else config.served_name or next(iter(cards), "")
        if self.base not in cards:
            raise ConfigError(
                f"the vLLM server at {self.client.url} serves no '{self.base}'",
                f"It serves: {', '.join(cards) or 'nothing'}.",
                "Set rollout-vllm.served_name to one of them.",
            )
        self.root = str(cards[self.base].get("root") or "")
        self.longest = cards[self.base].get("max_model_len")
        self.met += 1

    def _not_there(self, waited_s: float) -> RunError:
        server = self._server
        if server is None:
            return RunError(
                f"no vLLM server answers at {self._config.url}",
                f"It was waited for {waited_s:g} s.",
                "Start it, or remove rollout-vllm.url to let the run start one.",
            )
        if not server.alive:
            return server.died("before it was ready")
        return RunError(
            f"the vLLM server was not ready after {waited_s:g} s. Its last lines:\n{server.last_lines()}",
            f"All of its output is in {server.log}.",
            "Set a longer rollout-vllm.start_timeout_s, or mend what it says.",
        )

    def persist(self, work: Callable[[], T], restore: Callable[[], None]) -> T:
        """Do `work`; if the server dies meanwhile, start it again, `restore` what it held, and do the rest of the work.

        Raises:
            RunError: it is somebody else's server, was restarted as often as allowed, or refuses what is asked.
        """
        gone: ServerGone | None = None
        while True:
            try:
                if gone is not None:
                    self._restart(gone)
                    restore()
                return work()
            except ServerGone as error:
                gone = error
            except Refused as error:
                problem = self.refused(error)
                if not isinstance(problem, ServerGone):
                    raise problem from error
                gone = problem

    def refused(self, error: Refused) -> PegboxError | ServerGone:
        """What an error that the server answered with means: an engine that died is a server that is gone."""
        if error.status >= 500 and not self.client.ready():
            return ServerGone(str(error))
        return RunError(
            f"the vLLM server refused {error.path}: {error.message}",
            "It cannot do what the config asks of it.",
            "Change what it names, or look at the server's log.",
        )

    def _restart(self, gone: ServerGone) -> None:
        server = self._server
        if server is None:
            raise RunError(
                f"the vLLM server at {self.client.url} is gone: {gone}",
                "The run did not start it, so it does not restart it. Checkpoints that were saved are complete.",
                "Start it again, then go on from the last checkpoint with resume=auto.",
            ) from gone
        server.stop()
        if self._restarts == 0:
            raise server.died(f"({gone}), and rollout-vllm.restarts allows no further start") from gone
        self._restarts -= 1
        self._log.warning("rollout-vllm: the server is gone (%s); starting it again", gone)
        server.start()
        self._asleep = False
        self.reach()

    def sleep(self) -> None:
        """Let it give its memory back; a server that is gone is seen when it is needed again."""
        if not self._asleep and self.met:
            try:
                self.client.post("/sleep?level=1")
                self._asleep = True
            except ServerGone as gone:
                self._log.warning("rollout-vllm: the server could not be put to sleep: %s", gone)
            except Refused as error:
                problem = self.refused(error)
                if not isinstance(problem, ServerGone):
                    raise problem from error

    def wake(self) -> None:
        if self._asleep:
            self.client.post("/wake_up")
            self._asleep = False
