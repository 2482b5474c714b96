"""The plugin keeps the contract of plugins, and its loss that of losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pegbox.rows import Batch
from pegbox.testing import LossConformance, PluginConformance
from simpo_rows import padded, random_pairs


class TestSimpo(PluginConformance, LossConformance):
    plugin = "simpo"
    rows_together = 2

    def batches(self) -> Sequence[Batch]:
        return [padded(random_pairs(3)), padded(random_pairs(2, seed=1))]


class TestSimpoWithLikelihood(TestSimpo):
    config: ClassVar[Mapping[str, Any]] = {"sft_weight": 1.0, "alpha": 0.25, "label_smoothing": 0.1}
