"""Figures about rollouts, on their way into the log: they are known on the host, and the loss hands them on.

A figure is a total and a count; the loop sums both over micro-batches, ranks and steps and divides. So each is put
into one micro-batch of one rank, as an `Extra` of its name, and the loss returns it among its metrics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from pegbox.rows import Batch, Extra
from pegbox.types import Term

PREFIX = "figure/"

Figures = Mapping[str, tuple[float, float]]
"""Total and count by name."""


def mean_of(values: Sequence[float]) -> tuple[float, float]:
    """The figure whose value is the mean of some numbers."""
    return float(sum(values)), float(len(values))


def with_figures(batches: Sequence[Batch], figures: Figures) -> list[Batch]:
    """The micro-batches of a step, the first of them with the figures."""
    extra = {
        PREFIX + name: Extra(value=torch.tensor(pair, dtype=torch.float32), layout="global")
        for name, pair in figures.items()
    }
    return [replace(batches[0], extra={**batches[0].extra, **extra}), *batches[1:]]


def figures_of(batch: Batch) -> Iterator[Term]:
    """The figures of a batch as metrics."""
    for name, extra in batch.extra.items():
        if name.startswith(PREFIX):
            yield Term(name=name.removeprefix(PREFIX), total=extra.value[0], count=extra.value[1])
