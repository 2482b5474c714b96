"""Models and tokenizers of Hugging Face transformers: from a folder, the hub, a GGUF file, or an installed package."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection, Item

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.hooks import Stage
    from pegbox.rows import Dataset
    from pegbox.types import ExportRequest, Model, ModelOptions, ModelRequest, ModulePatch, Processor

FORMAT = "transformers"


class HfPlugin:
    """Loads and exports the format `transformers`."""

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_hf.config import HfConfig

        return ConfigSection(schema=HfConfig)

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        doc = "A folder or hub repository that from_pretrained opens."
        return [Item(kind=kind, name=FORMAT, target=FORMAT, doc=doc) for kind in ("model_format", "export_format")]

    @hookimpl
    def load_processor(self, ctx: Context) -> Processor:
        from pegbox_hf.quiet import hush_neighbours

        hush_neighbours()
        from pegbox_hf.processor import load_processor

        return load_processor(ctx)

    @hookimpl(wrapper=True)
    def build_dataset(self, ctx: Context) -> Generator[None, Dataset | None, Dataset | None]:
        """Compare rows with what the model reads, before its weights are loaded; pass them on."""
        rows = yield
        if rows is not None and ctx.purpose == "run" and ctx.config.run.model.format == FORMAT:
            from pegbox_hf.context_length import refuse_longer

            refuse_longer(ctx, rows)
        return rows

    @hookimpl
    def configure_model(self, ctx: Context) -> ModelOptions:
        from pegbox.types import ModelOptions

        from pegbox_hf.config import HfConfig

        return ModelOptions(attention=ctx.section(HfConfig).attention)

    @hookimpl
    def load_model(self, ctx: Context, request: ModelRequest) -> Model:
        from pegbox_hf.quiet import hush_neighbours

        hush_neighbours()
        from pegbox_hf.loading import load_model

        return load_model(ctx, request)

    @hookimpl
    def patch_modules(self, ctx: Context, model: Model, stage: Stage) -> Sequence[ModulePatch]:
        """Nothing is replaced; once adapters are there, settings of new tokens and of the export must act."""
        if stage == "adapted":
            from pegbox_hf.tokens import require_trained

            require_trained(ctx, model)
            from pegbox_hf.export import require_whole

            require_whole(ctx, model)
        return ()

    @hookimpl
    def export_model(self, ctx: Context, model: Model, request: ExportRequest) -> Path:
        from pegbox_hf.export import export_model

        return export_model(ctx, model, request)
