"""Contrastive preference optimization, without a reference model (Xu et al. 2024, arXiv:2401.08417)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Loss


class CpoPlugin:
    """Owns `build_loss`."""

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_cpo.config import CpoConfig

        return ConfigSection(schema=CpoConfig)

    @hookimpl
    def build_loss(self, ctx: Context) -> Loss:
        from pegbox_cpo.config import CpoConfig
        from pegbox_cpo.loss import CpoLoss

        return CpoLoss(ctx.section(CpoConfig))
