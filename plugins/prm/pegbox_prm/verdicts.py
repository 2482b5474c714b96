"""Verdicts of steps on their way from rows to batches.

A row keeps its verdicts in a column; a batch gets them as an extra named `verdicts`, one for each trained position, in
the order of the marks. Rows and marks are matched by number, so every mark must be there: a row that was cut has lost
some, and which ones nobody can tell.

    N  marked tokens of a micro-batch
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pegbox.errors import ConfigError, DataError
from pegbox.rows import UNTRAINED, Batch, BatchSource, Example, Examples, ExampleStream, Extra

from pegbox_prm import EXTRA

if TYPE_CHECKING:
    from pegbox.rows import Dataset

    from pegbox_prm.config import PrmConfig


def require_verdicts(rows: Dataset, settings: PrmConfig) -> None:
    """Raise if rows cannot be asked for their verdicts, or the first one has none.

    Raises:
        ConfigError: the rows are a stream.
        DataError: see `verdicts_of`.
    """
    if isinstance(rows, ExampleStream):
        raise ConfigError(
            f"the {rows.split} rows are a stream, and prm looks up the verdicts of each row by its number",
            "The rows of a stream are gone when they have become a batch.",
            "Remove the setting that streams them; rows are read from disk as they are needed anyway.",
        )
    if len(rows):
        verdicts_of(rows[0], rows.describe(0), settings)


def verdicts_of(example: Example, where: str, settings: PrmConfig) -> list[int]:
    """The verdicts of a row at its marked tokens: 1 right, 0 wrong.

    Args:
        example: the row.
        where: it came from, for messages.
        settings: the section of the config.

    Raises:
        DataError: there are none, or not as many as marks.
    """
    verdicts, column = example.columns.get(settings.column), settings.column
    marks = sum(label != UNTRAINED for label in example.labels)
    if not isinstance(verdicts, Sequence) or not verdicts or not all(verdict in (0, 1) for verdict in verdicts):
        raise DataError(
            f"{where}: the column '{column}' is {verdicts!r}",
            "It must hold true or false for each step.",
            "Use format: steps, or set prm.column to the column that holds the verdicts (data.columns keeps it)."
            if verdicts is None
            else "Correct the row, or set prm.column to the column that holds verdicts.",
        )
    if marks != len(verdicts):
        raise DataError(
            f"{where} has {len(verdicts)} verdicts and {marks} marked tokens",
            "The n-th verdict belongs to the n-th mark; which ones a row has lost, nobody can tell.",
            "Use format: steps, or have the format that marks the tokens keep one verdict for each.",
        )
    return [int(bool(verdict)) for verdict in verdicts]


def with_verdicts(source: BatchSource, settings: PrmConfig) -> BatchSource:
    """The source with the extra `verdicts` in every batch."""
    return VerdictBatches(source, settings)


class VerdictBatches:
    """A source of batches that looks up the verdicts of their rows; its state is that of the source it wraps."""

    def __init__(self, source: BatchSource, settings: PrmConfig) -> None:
        self._source, self._settings = source, settings
        self._rows: Examples = source.examples  # type: ignore[assignment]  # refused otherwise

    def __iter__(self) -> Iterator[Sequence[Batch]]:
        for micro_batches in self._source:
            yield [self._judged(batch) for batch in micro_batches]

    def __getattr__(self, name: str) -> Any:
        """What else the source has: its rows, its length, how far it is, how it names a batch."""
        return getattr(self._source, name)

    def _judged(self, batch: Batch) -> Batch:
        """The batch with its verdicts; marks stand in it in the order of rows."""
        import torch

        verdicts: list[int] = []
        for row in batch.rows:
            verdicts += verdicts_of(self._rows[row], self._rows.describe(row), self._settings)
        value_N = torch.tensor(verdicts, dtype=torch.int64)
        if len(value_N) != batch.trained_tokens:
            raise DataError(
                f"{self._source.describe(batch)} have {len(value_N)} verdicts and {batch.trained_tokens} marks in "
                "their batch",
                "The first token of a document is never predicted, so a mark there is lost.",
                "Mark a token behind the step, not the first of the row.",
            )
        if batch.input_ids_BT.is_pinned():
            value_N = value_N.pin_memory()
        return replace(batch, extra={**batch.extra, EXTRA: Extra(value=value_N, layout="trained")})

    def state_dict(self) -> dict[str, object]:
        return self._source.state_dict()

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self._source.load_state_dict(state_dict)
