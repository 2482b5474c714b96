"""The plugin keeps the contract of plugins and losses."""

from __future__ import annotations

import torch
from pegbox.rows import Batch, Example
from pegbox.testing import LossConformance, PluginConformance
from pegbox.testing.tiny import collate


def pairs(lengths: list[int], seed: int = 0) -> Batch:
    """Neighbours are the chosen and the rejected answer of a preference, each in a line of its own."""
    source = torch.Generator().manual_seed(seed)
    examples = []
    for at, length in enumerate(lengths):
        ids = torch.randint(0, 256, (length,), generator=source).tolist()
        examples.append(Example(input_ids=ids, labels=ids, signs=(-1 if at % 2 else 1,)))
    return collate(examples, tuple(range(len(lengths))))


class TestReward(PluginConformance, LossConformance):
    plugin = "reward"
    config = {"center": 0.01}  # noqa: RUF012
    rows_together = 2

    def batches(self) -> list[Batch]:
        return [pairs([9, 6, 5, 8]), pairs([4, 12], seed=1)]
