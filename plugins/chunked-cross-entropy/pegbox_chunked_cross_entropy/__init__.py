"""Log-probabilities in chunks: the logits of a whole batch are never in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pegbox.events import Event, RunStarted
from pegbox.hooks import Stage, hookimpl
from pegbox.types import ConfigSection

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model, ModulePatch


class ChunkedCrossEntropyPlugin:
    """Patches the slot `head`."""

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_chunked_cross_entropy.config import ChunkedCrossEntropyConfig

        return ConfigSection(schema=ChunkedCrossEntropyConfig)

    @hookimpl
    def patch_modules(self, ctx: Context, model: Model, stage: Stage) -> Sequence[ModulePatch]:
        if stage != "base":
            return []
        from pegbox_chunked_cross_entropy.config import ChunkedCrossEntropyConfig
        from pegbox_chunked_cross_entropy.head import patches

        return patches(ctx.section(ChunkedCrossEntropyConfig))

    @hookimpl
    def on_event(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            from pegbox_chunked_cross_entropy.head import require_chunks

            require_chunks(event.job.loss)
