"""Rollouts from vLLM: a server of the run's own, one that exists, or in this process; every update is proven."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pegbox.events import Event, RunBegins, RunStarted
from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.rollouts import RolloutBatch, RolloutRequest, SyncReceipt, WeightUpdate

    from pegbox_rollout_vllm.engine import VllmEngine


class RolloutVllmPlugin:
    """Owns `generate_rollouts` and implements `sync_weights`; the engine is there from the event RunStarted on."""

    def __init__(self) -> None:
        self._engine: VllmEngine | None = None

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_rollout_vllm.config import RolloutVllmConfig

        return ConfigSection(schema=RolloutVllmConfig)

    @hookimpl
    def on_event(self, ctx: Context, event: Event) -> None:
        if isinstance(event, RunBegins):
            from pegbox_rollout_vllm.config import RolloutVllmConfig
            from pegbox_rollout_vllm.options import require_usable

            require_usable(ctx.section(RolloutVllmConfig))
        if isinstance(event, RunStarted):
            from pegbox_rollout_vllm.engine import VllmEngine

            self._engine = VllmEngine(ctx, event.job.model)
            self._engine.open()

    @hookimpl
    def sync_weights(self, ctx: Context, update: WeightUpdate) -> SyncReceipt:
        from pegbox_rollout_vllm.engine import opened

        return opened(self._engine).sync(update)

    @hookimpl
    def generate_rollouts(self, ctx: Context, request: RolloutRequest) -> RolloutBatch:
        from pegbox_rollout_vllm.engine import opened

        return opened(self._engine).generate(request)
