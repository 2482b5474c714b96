"""Odds-ratio preference optimization, without a reference model (Hong et al. 2024, arXiv:2403.07691)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Loss


class OrpoPlugin:
    """Owns `build_loss`."""

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_orpo.config import OrpoConfig

        return ConfigSection(schema=OrpoConfig)

    @hookimpl
    def build_loss(self, ctx: Context) -> Loss:
        from pegbox_orpo.config import OrpoConfig
        from pegbox_orpo.loss import OrpoLoss

        return OrpoLoss(ctx.section(OrpoConfig))
