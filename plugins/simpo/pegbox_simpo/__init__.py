"""Simple preference optimization: mean log-probabilities as rewards (Meng et al. 2024, arXiv:2405.14734)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Loss


class SimpoPlugin:
    """Owns `build_loss`."""

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_simpo.config import SimpoConfig

        return ConfigSection(schema=SimpoConfig)

    @hookimpl
    def build_loss(self, ctx: Context) -> Loss:
        from pegbox_simpo.config import SimpoConfig
        from pegbox_simpo.loss import SimpoLoss

        return SimpoLoss(ctx.section(SimpoConfig))
