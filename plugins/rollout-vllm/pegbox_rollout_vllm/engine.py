"""The engine of one run: it keeps a vLLM's weights those of the trainer, and asks it for completions.

    open        start vLLM, or find the server that exists                               routes.py, and what it names
    sync        pack the weights, the first time also disturbed ones                     cargo.py, canary.py
                give them to vLLM, and read back what it holds                           weights.py, checksums.py
                its log-probabilities of fixed probes must be the trainer's              probes.py
    generate    ask for the completions of each prompt                                   sampler.py, asking.py

The first rank speaks with vLLM, the others get what it got; forwards and exports are those of every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pegbox.errors import PluginError, RunError
from pegbox.rollouts import Rollout, RolloutBatch, RolloutRequest, SyncReceipt, WeightUpdate

from pegbox_rollout_vllm.asking import Completion
from pegbox_rollout_vllm.canary import disturbed
from pegbox_rollout_vllm.client import Refused, ServerGone
from pegbox_rollout_vllm.config import RolloutVllmConfig
from pegbox_rollout_vllm.probes import difference, draw, tolerance, trainer_logps
from pegbox_rollout_vllm.routes import route
from pegbox_rollout_vllm.sampler import require_room, stop_ids
from pegbox_rollout_vllm.serving import UnknownToken
from pegbox_rollout_vllm.weights import Kind, Sent, Weights

if TYPE_CHECKING:
    from pegbox.context import Context, Phase
    from pegbox.types import Model

T = TypeVar("T")
SAME = 1e-6
"""Two answers of one vLLM with the same weights differ by no more, in nats."""


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
        self._vllm, self._pack, deliver = route(ctx, model, self._config)
        self._weights = Weights(self._vllm, deliver)
        self._sent: Sent | None = None
        self._seen: list[float] | None = None

    def open(self) -> None:
        """Start it; nobody waits for a server before the first sync."""
        if not self._speaks:
            return
        if self._config.sleep:
            self._ctx.phase_observers.append(self._on_phase)
        self._ctx.exit.callback(self._close)
        self._vllm.start()

    def _close(self) -> None:
        if not self._vllm.own:
            with suppress(ServerGone, Refused):
                self._weights.leave()
        self._vllm.close()

    def _on_phase(self, phase: Phase) -> None:
        """Sleep while the run learns; what needs vLLM wakes it."""
        if phase == "learn":
            self._vllm.sleep()

    def sync(self, update: WeightUpdate) -> SyncReceipt:
        """Bring vLLM to the model's weights, and prove that it computes with them.

        Raises:
            RunError: it does not take them, or keeps others.
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
        """First contact. With an adapter vLLM's base must be the base of the model that is trained."""
        ours = None
        if kind == "adapter" and self._model.without_adapter is not None:
            with self._model.without_adapter():
                ours = trainer_logps(self._ctx, self._model, self._probes)

        def meet() -> None:
            self._vllm.reach()
            self._seen = self._ask_probes(None)
            self._vllm.require_processed(self._probes[0])
            if ours is not None and (apart := difference(ours, self._seen)) > self._tolerance:
                raise self._other_base(f"its log-probabilities are {apart:.3g} nats from those of {self._model.base}")

        self._on_first(lambda: self._vllm.persist(meet, self._forget))

    def _other_base(self, seen: str) -> RunError:
        return RunError(
            f"{self._vllm.title} serves another base model than the one that is trained: {seen}",
            f"On the probes {self._tolerance:g} nats are allowed in the mean (rollout-vllm.tolerance).",
            f"Start it with {self._model.base}.",
        )

    def _send(
        self, update: WeightUpdate, label: str, ready: Path | None, expected: list[float], tolerance: float
    ) -> str:
        """Pack (unless a folder is `ready`), put, look; the evidence. What was sent before is discarded."""
        cargo = self._pack(label, expected, ready)

        def sent(name: str) -> Sent:
            return Sent(
                version=update.version,
                kind=update.kind,
                name=name,
                cargo=cargo,
                expected=tuple(expected),
                tolerance=tolerance,
            )

        def send() -> str:
            new = sent(cargo.seal(label))
            # What it held before need not be restored: this takes its place.
            evidence = self._vllm.persist(lambda: self._put(new), self._forget)
            older, self._sent = self._sent, new
            if older is not None and older.cargo != cargo:
                older.cargo.discard()
            return evidence

        evidence = self._on_first(send)
        if not self._speaks:
            self._sent = sent("")
        return evidence

    def _put(self, sent: Sent) -> str:
        """Give vLLM weights; it must then compute what the trainer computed. The evidence."""
        self._vllm.wake()
        self._weights.put(sent)
        seen, before = self._ask_probes(sent), self._seen
        apart = difference(seen, sent.expected)
        if apart > sent.tolerance:
            kept = before is not None and difference(seen, before) <= SAME
            what = "keeps its old weights" if kept else "computes with other weights than it was given"
            raise RunError(
                f"{self._vllm.title} {what}: after {sent.name} its log-probabilities of the probes are {apart:.3g} "
                f"nats from the trainer's, {sent.tolerance:.3g} are allowed",
                "It said that it took the update, and did not apply it."
                if kept
                else "It serves another base model, or trainer and vLLM compute differently.",
                "Start it anew with the model that is trained, and let nothing stand between run and server.",
            )
        evidence = self._weights.evidence(sent)
        self._weights.forget_older(sent)
        self._seen = seen
        return f"{evidence}; log-probabilities of {len(seen)} probe tokens within {apart:.2g} of the trainer's"

    def _forget(self) -> None:
        """It was started again: what it computed before says nothing any more."""
        self._seen = None

    def _restore(self) -> None:
        """Give it again what it has lost."""
        self._forget()
        if self._sent is not None:
            self._put(self._sent)

    def _ask_probes(self, sent: Sent | None) -> list[float]:
        """vLLM's log-probabilities of the probes."""
        name = self._weights.served(sent)
        try:
            return [logp for tokens in self._probes for logp in self._vllm.score(name, tokens)]
        except UnknownToken as error:
            raise self._other_base(f"a token of ours is not in its vocabulary ({error})") from error

    def generate(self, request: RolloutRequest) -> RolloutBatch:
        """Completions of every prompt, sampled with the weights of the last sync.

        Raises:
            RunError: vLLM is gone for good, refuses, or answers with other weights.
        """
        if self._sent is None:
            raise PluginError(
                "rollout-vllm was asked for completions before weights were synced",
                "vLLM would sample with the base model.",
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
        """What vLLM makes of each prompt; after its death what is missing is asked again."""
        require_room(request, self._vllm.longest)
        ends = stop_ids(self._ctx, self._model, request)
        made: dict[int, list[Completion]] = {}

        def ask() -> None:
            assert self._sent is not None, "the caller looked"
            if self._vllm.wake():
                self._restore()
            self._vllm.complete(self._weights.served(self._sent), request, ends, made)
            self._weights.require_untouched(self._sent)

        self._vllm.persist(ask, self._restore)
        return [made[index] for index in range(len(request.prompts))]

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
