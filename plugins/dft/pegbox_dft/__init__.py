"""Dynamic Fine-Tuning: each token's loss is weighed by its own probability (Wu et al. 2025, arXiv:2508.05629)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection

if TYPE_CHECKING:
    from pegbox.types import Loss


class DftPlugin:
    """Owns `build_loss`."""

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_dft.config import DftConfig

        return ConfigSection(schema=DftConfig)

    @hookimpl
    def build_loss(self) -> Loss:
        from pegbox_dft.loss import DftLoss

        return DftLoss()
