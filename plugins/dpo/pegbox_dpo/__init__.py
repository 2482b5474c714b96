"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) and its relatives, over pairs of answers."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from pegbox.events import Event, RunBegins
from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection, Item

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.rows import Dataset
    from pegbox.types import Loss


class DpoPlugin:
    """Owns `build_loss`; looks at the rows."""

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_dpo.config import DpoConfig

        return ConfigSection(schema=DpoConfig)

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        from pegbox_dpo.health import items

        return list(items())

    @hookimpl
    def on_event(self, ctx: Context, event: Event) -> None:
        if isinstance(event, RunBegins):
            from pegbox_dpo.config import DpoConfig, require_reference

            require_reference(ctx.section(DpoConfig), ctx.items("extra"))

    @hookimpl(wrapper=True)
    def build_dataset(self, ctx: Context) -> Generator[None, Dataset | None, Dataset | None]:
        """Look at the rows before a model is loaded; they are passed on as they are."""
        from pegbox_dpo.config import require_pair_rows

        rows = yield
        if rows is not None and ctx.purpose == "run":
            require_pair_rows(rows)
        return rows

    @hookimpl
    def build_loss(self, ctx: Context) -> Loss:
        from pegbox_dpo.config import DpoConfig
        from pegbox_dpo.loss import DpoLoss

        return DpoLoss(ctx.section(DpoConfig))
