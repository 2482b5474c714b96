"""Full fine-tuning of a part of a model: parameters chosen by name, and single rows of embeddings."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pegbox.events import Event, RunStarted, Stepped
from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import GroupOptions, Model, ModelOptions, ModelRequest

    from pegbox_freeze.rows import TrainedRows


class FreezePlugin:
    """Freezes the rest of the policy as soon as it is loaded, and proves that frozen rows stay."""

    _rows: TrainedRows | None = None

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_freeze.config import FreezeConfig

        return ConfigSection(schema=FreezeConfig)

    @hookimpl
    def configure_model(self, ctx: Context) -> ModelOptions:
        from pegbox.types import ModelOptions

        from pegbox_freeze.selection import refuse_adapters

        refuse_adapters(ctx)
        return ModelOptions()

    @hookimpl(wrapper=True)
    def load_model(self, ctx: Context, request: ModelRequest) -> Generator[None, Model, Model]:
        model = yield
        if request.role == "policy":
            from pegbox_freeze.rows import TrainedRows
            from pegbox_freeze.selection import select

            select(ctx, model)
            self._rows = TrainedRows.find(ctx, model)
        return model

    @hookimpl
    def configure_groups(self) -> Sequence[GroupOptions]:
        return [] if self._rows is None else self._rows.groups()

    @hookimpl(wrapper=True)
    def export_model(self, model: Model) -> Generator[None, Path, Path]:
        if self._rows is not None:
            self._rows.check(model)
        return (yield)

    @hookimpl
    def on_event(self, ctx: Context, event: Event) -> None:
        if isinstance(event, RunStarted):
            from pegbox_freeze.selection import report

            report(ctx, event.job.model)
            if self._rows is not None:
                self._rows.begin(event.job.model, event.step)
        elif isinstance(event, Stepped) and self._rows is not None:
            self._rows.after_first_step(event)
