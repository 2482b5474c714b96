"""LoRA: a few trained matrices of low rank beside each frozen weight (Hu et al. 2021, arXiv:2106.09685), by PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection, Item

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import ExportRequest, GroupOptions, Model

FORMAT = "peft"


class LoraPlugin:
    """Adds the adapter to the policy, and exports it in the format `peft`."""

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_lora.config import LoraConfig

        return ConfigSection(schema=LoraConfig)

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        doc = "An adapter's folder that PEFT, transformers and vLLM open."
        return [Item(kind="export_format", name=FORMAT, target=FORMAT, doc=doc)]

    @hookimpl
    def apply_adapters(self, ctx: Context, model: Model) -> Model:
        from pegbox_lora.adapter import apply

        return apply(ctx, model)

    @hookimpl
    def configure_groups(self, ctx: Context, model: Model) -> Sequence[GroupOptions]:
        from pegbox_lora.adapter import require_only_adapter
        from pegbox_lora.config import LoraConfig
        from pegbox_lora.learning_rates import group_options

        require_only_adapter(model)
        return group_options(ctx.section(LoraConfig), model)

    @hookimpl
    def export_model(self, ctx: Context, model: Model, request: ExportRequest) -> Path:
        from pegbox_lora.export import export

        return export(ctx, model, request)
