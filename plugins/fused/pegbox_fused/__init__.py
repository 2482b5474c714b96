"""Normalization, gated linear units and rotary embeddings, each in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pegbox.hooks import Stage, hookimpl
from pegbox.types import ConfigSection

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model, ModulePatch


class FusedPlugin:
    """Patches the slots `norm`, `mlp`, `experts` and `rope` of the model as loaded."""

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_fused.config import FusedConfig

        return ConfigSection(schema=FusedConfig)

    @hookimpl
    def patch_modules(self, ctx: Context, model: Model, stage: Stage) -> Sequence[ModulePatch]:
        if stage != "base":
            return []
        from pegbox_fused.patching import patches

        return patches(ctx, model)
