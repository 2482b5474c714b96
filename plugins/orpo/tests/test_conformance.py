"""The plugin keeps the contract of plugins, and its loss that of losses."""

from __future__ import annotations

from collections.abc import Sequence

from orpo_rows import padded, random_pairs
from pegbox.rows import Batch
from pegbox.testing import LossConformance, PluginConformance


class TestOrpo(PluginConformance, LossConformance):
    plugin = "orpo"
    rows_together = 2

    def batches(self) -> Sequence[Batch]:
        return [padded(random_pairs(3)), padded(random_pairs(2, seed=1))]
