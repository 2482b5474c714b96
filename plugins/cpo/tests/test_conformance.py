"""The plugin keeps the contract of plugins, and its loss that of losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from cpo_rows import padded, random_pairs
from pegbox.rows import Batch
from pegbox.testing import LossConformance, PluginConformance


class TestCpo(PluginConformance, LossConformance):
    plugin = "cpo"
    rows_together = 2

    def batches(self) -> Sequence[Batch]:
        return [padded(random_pairs(3)), padded(random_pairs(2, seed=1))]


class TestCpoOnMeans(TestCpo):
    config: ClassVar[Mapping[str, Any]] = {"loss": "ipo", "sft_weight": 0.0, "alpha": 0.25}
