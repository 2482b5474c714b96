"""Outcome reward models: one number for a whole answer, learnt from preferences (Bradley and Terry 1952)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection, Item

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.rows import Dataset
    from pegbox.types import Loss, ModelOptions


class RewardPlugin:
    """Owns `build_loss`, asks for a model that predicts one number for a sequence, and looks at the rows."""

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_reward.config import RewardConfig

        return ConfigSection(schema=RewardConfig)

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        from pegbox_reward.health import rules

        smallest = Item(kind="metric", name="min_reward", target="min", doc="Smallest reward of an answer.")
        largest = Item(kind="metric", name="max_reward", target="max", doc="Largest reward of an answer.")
        return [*rules(), smallest, largest]

    @hookimpl
    def configure_model(self) -> ModelOptions:
        from pegbox.types import ModelOptions

        return ModelOptions(classify="sequence", labels=1)

    @hookimpl(wrapper=True)
    def build_dataset(self, ctx: Context) -> Generator[None, Dataset | None, Dataset | None]:
        """Look at the rows before a model is loaded; they are passed on as they are."""
        from pegbox_reward.config import require_pair_rows

        rows = yield
        if rows is not None and ctx.purpose == "run":
            require_pair_rows(rows)
        return rows

    @hookimpl
    def build_loss(self, ctx: Context) -> Loss:
        from pegbox_reward.config import RewardConfig
        from pegbox_reward.loss import RewardLoss

        settings = ctx.section(RewardConfig)
        processor = vars(ctx).get("processor")  # there is none where a step is only measured
        pad_id = None if processor is None else processor.pad_id
        return RewardLoss(margin=settings.margin, center=settings.center, pad_id=pad_id)
