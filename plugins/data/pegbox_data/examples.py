"""Tokenized rows in memory: flat arrays that rows are slices of, and views of some of them.

Five bytes per token (id and mask) instead of the 70 and more of Python lists; labels are made when a row is
asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from pegbox.types import UNTRAINED, Example, Json, Split

from pegbox_data.encoding import Encoded


@dataclass(frozen=True)
class Table:
    """The rows of several files.

    Attributes:
        ids, trained: token ids int32 and mask bool of all rows, one after the other, length N.
        starts: where each row begins, int64, length R + 1.
        counts: trained tokens of each row, int64, length R.
        files, lines: index of the file and line of each row, length R.
        positions: number of each row among all rows that were read, dropped ones included, length R.
        read: how many rows were read.
        names: what messages call each file.
        columns: kept columns of the source rows, length R, or empty.
    """

    ids: np.ndarray
    trained: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    files: np.ndarray
    lines: np.ndarray
    positions: np.ndarray
    read: int
    names: Sequence[str]
    columns: Sequence[Mapping[str, Json]]


@dataclass
class TableBuilder:
    """Collects rows for a table."""

    names: list[str] = field(default_factory=list)
    read: int = 0
    _rows: list[Encoded] = field(default_factory=list)
    _files: list[int] = field(default_factory=list)
    _lines: list[int] = field(default_factory=list)
    _positions: list[int] = field(default_factory=list)
    _columns: list[Mapping[str, Json]] = field(default_factory=list)

    def add(self, row: Encoded, line: int, position: int, columns: Mapping[str, Json]) -> None:
        """Add a row of the file named last."""
        self._rows.append(row)
        self._files.append(len(self.names) - 1)
        self._lines.append(line)
        self._positions.append(position)
        if columns:
            self._columns.append(columns)

    def build(self) -> Table:
        lengths = np.array([len(row.ids) for row in self._rows], dtype=np.int64)
        return Table(
            ids=np.concatenate([row.ids for row in self._rows]) if self._rows else np.zeros(0, dtype=np.int32),
            trained=np.concatenate([row.trained for row in self._rows]) if self._rows else np.zeros(0, dtype=bool),
            starts=np.concatenate([[0], np.cumsum(lengths)]),
            counts=np.array([row.trained.sum() for row in self._rows], dtype=np.int64),
            files=np.array(self._files, dtype=np.int32),
            lines=np.array(self._lines, dtype=np.int64),
            positions=np.array(self._positions, dtype=np.int64),
            read=self.read,
            names=tuple(self.names),
            columns=tuple(self._columns),
        )


class TableExamples:
    """The rows of a split: those of a table with the given indices, in this order.

    Attributes:
        split: the split they make.
        fingerprint: identifies content, format, template, tokenizer and every option that changes a token.
        lengths: tokens of each row, int64, length R.
        trained_tokens: trained tokens of all rows.
    """

    def __init__(self, table: Table, rows: np.ndarray, split: Split, fingerprint: str) -> None:
        self.split, self.fingerprint = split, fingerprint
        self.lengths = np.diff(table.starts)[rows]
        self.trained_tokens = int(table.counts[rows].sum())
        self._table, self._rows = table, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        row = self._rows[index]
        start, end = self._table.starts[row], self._table.starts[row + 1]
        ids = self._table.ids[start:end]
        labels = np.where(self._table.trained[start:end], ids, np.int32(UNTRAINED))
        columns = self._table.columns[row] if self._table.columns else {}
        return Example(input_ids=ids, labels=labels, columns=columns)  # type: ignore[arg-type]

    def describe(self, index: int) -> str:
        """`data/train.jsonl:17`."""
        row = self._rows[index]
        return f"{self._table.names[self._table.files[row]]}:{self._table.lines[row]}"
