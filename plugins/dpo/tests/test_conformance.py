"""The plugin keeps the contract of plugins, and each of its losses that of losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, get_args

from pairs_of_answers import padded, pair, some_pairs
from pegbox.rows import Batch
from pegbox.testing import LossConformance, PluginConformance
from pegbox_dpo.config import SORTED, LossName


class OfPairs(LossConformance):
    plugin = "dpo"
    rows_together = 2

    def batches(self) -> Sequence[Batch]:
        examples = [pair(*one) for one in some_pairs(6)]
        return [padded(examples[:3]), padded(examples[3:])]


class TestDpo(PluginConformance, OfPairs):
    pass


class TestEveryLossThatMaySplit(OfPairs):
    config: ClassVar[Mapping[str, Any]] = {
        "loss": {name: 0.3 for name in get_args(LossName) if name not in SORTED},
        "label_smoothing": 0.1,
        "ld_alpha": 0.5,
        "token_metrics": True,
    }


class TestWeighted(OfPairs):
    config: ClassVar[Mapping[str, Any]] = {"use_weighting": True}


class TestSorted(OfPairs):
    config: ClassVar[Mapping[str, Any]] = {"loss": {"aot": 1.0, "aot_unpaired": 1.0}}
