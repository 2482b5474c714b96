"""torch.compile: kernels generated for the layers of a model, or for the whole of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pegbox.events import Event, RunBegins, RunStarted
from pegbox.hooks import Stage, hookimpl
from pegbox.types import ConfigSection

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model, ModulePatch


class CompilePlugin:
    """Patches layers, or the network around them, at the stage `compile`."""

    _asked = False

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_compile.config import CompileConfig

        return ConfigSection(schema=CompileConfig)

    @hookimpl
    def on_event(self, ctx: Context, event: Event) -> None:
        """Compare options with those torch has before anything is read; later, see that a model was compiled."""
        if isinstance(event, RunBegins):
            from pegbox_compile.config import CompileConfig
            from pegbox_compile.patching import check, forget_earlier_runs

            check(ctx.section(CompileConfig))
            forget_earlier_runs()
        elif isinstance(event, RunStarted) and not self._asked:
            from pegbox_compile.config import CompileConfig
            from pegbox_compile.patching import no_model

            raise no_model(ctx.section(CompileConfig))

    @hookimpl
    def patch_modules(self, ctx: Context, model: Model, stage: Stage) -> Sequence[ModulePatch]:
        from pegbox_compile.config import CompileConfig

        config = ctx.section(CompileConfig)
        if stage != "compile" or model.role not in config.roles:
            return []
        from pegbox_compile.patching import patches

        self._asked = True
        return patches(config, model)
