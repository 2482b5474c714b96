"""Rows that know their bins: for any order of rows, which of them share a row of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from pegbox.errors import DataError
from pegbox.rows import ExampleStream

from pegbox_packing.bins import best_fit_decreasing

if TYPE_CHECKING:
    from pegbox.rows import Dataset, Example, Examples, Split

    from pegbox_packing.config import PackingConfig

NAMED_ROWS = 3


class PackedRows:
    """Indexed rows with bins (`pegbox.rows.PackedExamples`)."""

    def __init__(self, rows: Examples, config: PackingConfig) -> None:
        self.split: Split = rows.split
        self.fingerprint = f"{rows.fingerprint}-packed-{config.length}-{config.window}"
        self.capacity = config.length
        self._rows, self._config = rows, config
        too_long = np.flatnonzero(self.lengths > config.length)
        if too_long.size:
            named = ", ".join(
                f"{rows.describe(int(row))} ({self.lengths[row]:,} tokens)" for row in too_long[:NAMED_ROWS]
            )
            raise DataError(
                f"{too_long.size:,} of {len(rows):,} rows are longer than packing.length, {config.length:,}: {named}",
                "A row is packed whole: it cannot be longer than a bin.",
                f"Set data.max_length={config.length}, half of it for preferences, which are packed as pairs "
                "(data.overlong says what becomes of longer rows), or raise packing.length.",
            )

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64, length R."""
        known = getattr(self._rows, "lengths", None)
        if known is None:
            known = [len(self._rows[row].input_ids) for row in range(len(self._rows))]
        return np.asarray(known, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        return self._rows[index]

    def describe(self, index: int) -> str:
        """Where the row came from, as the rows say."""
        return self._rows.describe(index)

    def bins(self, order: Sequence[int]) -> list[tuple[int, ...]]:
        """Rows that share a row of a batch. Each window of the order is packed for itself, and bins stand in the order
        of their first rows, so that a shuffled order gives shuffled bins.
        """
        found: list[tuple[int, ...]] = []
        for start in range(0, len(order), self._config.window):
            rows = order[start : start + self._config.window]
            lengths = self.lengths[np.asarray(rows, dtype=np.int64)].tolist()
            found += [tuple(rows[at] for at in chosen) for chosen in best_fit_decreasing(lengths, self._config.length)]
        return found

    def fit(self, lengths: Sequence[int]) -> list[list[int]]:
        """Positions of rows made elsewhere, such as completions, in bins."""
        return fit(lengths, self._config)


class PackedStream:
    """A stream whose rows come with bins (`pegbox.rows.ExampleStream`); its place is that of the rows."""

    def __init__(self, rows: ExampleStream, config: PackingConfig) -> None:
        self.split: Split = rows.split
        self.fingerprint = f"{rows.fingerprint}-packed-{config.length}-{config.window}"
        self._rows, self._config = rows, config

    def take(self, rows: int) -> PackedRows:
        """The next rows, with bins among them."""
        return PackedRows(self._rows.take(rows), self._config)

    def fit(self, lengths: Sequence[int]) -> list[list[int]]:
        """Positions of rows made elsewhere, such as completions, in bins."""
        return fit(lengths, self._config)

    def state_dict(self) -> dict[str, object]:
        return self._rows.state_dict()

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self._rows.load_state_dict(state_dict)


def fit(lengths: Sequence[int], config: PackingConfig) -> list[list[int]]:
    """Positions of rows in bins.

    Raises:
        DataError: a row is longer than a bin.
    """
    if lengths and max(lengths) > config.length:
        raise DataError(
            f"a row of {max(lengths):,} tokens was made, and packing.length is {config.length:,}",
            "A row is packed whole: it cannot be longer than a bin.",
            f"Set packing.length={max(lengths)} or higher: the longest prompt and the longest completion must fit.",
        )
    return best_fit_decreasing(lengths, config.length)


def packed(rows: Dataset, config: PackingConfig) -> Dataset:
    """The rows of a split with bins; held-out rows stay alone if the config says so.

    Raises:
        DataError: a row is longer than a bin.
    """
    if rows.split == "eval" and not config.eval:
        return rows
    return PackedStream(rows, config) if isinstance(rows, ExampleStream) else PackedRows(rows, config)
