"""Which training rows have the highest loss: mislabelled, garbled, in the wrong language, or simply hard."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from pegbox.events import CheckpointSaved, RunEnded, RunStarted
from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.events import Event
    from pegbox.rows import Examples
    from pegbox.types import Loss

    from pegbox_row_losses.ledger import Ledger


class RowLossesPlugin:
    """Wraps `build_loss` to record, and writes `row_losses.jsonl`. Every rank keeps the rows that it saw."""

    state_scope = "rank"

    def __init__(self) -> None:
        self._ledger: Ledger | None = None
        self._examples: Examples | None = None

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_row_losses.config import RowLossesConfig

        return ConfigSection(schema=RowLossesConfig)

    @hookimpl(wrapper=True)
    def build_loss(self, ctx: Context) -> Generator[None, Loss, Loss]:
        from pegbox_row_losses.recording import record

        loss = yield
        return record(loss, self.ledger())

    @hookimpl
    def on_event(self, ctx: Context, event: Event) -> None:
        from pegbox_row_losses.report import write_report

        if isinstance(event, RunStarted):
            self._examples = event.job.train.examples
        elif isinstance(event, RunEnded):
            write_report(ctx, ctx.runtime.gather_objects(self.ledger().state_dict()), self._examples)
        elif isinstance(event, CheckpointSaved) and ctx.runtime.world_size == 1:
            write_report(ctx, [self.ledger().state_dict()], self._examples)

    def ledger(self) -> Ledger:
        """What was recorded so far, on this rank."""
        from pegbox_row_losses.ledger import Ledger

        self._ledger = self._ledger or Ledger()
        return self._ledger

    def state_dict(self) -> dict[str, object]:
        return self.ledger().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.ledger().load_state_dict(state_dict)
