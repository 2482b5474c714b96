"""Experts of a mixture by the operation of `pegbox_kernels.experts`: frozen, trained whole, or with LoRA on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pegbox.hooks import Stage, hookimpl
from pegbox.types import ConfigSection

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model, ModulePatch


class ScattermoePlugin:
    """Patches the slot `experts`: the experts of the base, then the adapters around them."""

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_scattermoe.config import ScattermoeConfig

        return ConfigSection(schema=ScattermoeConfig)

    @hookimpl
    def patch_modules(self, ctx: Context, model: Model, stage: Stage) -> Sequence[ModulePatch]:
        if stage == "base":
            from pegbox_scattermoe.config import ScattermoeConfig
            from pegbox_scattermoe.seam import patches, require_device

            settings = ctx.section(ScattermoeConfig)
            require_device(settings, getattr(vars(ctx).get("runtime"), "device", None))
            return patches(settings, model)
        if stage == "adapted":
            from pegbox_scattermoe.adapters import patches as adapter_patches

            return adapter_patches(model)
        return ()
