"""A vLLM in another process, by HTTP: one that exists, or one that the run starts, and starts again after its death."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pegbox.errors import ConfigError, PegboxError, RunError

from pegbox_rollout_vllm.asking import require_processed, score_body, scores, single_body
from pegbox_rollout_vllm.cargo import Cargo, Folder
from pegbox_rollout_vllm.client import Client, Refused, ServerGone
from pegbox_rollout_vllm.options import SERVED
from pegbox_rollout_vllm.sampler import ask_all
from pegbox_rollout_vllm.serving import UnknownToken

if TYPE_CHECKING:
    import logging

    from pegbox.rollouts import RolloutRequest

    from pegbox_rollout_vllm.asking import Completion
    from pegbox_rollout_vllm.config import RolloutVllmConfig
    from pegbox_rollout_vllm.server import OwnServer

T = TypeVar("T")
EXISTING_S = 10.0
"""A server that exists answers within this time, or it is not there."""


class Connection:
    """See the module, and `serving.Vllm`.

    Attributes:
        client: what to ask with; another one after a restart.
        root: where the server loaded the base model from.
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
        return self._server is not None

    @property
    def title(self) -> str:
        return f"the vLLM server at {self.client.url}"

    def start(self) -> None:
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
                self.client.post(f"/sleep?level={self._config.sleep_level}")
                self._asleep = True
            except ServerGone as gone:
                self._log.warning("rollout-vllm: the server could not be put to sleep: %s", gone)
            except Refused as error:
                problem = self.refused(error)
                if not isinstance(problem, ServerGone):
                    raise problem from error

    def wake(self) -> bool:
        if not self._asleep:
            return False
        self.client.post("/wake_up")
        self._asleep = False
        return self._config.sleep_level == 2

    def complete(
        self, name: str, request: RolloutRequest, stop_ids: Sequence[int], made: dict[int, list[Completion]]
    ) -> None:
        ask_all(self.client, name, request, stop_ids, self._config.parallel, made)

    def score(self, name: str, tokens: Sequence[int]) -> list[float]:
        try:
            answer = self.client.post("/v1/completions", score_body(name, tokens))
        except Refused as error:
            if "vocabulary" in error.message:
                raise UnknownToken(error.message) from error
            if error.status == 404:
                raise RunError(
                    f"the vLLM server said that it took '{name}', and does not know it: {error.message}",
                    "It keeps its old weights.",
                    "Let nothing stand between run and server; look at the server's log.",
                ) from error
            raise
        return scores(answer, name, tokens)

    def require_processed(self, tokens: Sequence[int]) -> None:
        require_processed(self.client.post("/v1/completions", single_body(self.base, tokens)))

    def adapters(self) -> dict[str, str]:
        return {str(card["id"]): str(card.get("root")) for card in self.client.get("/v1/models")["data"]}

    def load_adapter(self, name: str, folder: Path) -> None:
        body = {"lora_name": name, "lora_path": str(folder)}
        needs = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora"
        self.told("/v1/load_lora_adapter", body, f"{name} from {folder}", needs)

    def unload_adapter(self, name: str) -> None:
        self.client.post("/v1/unload_lora_adapter", {"lora_name": name})

    def read_folder(self, name: str, cargo: Cargo) -> None:
        """Full weights by way of a folder: the workers read it in place."""
        assert isinstance(cargo, Folder), "full weights were exported"
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(cargo.path)}}
        self.told("/collective_rpc", body, f"{name} from {cargo.path}", "VLLM_SERVER_DEV_MODE=1")

    def read_base(self) -> None:
        if self.root:
            self.client.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": self.root}})
            self.client.post("/reset_prefix_cache")

    def settle(self, label: str) -> None:
        self.client.post("/reset_prefix_cache")
        self._optional("/update_weight_version", {"new_version": label})

    def label(self) -> str | None:
        info = self._optional("/weight_info", None)
        return None if info is None else str(info["weight_version"])

    def checksums(self) -> dict[str, str] | None:
        answer = self._optional("/weight_checker", {"action": "checksum"})
        return None if answer is None else dict(answer["checksums"])

    def told(self, path: str, body: dict[str, object], what: str, needs: str) -> Any:
        """Tell it to take weights.

        Raises:
            RunError: it does not.
            ConfigError: it was not started for that.
        """
        try:
            return self.client.post(path, body)
        except Refused as error:
            if error.status >= 500 and not self.client.ready():
                raise
            if error.status in (404, 405) and "adapter" not in error.message.lower():
                raise ConfigError(
                    f"the vLLM server at {self.client.url} has no {path}",
                    "It was not started for new weights.",
                    f"Start it with {needs}.",
                ) from error
            raise RunError(
                f"the vLLM server did not take the weights {what}: {error.message}",
                "It must see this folder, and the adapter's rank must not be above its --max-lora-rank.",
                "Set rollout-vllm.weights to a folder that run and server share, or look at the server's log.",
            ) from error

    def _optional(self, path: str, body: dict[str, object] | None) -> Any:
        """Ask what not every vLLM knows; None if it does not."""
        try:
            return self.client.post(path, body) if body is not None else self.client.get(path)
        except Refused as error:
            if error.status in (404, 405):
                return None
            raise
