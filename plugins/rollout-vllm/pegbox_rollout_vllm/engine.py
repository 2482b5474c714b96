"""The engine of one run: it keeps a server's weights those of the trainer, and asks it for completions.

    open        start a server, or find the one that exists                              connection.py, server.py
    sync        export the weights, the first time also disturbed ones                   canary.py
                give them to the server, and read back what it holds                     weights.py, checksums.py
                its log-probabilities of fixed probes must be the trainer's              probes.py
    generate    ask for the completions of each prompt                                   sampler.py, asking.py

The first rank speaks with the server, the others get what it got; forwards and exports are those of every rank.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pegbox import hooks
from pegbox.errors import PluginError, RunError
from pegbox.rollouts import Rollout, RolloutBatch, RolloutRequest, SyncReceipt, WeightUpdate
from pegbox.types import ExportRequest

from pegbox_rollout_vllm.asking import Completion, require_processed, score_body, scores, single_body
from pegbox_rollout_vllm.canary import disturbed
from pegbox_rollout_vllm.client import Refused
from pegbox_rollout_vllm.config import RolloutVllmConfig
from pegbox_rollout_vllm.connection import Connection
from pegbox_rollout_vllm.options import shape_of
from pegbox_rollout_vllm.probes import difference, draw, tolerance, trainer_logps
from pegbox_rollout_vllm.sampler import Sampler, require_room, stop_ids
from pegbox_rollout_vllm.server import OwnServer
from pegbox_rollout_vllm.weights import Kind, Sent, Weights, versioned_name

if TYPE_CHECKING:
    from pegbox.context import Context, Phase
    from pegbox.types import Model

T = TypeVar("T")
SAME = 1e-6
"""Two answers of one server with the same weights differ by no more, in nats."""


def opened(engine: VllmEngine | None) -> VllmEngine:
    """The engine, which must be there."""
    if engine is None:
        raise PluginError(
            "rollout-vllm was asked before the run had started",
            "It needs the model that is trained.",
            "Ask after the event RunStarted.",
        )
    return engine


class VllmEngine:
    """See the module. Made when the run has started; closed by the run's exit stack."""

    def __init__(self, ctx: Context, model: Model) -> None:
        self._ctx, self._model = ctx, model
        self._config = ctx.section(RolloutVllmConfig)
        self._speaks = ctx.runtime.rank == 0
        self._probes = draw(ctx, model)
        self._tolerance = tolerance(ctx, self._config.tolerance, self._config.dtype)
        folder = Path(self._config.weights) if self._config.weights else ctx.folder / "vllm" / "weights"
        self._folder = folder.absolute()
        server = None
        if self._config.url is None:
            log = ctx.folder / "vllm" / "server.log"
            server = OwnServer(self._config, shape_of(model), ctx.runtime.precision, log)
        self._connection = Connection(self._config, server, ctx.log)
        self._weights = Weights(self._connection)
        self._sent: Sent | None = None
        self._seen: list[float] | None = None

    # ---- the server ----

    def open(self) -> None:
        """Start the server; nobody waits for it before the first sync."""
        if not self._speaks:
            return
        if self._config.sleep:
            self._ctx.phase_observers.append(self._on_phase)
        self._ctx.exit.callback(self._close)
        self._connection.start()

    def _close(self) -> None:
        if not self._connection.own:
            self._weights.leave()
        self._connection.close()
        for folder in self._folder.glob("pegbox-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _on_phase(self, phase: Phase) -> None:
        """Sleep while the run learns; what needs the server wakes it."""
        if phase == "learn":
            self._connection.sleep()

    # ---- weights ----

    def sync(self, update: WeightUpdate) -> SyncReceipt:
        """Bring the server to the model's weights, and prove that it computes with them.

        Raises:
            RunError: the server does not take them, or keeps others.
        """
        self._require_kind(update.kind)
        first = self._sent is None
        if first:
            self._meet(update.kind)
            if self._config.canary:
                with disturbed(self._ctx, self._model, self._probes, self._tolerance) as expected:
                    self._send(update, "canary", None, *expected)
        logps = trainer_logps(self._ctx, self._model, self._probes)
        evidence = self._send(update, f"v{update.version}", update.folder, logps, self._tolerance)
        if first and self._config.canary:
            evidence += "; a canary was seen before"
        return SyncReceipt(engine="rollout-vllm", version=update.version, evidence=evidence)

    def _require_kind(self, kind: Kind) -> None:
        if (kind == "adapter") is not (self._model.adapter is not None):
            raise RunError(
                f"rollout-vllm was given an update of kind '{kind}', the model "
                + ("has an adapter" if self._model.adapter else "has no adapter"),
                "What is exported and what is served must be one thing.",
                "Send updates of the kind 'adapter' for a model with an adapter, else 'full'.",
            )

    def _meet(self, kind: Kind) -> None:
        """First contact. With an adapter the server's base must be the base of the model that is trained."""
        ours = None
        if kind == "adapter" and self._model.without_adapter is not None:
            with self._model.without_adapter():
                ours = trainer_logps(self._ctx, self._model, self._probes)

        def meet() -> None:
            self._connection.reach()
            self._seen = self._ask_probes(None)
            single = single_body(self._connection.base, self._probes[0])
            require_processed(self._connection.client.post("/v1/completions", single))
            if ours is not None and (apart := difference(ours, self._seen)) > self._tolerance:
                raise self._other_base(f"its log-probabilities are {apart:.3g} nats from those of {self._model.base}")

        self._on_first(lambda: self._connection.persist(meet, self._restore))

    def _other_base(self, seen: str) -> RunError:
        return RunError(
            f"the vLLM server at {self._connection.client.url} serves another base model than the one that is trained: "
            f"{seen}",
            f"On the probes {self._tolerance:g} nats are allowed in the mean (rollout-vllm.tolerance).",
            f"Start it with {self._model.base}.",
        )

    def _send(
        self, update: WeightUpdate, label: str, ready: Path | None, expected: list[float], tolerance: float
    ) -> str:
        """Export (unless a folder is `ready`), put, look; the evidence. The folder before is removed."""
        folder = ready or self._export(label)

        def sent(name: str, place: Path) -> Sent:
            return Sent(
                version=update.version,
                kind=update.kind,
                name=name,
                folder=place.absolute(),
                expected=tuple(expected),
                tolerance=tolerance,
            )

        def send() -> str:
            name = versioned_name(folder, label)
            new = sent(name, folder if ready else _renamed(folder, name))
            evidence = self._connection.persist(lambda: self._put(new), self._restore)
            older, self._sent = self._sent, new
            if older is not None and older.folder != new.folder and older.folder.parent == self._folder:
                shutil.rmtree(older.folder)
            return evidence

        evidence = self._on_first(send)
        if not self._speaks:
            self._sent = sent("", folder)
        return evidence

    def _export(self, label: str) -> Path:
        """Write the weights as a checkpoint; every rank takes part, the first writes."""
        folder = self._folder / f"pegbox-part-{label}"
        if self._speaks:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        self._ctx.runtime.barrier()
        model = self._model
        request = ExportRequest(folder=folder, format=model.adapter or model.format)
        self._ctx.call(hooks.export_model, self._ctx, model, request)
        self._ctx.runtime.barrier()
        return folder

    def _put(self, sent: Sent) -> str:
        """Give the server weights; it must then compute what the trainer computed. The evidence."""
        self._connection.wake()
        self._weights.put(sent)
        seen, before = self._ask_probes(sent), self._seen
        apart = difference(seen, sent.expected)
        if apart > sent.tolerance:
            kept = before is not None and difference(seen, before) <= SAME
            what = "keeps its old weights" if kept else "computes with other weights than it was given"
            raise RunError(
                f"the vLLM server {what}: after {sent.name} its log-probabilities of the probes are {apart:.3g} nats "
                f"from the trainer's, {sent.tolerance:.3g} are allowed",
                "It said that it took the update, and did not apply it."
                if kept
                else "It serves another base model, or model and server compute differently.",
                "Start it anew with the model that is trained, and let nothing stand between run and server.",
            )
        evidence = self._weights.evidence(sent)
        self._weights.forget_older(sent)
        self._seen = seen
        return f"{evidence}; log-probabilities of {len(seen)} probe tokens within {apart:.2g} of the trainer's"

    def _restore(self) -> None:
        """Give a server that was started again what the one before it held."""
        self._seen = None
        if self._sent is not None:
            self._put(self._sent)

    def _ask_probes(self, sent: Sent | None) -> list[float]:
        """The server's log-probabilities of the probes."""
        name = self._weights.served(sent)
        found: list[float] = []
        for tokens in self._probes:
            try:
                answer = self._connection.client.post("/v1/completions", score_body(name, tokens))
            except Refused as error:
                if "vocabulary" in error.message:
                    raise self._other_base(f"a token of ours is not in its vocabulary ({error.message})") from error
                if error.status == 404:
                    raise RunError(
                        f"the vLLM server said that it took '{name}', and does not know it: {error.message}",
                        "It keeps its old weights.",
                        "Let nothing stand between run and server; look at the server's log.",
                    ) from error
                raise
            found += scores(answer, name, tokens)
        return found

    # ---- completions ----

    def generate(self, request: RolloutRequest) -> RolloutBatch:
        """Completions of every prompt, sampled with the weights of the last sync.

        Raises:
            RunError: the server is gone for good, refuses, or answers with other weights.
        """
        if self._sent is None:
            raise PluginError(
                "rollout-vllm was asked for completions before weights were synced",
                "The server would sample with the base model.",
                "Call sync_weights first.",
            )
        version = self._sent.version
        made = self._on_first(lambda: self._complete(request))
        rollouts = [
            Rollout(
                prompt=prompt,
                completion=completion.tokens,
                logps=completion.logps,
                first_version=version,
                last_version=version,
                finished=completion.finished,
                columns=columns,
            )
            for prompt, columns, samples in zip(request.prompts, request.columns, made, strict=True)
            for completion in samples
        ]
        return RolloutBatch(rollouts=tuple(rollouts), samples=request.samples)

    def _complete(self, request: RolloutRequest) -> list[list[Completion]]:
        """What the server makes of each prompt; after its death what is missing is asked again."""
        require_room(request, self._connection.longest)
        sampler = Sampler(request, stop_ids(self._ctx, self._model, request), self._config.parallel)

        def ask() -> None:
            assert self._sent is not None, "the caller looked"
            self._connection.wake()
            sampler.ask(self._connection.client, self._weights.served(self._sent))
            self._weights.require_untouched(self._sent)

        self._connection.persist(ask, self._restore)
        return [sampler.made[index] for index in range(len(request.prompts))]

    def _on_first(self, work: Callable[[], T]) -> T:
        """Do it on the first rank; every rank gets its result or its error."""
        result: object = None
        if self._speaks:
            try:
                result = work()
            except Exception as error:
                if self._ctx.runtime.world_size == 1:
                    raise
                result = error
        if self._ctx.runtime.world_size > 1:
            result = self._ctx.runtime.gather_objects(result)[0]
        if isinstance(result, Exception):
            raise result
        return result  # type: ignore[return-value]


def _renamed(folder: Path, name: str) -> Path:
    """The folder under a final name; weights that are there already are the same ones."""
    place = folder.with_name(name)
    if place.is_dir():
        shutil.rmtree(folder)
        return place
    return folder.rename(place)
