"""Supervised fine-tuning: maximum likelihood of the trained tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pegbox.hooks import hookimpl
from pegbox.types import ConfigSection

if TYPE_CHECKING:
    from pegbox.types import Loss


class SftPlugin:
    """Owns `build_loss`."""

    @hookimpl
    def register_config(self) -> ConfigSection:
        from pegbox_sft.config import SftConfig

        return ConfigSection(schema=SftConfig)

    @hookimpl
    def build_loss(self) -> Loss:
        from pegbox_sft.loss import SftLoss

        return SftLoss()
