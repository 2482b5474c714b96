"""Several rows in one row of a batch, so that little of it is padding; attention never crosses documents.

The plugin refines what `build_dataset` makes: rows stay what they are, and `bins(order)` says which of them share a
row. The owner of `build_batches` asks for bins of an epoch's shuffled order and joins them.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

from pegbox.events import Event, RunStarted
from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.rows import Dataset


class PackingPlugin:
    """Wraps `build_dataset`; says at the start of a run how full the bins are."""

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_packing.config import PackingConfig

        return ConfigSection(schema=PackingConfig)

    @hookimpl(wrapper=True)
    def build_dataset(self, ctx: Context) -> Generator[None, Dataset | None, Dataset | None]:
        from pegbox_packing.config import PackingConfig
        from pegbox_packing.packed import packed

        rows = yield
        return None if rows is None else packed(rows, ctx.section(PackingConfig))

    @hookimpl
    def on_event(self, ctx: Context, event: Event) -> None:
        if isinstance(event, RunStarted):
            from pegbox_packing.report import fullness, refuse_models

            refuse_models(event.job.model)
            if ctx.runtime.rank == 0:
                for line in fullness(event.job):
                    ctx.log.info("packing: %s", line)
