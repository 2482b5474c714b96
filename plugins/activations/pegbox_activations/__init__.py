"""Gradient checkpointing and activation offload: what is kept between forward and backward, and where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pegbox.hooks import Stage, hookimpl
from pegbox.types import ConfigSection

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model, ModulePatch


class ActivationsPlugin:
    """Patches the decoder layers at the stage `recompute`."""

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_activations.config import ActivationsConfig

        return ConfigSection(schema=ActivationsConfig)

    @hookimpl
    def patch_modules(self, ctx: Context, model: Model, stage: Stage) -> Sequence[ModulePatch]:
        if stage != "recompute" or model.role != "policy":
            return []
        from pegbox_activations.config import ActivationsConfig
        from pegbox_activations.patching import patches

        return patches(ctx.section(ActivationsConfig), model)
