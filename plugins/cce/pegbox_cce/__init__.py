"""Log-probabilities of a linear head by a fused kernel: logits are in memory by chunks, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pegbox.events import Event, RunBegins, RunStarted
from pegbox.hooks import Stage, hookimpl
from pegbox.types import ConfigSection

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model, ModulePatch


class CcePlugin:
    """Patches the slot `head`; learns from the loss what gradients to expect."""

    def __init__(self) -> None:
        from pegbox_cce.expected import Expected

        self.expected = Expected()

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_cce.config import CceConfig

        return ConfigSection(schema=CceConfig)

    @hookimpl
    def patch_modules(self, ctx: Context, model: Model, stage: Stage) -> Sequence[ModulePatch]:
        from pegbox_cce.config import CceConfig
        from pegbox_cce.head import patches
        from pegbox_cce.projection import require_plain

        if stage == "adapted":
            require_plain(model, ctx.section(CceConfig))
        return patches(ctx.section(CceConfig), self.expected) if stage == "base" else []

    @hookimpl
    def on_event(self, ctx: Context, event: Event) -> None:
        from pegbox_cce.config import CceConfig
        from pegbox_cce.requirements import require_library, require_served

        if isinstance(event, RunBegins):
            require_library(ctx.section(CceConfig).implementation)
        if isinstance(event, RunStarted):
            require_served(ctx.section(CceConfig).implementation, event.job.loss, ctx.runtime.precision)
            self.expected.learn(event.job.loss)
