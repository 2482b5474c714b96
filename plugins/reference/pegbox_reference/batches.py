"""A source of batches with the reference's log-probabilities beside the tokens; all else is the inner source's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pegbox.rows import Batch, BatchSource, Dataset, Example, Extra, RowSource

from pegbox_reference import EXTRA

if TYPE_CHECKING:
    from torch import Tensor

Logps = Callable[[Sequence[Batch]], "Sequence[Tensor]"]
"""The reference's log-probabilities of the trained tokens of each batch: (N,), float32, without gradient."""


class ReferencedBatches:
    """Each step's micro-batches with `extra["reference_logps"]` (`pegbox.rows.BatchSource`).

    A step is computed as it is taken: the reference is the one of that moment. State, epoch and whatever else the inner
    source has are its own.
    """

    def __init__(self, source: BatchSource, logps: Logps) -> None:
        self._source, self._logps = source, logps

    @property
    def examples(self) -> Dataset:
        """The rows the inner source draws from."""
        return self._source.examples

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run."""
        return self._source.total_steps

    def __iter__(self) -> Iterator[Sequence[Batch]]:
        for micro_batches in self._source:
            yield self._beside(micro_batches)

    def describe(self, batch: Batch) -> str:
        """Where the rows of a batch came from."""
        return self._source.describe(batch)

    def state_dict(self) -> dict[str, object]:
        return self._source.state_dict()

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self._source.load_state_dict(state_dict)

    def __getattr__(self, name: str) -> Any:
        """What else the inner source has: `epoch`, how its state is kept for each rank."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._source, name)

    def _beside(self, batches: Sequence[Batch]) -> list[Batch]:
        values = self._logps(batches)
        return [
            replace(batch, extra={**batch.extra, EXTRA: Extra(value=logps_N, layout="trained")})
            for batch, logps_N in zip(batches, values, strict=True)
        ]


class ReferencedLayout(ReferencedBatches):
    """The same around a source that lays out rows of others: those have the log-probabilities too."""

    def lay_out(self, examples: Sequence[Example]) -> Sequence[Batch]:
        """This rank's micro-batches of examples that every rank holds."""
        return self._beside(self._source.lay_out(examples))


class ReferencedRows(ReferencedLayout):
    """The same around a `pegbox.rows.RowSource`."""

    _source: RowSource

    @property
    def max_steps(self) -> int | None:
        """Optimizer steps that the config ends the run after."""
        return self._source.max_steps

    def take(self) -> Sequence[tuple[int, Example]]:
        """The rows of the next step over all ranks."""
        return self._source.take()


def beside(source: BatchSource, logps: Logps) -> ReferencedBatches:
    """The source with log-probabilities; one that lays out rows still does."""
    if isinstance(source, RowSource):
        return ReferencedRows(source, logps)
    return ReferencedLayout(source, logps) if hasattr(source, "lay_out") else ReferencedBatches(source, logps)
