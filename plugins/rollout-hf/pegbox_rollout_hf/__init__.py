"""Rollouts in process: the policy itself samples completions, with transformers. No second copy of its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pegbox.events import Event, RunStarted
from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.rollouts import RolloutBatch, RolloutRequest, SyncReceipt, WeightUpdate

    from pegbox_rollout_hf.engine import Engine


class RolloutHfPlugin:
    """Owns `generate_rollouts`; its state is the number of requests so far, which unseeded sampling depends on."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._requests = 0

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_rollout_hf.config import RolloutHfConfig

        return ConfigSection(schema=RolloutHfConfig)

    @hookimpl
    def on_event(self, ctx: Context, event: Event) -> None:
        if isinstance(event, RunStarted):
            from pegbox_rollout_hf.config import RolloutHfConfig
            from pegbox_rollout_hf.engine import Engine

            self._engine = Engine(ctx.section(RolloutHfConfig), event.job.model, ctx.processor, ctx.runtime)

    @hookimpl
    def generate_rollouts(self, ctx: Context, request: RolloutRequest) -> RolloutBatch:
        engine, seed = self._ready(), request.sampling.seed
        self._requests += seed is None
        made = ctx.rng("rollout-hf", self._requests).seed if seed is None else seed
        return engine.generate(request, made)

    @hookimpl
    def sync_weights(self, ctx: Context, update: WeightUpdate) -> SyncReceipt:
        return self._ready().sync(update)

    def state_dict(self) -> dict[str, object]:
        return {"requests": self._requests}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self._requests = int(str(state_dict["requests"]))

    def _ready(self) -> Engine:
        from pegbox.errors import RunError

        if self._engine is None:
            raise RunError(
                "rollout-hf was asked before the run has started",
                "It learns the policy from the event RunStarted.",
                "Ask for rollouts, and synchronise weights, after that event.",
            )
        return self._engine
