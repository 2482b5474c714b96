"""LoRA layers of PEFT in groups: one product for all that share an input, no pass over activations for an update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pegbox.hooks import Stage, hookimpl
from pegbox.types import ConfigSection

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model, ModulePatch


class LoraKernelsPlugin:
    """Patches adapted attention projections, MLPs and other linear layers at the stage `adapted`."""

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_lora_kernels.config import LoraKernelsConfig

        return ConfigSection(schema=LoraKernelsConfig)

    @hookimpl
    def patch_modules(self, ctx: Context, model: Model, stage: Stage) -> Sequence[ModulePatch]:
        if stage != "adapted" or model.role != "policy":
            return []
        from pegbox_lora_kernels.config import LoraKernelsConfig
        from pegbox_lora_kernels.patching import patches

        return patches(ctx.section(LoraKernelsConfig), model)
