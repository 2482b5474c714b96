"""Preference optimization without a reference model: ORPO, CPO and SimPO, each a plugin with a section of its own."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection, Item

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.rows import Dataset
    from pegbox.types import Loss


class OfPairs:
    """What the plugins share: they look at the rows before a model is loaded."""

    @hookimpl(wrapper=True)
    def build_dataset(self, ctx: Context) -> Generator[None, Dataset | None, Dataset | None]:
        from pegbox_reference_free.pairs import require_pair_rows

        rows = yield
        if rows is not None and ctx.purpose == "run":
            require_pair_rows(rows)
        return rows


class OrpoPlugin(OfPairs):
    """Odds ratios beside the likelihood (Hong et al. 2024, arXiv:2403.07691); owns `build_loss`."""

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_reference_free.config import OrpoConfig

        return ConfigSection(schema=OrpoConfig)

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        from pegbox_reference_free.health import rules_of

        return rules_of("orpo")

    @hookimpl
    def build_loss(self, ctx: Context) -> Loss:
        from pegbox_reference_free.config import OrpoConfig
        from pegbox_reference_free.odds import OrpoLoss

        return OrpoLoss(ctx.section(OrpoConfig))


class CpoPlugin(OfPairs):
    """DPO with a uniform reference (Xu et al. 2024, arXiv:2401.08417); owns `build_loss`."""

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_reference_free.config import CpoConfig

        return ConfigSection(schema=CpoConfig)

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        from pegbox_reference_free.health import rules_of

        return rules_of("cpo")

    @hookimpl
    def build_loss(self, ctx: Context) -> Loss:
        from pegbox_reference_free.config import CpoConfig
        from pegbox_reference_free.contrast import cpo_loss

        return cpo_loss(ctx.section(CpoConfig))


class SimpoPlugin(OfPairs):
    """Mean log-probabilities as rewards (Meng et al. 2024, arXiv:2405.14734); owns `build_loss`."""

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_reference_free.config import SimpoConfig

        return ConfigSection(schema=SimpoConfig)

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        from pegbox_reference_free.health import rules_of

        return rules_of("simpo")

    @hookimpl
    def build_loss(self, ctx: Context) -> Loss:
        from pegbox_reference_free.config import SimpoConfig
        from pegbox_reference_free.contrast import simpo_loss

        return simpo_loss(ctx.section(SimpoConfig))
