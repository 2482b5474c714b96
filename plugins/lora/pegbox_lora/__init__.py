"""LoRA: a few trained matrices of low rank beside each frozen weight (Hu et al. 2021, arXiv:2106.09685), by PEFT."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection, Item

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.rows import Dataset, Split
    from pegbox.types import ExportRequest, GroupOptions, Model

FORMAT = "peft"


class LoraPlugin:
    """Adds the adapter to the policy, and exports it in the format `peft`."""

    def __init__(self) -> None:
        self._train: Dataset | None = None

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_lora.config import LoraConfig

        return ConfigSection(schema=LoraConfig)

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        doc = "An adapter's folder that PEFT, transformers and vLLM open."
        return [Item(kind="export_format", name=FORMAT, target=FORMAT, doc=doc)]

    @hookimpl(wrapper=True)
    def build_dataset(self, split: Split) -> Generator[None, Dataset | None, Dataset | None]:
        """Keep the training rows in view: some initialisations look at them. They are passed on as they are."""
        rows = yield
        if split == "train":
            self._train = rows
        return rows

    @hookimpl
    def apply_adapters(self, ctx: Context, model: Model) -> Model:
        from pegbox_lora.adapter import apply

        return apply(ctx, model, self._train)

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
