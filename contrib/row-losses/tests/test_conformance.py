"""The plugin keeps the contract of plugins, of wrappers and, around a loss that does, of losses."""

from __future__ import annotations

from typing import Any

from pegbox.testing import LossConformance, PluginConformance, WrapperConformance
from stand_in import NegativeLogLikelihood


class TestRowLosses(PluginConformance, WrapperConformance, LossConformance):
    plugin = "row-losses"

    def result(self, hook: str) -> Any:
        return NegativeLogLikelihood()

    def loss(self, ctx, model) -> Any:
        from pegbox_row_losses.ledger import Ledger
        from pegbox_row_losses.recording import record

        return record(NegativeLogLikelihood(), Ledger())
