"""The Triton kernels of the liger-kernel library, feature by feature, on the instances of one model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pegbox.events import Event, RunBegins
from pegbox.hooks import Stage, hookimpl
from pegbox.types import ConfigSection

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model, ModulePatch


class LigerPlugin:
    """Patches the slots `norm`, `mlp` and `rope` of the model as loaded."""

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_liger.config import LigerConfig

        return ConfigSection(schema=LigerConfig)

    @hookimpl
    def on_event(self, event: Event) -> None:
        if isinstance(event, RunBegins):
            from pegbox_liger.device import require_gpu

            require_gpu()

    @hookimpl
    def patch_modules(self, ctx: Context, model: Model, stage: Stage) -> Sequence[ModulePatch]:
        if stage != "base":
            return []
        from pegbox_liger.patching import patches

        return patches(ctx, model)
