"""Log-probabilities of a reference model on every batch, for losses that compare the policy with one."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from pegbox.events import Event, RunBegins, RunStarted, Stepped
from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection, Item

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.rows import BatchSource, Dataset
    from pegbox.types import Model

    from pegbox_reference.ways import Reference

EXTRA = "reference_logps"


class ReferencePlugin:
    """Wraps `build_batches`: `Batch.extra["reference_logps"]` of every batch, laid out as its trained tokens."""

    def __init__(self) -> None:
        self._reference: Reference | None = None

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_reference.config import ReferenceConfig

        return ConfigSection(schema=ReferenceConfig)

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        doc = "The reference's log-probability of each trained token, float32, without gradient."
        return [Item(kind="extra", name=EXTRA, target="trained", doc=doc)]

    @hookimpl(wrapper=True)
    def build_dataset(self, ctx: Context) -> Generator[None, Dataset | None, Dataset | None]:
        """Look at the rows before a model is loaded; they are passed on as they are."""
        from pegbox_reference.config import ReferenceConfig, require_indexed

        rows = yield
        if rows is not None:
            require_indexed(ctx.section(ReferenceConfig), rows)
        return rows

    @hookimpl(wrapper=True)
    def build_batches(self, ctx: Context, model: Model, dataset: Dataset) -> Generator[None, BatchSource, BatchSource]:
        from pegbox_reference.ways import Reference

        source = yield
        if self._reference is None:
            self._reference = Reference(ctx, model)
        return self._reference.beside(source, dataset)

    @hookimpl
    def on_event(self, ctx: Context, event: Event) -> None:
        if isinstance(event, RunBegins):
            from pegbox_reference.config import ReferenceConfig, check

            check(ctx, ctx.section(ReferenceConfig))
        if isinstance(event, RunStarted):
            from pegbox_reference.config import require_wanted

            require_wanted(event.job.loss)
        if self._reference is not None and isinstance(event, RunStarted):
            self._reference.started()
        if self._reference is not None and isinstance(event, Stepped):
            self._reference.stepped(event.step)
