"""Tokenized rows of one part (a file, a dataset): flat arrays that rows are slices of.

Five bytes per token (id and mask) instead of the 70 and more of Python lists. The arrays lie in memory, or in files
that are mapped into it: opening those costs nothing, and processes on one machine share them. Nothing here depends on
lengths, mixing or splits, so that none of those ever makes rows be tokenized again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from pegbox_data.findings import FINDINGS, Found

if TYPE_CHECKING:
    from pegbox.record import Json

ARRAYS: dict[str, str] = {
    "ids": "<i4",
    "trained": "|b1",
    "lengths": "<i8",
    "counts": "<i8",
    "lines": "<i8",
    "positions": "<i8",
    "splits": "|b1",
    "digests": "<u8",
    "columns": "|u1",
    "column_lengths": "<i8",
    "documents": "<i8",
    "signs": "|i1",
    "answers": "|u1",
}
"""Names and types of the arrays: what `Piece` says of them."""
WHERE_NEEDED = {"column_lengths": 8, "answers": 1}
"""Arrays with a value of so many bytes for each row that are empty as long as no row needs one."""


@dataclass
class Tally:
    """How often one finding occurs: in all, and where first; rows with it if it stops or drops."""

    count: int = 0
    line: int = 0
    detail: str = ""
    rows: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Piece:
    """The rows of one part.

    Attributes:
        ids, trained: token ids int32 and mask bool of all rows, one after the other, length N.
        lengths, counts: tokens and trained tokens of each row, int64, length R.
        lines, positions: line of each row, and its number among all rows read, int64, length R.
        splits: rows that are cut up if too long, whatever the length rule, bool, length R.
        digests: two numbers for each row's ids and mask, uint64, length 2 R.
        columns, column_lengths: kept columns of each row as JSON, bytes; or empty.
        answers: of how many documents with signs each row consists, 0: of none, uint8, length R; or empty.
        documents, signs: lengths of all such documents, int64, and their signs, int8.
        read: how many rows were read.
        findings: what the audit found, by id.
    """

    ids: np.ndarray
    trained: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray
    lines: np.ndarray
    positions: np.ndarray
    splits: np.ndarray
    digests: np.ndarray
    columns: np.ndarray
    column_lengths: np.ndarray
    documents: np.ndarray
    signs: np.ndarray
    answers: np.ndarray
    read: int
    findings: Mapping[str, Tally]

    def __post_init__(self) -> None:
        named = {"starts": self.lengths, "column_starts": self.column_lengths, "answer_starts": self.answers}
        for name, lengths in named.items():
            object.__setattr__(self, name, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64))

    starts: np.ndarray = field(init=False)
    column_starts: np.ndarray = field(init=False)
    answer_starts: np.ndarray = field(init=False)

    def answers_of(self, row: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Lengths and signs of the documents of a row with signs; none of one without."""
        if not len(self.answers) or not self.answers[row]:
            return (), ()
        own = slice(self.answer_starts[row], self.answer_starts[row + 1])
        return tuple(self.documents[own].tolist()), tuple(self.signs[own].tolist())

    def spread(self) -> tuple[np.ndarray, np.ndarray]:
        """The shortest and the longest document of each row, int64, length R; of a row without signs its length."""
        signed = np.flatnonzero(self.answers)
        if not len(signed):
            return self.lengths, self.lengths
        shortest, longest = self.lengths.copy(), self.lengths.copy()
        shortest[signed] = np.minimum.reduceat(self.documents, self.answer_starts[signed])
        longest[signed] = np.maximum.reduceat(self.documents, self.answer_starts[signed])
        return shortest, longest

    def kept_columns(self, row: int) -> Mapping[str, Json]:
        """The columns of a source row that stay with it."""
        if not len(self.column_lengths) or not self.column_lengths[row]:
            return {}
        columns: Mapping[str, Json] = json.loads(
            self.columns[self.column_starts[row] : self.column_starts[row + 1]].tobytes()
        )
        return columns


@dataclass(frozen=True)
class Chunk:
    """Some rows on their way into a piece: its arrays as bytes, findings with rows counted from its first."""

    arrays: Mapping[str, bytes]
    rows: int
    findings: Sequence[tuple[Found, int, int]]
    """Each with its row in the chunk and its line."""


class PieceWriter:
    """Writes chunks one after the other: into memory, or into files of a folder."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder, self._open = folder, ExitStack()
        self._memory: dict[str, bytearray] = {name: bytearray() for name in ARRAYS} if folder is None else {}
        self._files: dict[str, IO[bytes]] = {}
        if folder is not None:
            self._files = {name: self._open.enter_context((folder / f"{name}.bin").open("wb")) for name in ARRAYS}
        self._rows = 0
        self._needed: set[str] = set()
        self.findings: dict[str, Tally] = {}
        self.tokens = 0

    def add(self, chunk: Chunk) -> None:
        """Append rows."""
        for name, data in chunk.arrays.items():
            self._write(name, self._filled(name, data, chunk.rows))
        self.tokens += len(chunk.arrays["ids"]) // 4
        for found, row, line in chunk.findings:
            tally = self.findings.setdefault(found.id, Tally(line=line, detail=found.detail))
            tally.count += 1
            finding = FINDINGS.get(found.id)
            if finding is None or finding.stops or finding.drops:
                tally.rows.append(self._rows + row)
        self._rows += chunk.rows

    def _write(self, name: str, data: bytes) -> None:
        if self._folder is None:
            self._memory[name] += data
        else:
            self._files[name].write(data)

    def _filled(self, name: str, data: bytes, rows: int) -> bytes:
        """The values of a chunk for an array that is there where needed: from the first row with a value on, with
        zeros for rows without.
        """
        size = WHERE_NEEDED.get(name)
        if size is None:
            return data
        if data and name not in self._needed:
            self._needed.add(name)
            return bytes(self._rows * size) + data
        return data or bytes(rows * size if name in self._needed else 0)

    def close(self, read: int) -> Piece:
        """The piece; `read` rows were read in all."""
        if self._folder is None:
            arrays = {name: np.frombuffer(self._memory[name], dtype=kind) for name, kind in ARRAYS.items()}
            return Piece(**arrays, read=read, findings=self.findings)
        self._open.close()
        return opened(self._folder, read, self.findings)

    def discard(self) -> None:
        """Close the files of a piece that failed."""
        self._open.close()


def opened(folder: Path, read: int, findings: Mapping[str, Tally]) -> Piece:
    """The piece whose arrays lie in a folder, mapped into memory."""
    arrays: dict[str, Any] = {}
    for name, kind in ARRAYS.items():
        path = folder / f"{name}.bin"
        arrays[name] = np.memmap(path, dtype=kind, mode="r") if path.stat().st_size else np.zeros(0, dtype=kind)
    return Piece(**arrays, read=read, findings=findings)


def tallies_to_json(findings: Mapping[str, Tally]) -> dict[str, list[Any]]:
    """Findings as plain data."""
    return {name: [tally.count, tally.line, tally.detail, tally.rows] for name, tally in findings.items()}


def tallies_from_json(data: Mapping[str, Iterable[Any]]) -> dict[str, Tally]:
    """Findings from plain data."""
    return {name: Tally(*values) for name, values in data.items()}
