"""Process reward models: a verdict on each step of an answer (Lightman et al. 2023, arXiv:2305.20050)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection, Item

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.rows import BatchSource, Dataset
    from pegbox.types import Loss, ModelOptions

EXTRA = "verdicts"


class PrmPlugin:
    """Owns `build_loss`, asks for a model that classifies tokens, and brings the verdicts of rows to their batches."""

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_prm.config import PrmConfig

        return ConfigSection(schema=PrmConfig)

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        from pegbox_prm.health import rules

        doc = "Whether the step that ends at each marked token is right: 1 or 0."
        return [Item(kind="extra", name=EXTRA, target="prm", doc=doc), *rules()]

    @hookimpl
    def configure_model(self) -> ModelOptions:
        from pegbox.types import ModelOptions

        return ModelOptions(classify="token", labels=2)

    @hookimpl(wrapper=True)
    def build_dataset(self, ctx: Context) -> Generator[None, Dataset | None, Dataset | None]:
        """Look at the rows before anything expensive is done; they are passed on as they are."""
        from pegbox_prm.config import PrmConfig
        from pegbox_prm.verdicts import require_verdicts

        rows = yield
        if rows is not None:
            require_verdicts(rows, ctx.section(PrmConfig))
        return rows

    @hookimpl
    def build_loss(self) -> Loss:
        from pegbox_prm.loss import PrmLoss

        return PrmLoss()

    @hookimpl(wrapper=True)
    def build_batches(self, ctx: Context) -> Generator[None, BatchSource, BatchSource]:
        from pegbox_prm.config import PrmConfig
        from pegbox_prm.verdicts import with_verdicts

        source = yield
        return with_verdicts(source, ctx.section(PrmConfig))
