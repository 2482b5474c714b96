"""torch.compile: kernels generated for the layers of a model, or for the whole of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pegbox.events import Event, RunBegins
from pegbox.hooks import Stage, hookimpl
from pegbox.types import ConfigSection

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model, ModulePatch


class CompilePlugin:
    """Patches layers, or the network around them, at the stage `compile`."""

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_compile.config import CompileConfig

        return ConfigSection(schema=CompileConfig)

    @hookimpl
    def on_event(self, ctx: Context, event: Event) -> None:
        """Compare options with those torch has before anything is read."""
        if isinstance(event, RunBegins):
            from pegbox_compile.config import CompileConfig
            from pegbox_compile.patching import check

            check(ctx.section(CompileConfig))

    @hookimpl
    def patch_modules(self, ctx: Context, model: Model, stage: Stage) -> Sequence[ModulePatch]:
        from pegbox_compile.config import CompileConfig

        config = ctx.section(CompileConfig)
        if stage != "compile" or model.role not in config.roles:
            return []
        from pegbox_compile.patching import patches

        return patches(config, model)
