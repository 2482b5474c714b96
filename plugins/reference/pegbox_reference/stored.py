"""Log-probabilities on disk: written row by row in the order of the dataset, read by row, never all in memory.

A folder holds, for R rows of D documents with N trained tokens in all:

    logps.f32        N float32: log-probabilities of trained tokens, row after row
    tokens.i64       D + 1: where the trained tokens of each document begin
    documents.i64    R + 1: where the documents of each row begin
    targets.u32      R: CRC-32 of the ids of each row's trained tokens, which says whose the log-probabilities are
    progress.json    how much of the above is complete

While it is written its name ends in `.partial`. What `progress.json` counts was flushed to the disk before it, so an
interrupted writer goes on from there; a complete folder is renamed, and then never changes.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pegbox.errors import RunError

if TYPE_CHECKING:
    from pegbox.rows import Batch

FORMAT = 1
"""Raised when the same data would be written differently."""
PROGRESS = "progress.json"
TYPES = {"logps.f32": np.float32, "tokens.i64": np.int64, "documents.i64": np.int64, "targets.u32": np.uint32}


class Row(NamedTuple):
    """What is kept of one row: trained tokens of each document, their targets' checksum, their log-probabilities."""

    documents: list[int]
    targets: int
    logps: NDArray[np.float32]


def checksum(targets_N: NDArray[np.int64]) -> int:
    """CRC-32 of token ids."""
    return zlib.crc32(np.ascontiguousarray(targets_N, dtype=np.int64).tobytes())


def rows_of(batch: Batch, documents: Sequence[int], logps_N: NDArray[np.float32]) -> list[Row]:
    """The rows of a batch on the host; `documents` says how many each has."""
    lengths = _document_lengths(batch)
    targets_N = batch.targets_BT.flatten()[batch.trained_N].numpy()
    rows, document, token = [], 0, 0
    for count in documents:
        own = lengths[document : document + count]
        end = token + sum(own)
        rows.append(Row(own, checksum(targets_N[token:end]), logps_N[token:end]))
        document, token = document + count, end
    return rows


def _document_lengths(batch: Batch) -> list[int]:
    """Trained tokens of each document, in order."""
    assert batch.document_N is not None, "a batch that names its rows names its documents"
    assert batch.last_D is not None, "a batch that names its rows names its documents"
    lengths: list[int] = np.bincount(batch.document_N.numpy(), minlength=len(batch.last_D)).tolist()
    return lengths


class Writer:
    """Appends rows to a partial folder; goes on where an earlier one was interrupted."""

    def __init__(self, folder: Path) -> None:
        self.final = folder
        self._folder = folder.with_name(f"{folder.name}.partial")
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / PROGRESS
        begun = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.rows, self._documents, self._tokens = (begun.get(key, 0) for key in ("rows", "documents", "tokens"))
        sizes = {
            "logps.f32": self._tokens,
            "tokens.i64": self._documents + 1,
            "documents.i64": self.rows + 1,
            "targets.u32": self.rows,
        }
        for name, size in sizes.items():
            whole = size * np.dtype(TYPES[name]).itemsize
            with (self._folder / name).open("ab") as file:
                file.truncate(whole if begun else 0)
        if not begun:
            self._append({"tokens.i64": [0], "documents.i64": [0]})

    def append(self, rows: Iterable[Row]) -> None:
        """Write rows and wait until they are on the disk."""
        documents, tokens, targets, logps = [], [], [], []
        for row in rows:
            for length in row.documents:
                self._tokens += length
                tokens.append(self._tokens)
            self._documents += len(row.documents)
            documents.append(self._documents)
            targets.append(row.targets)
            logps.append(row.logps)
        self.rows += len(documents)
        values = np.concatenate(logps) if logps else np.zeros(0, np.float32)
        self._append({"logps.f32": values, "tokens.i64": tokens, "documents.i64": documents, "targets.u32": targets})
        progress = {"rows": self.rows, "documents": self._documents, "tokens": self._tokens}
        temporary = self._folder / f"{PROGRESS}.new"
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(progress) + "\n")
            _sync(file.fileno())
        temporary.replace(self._folder / PROGRESS)

    def finish(self) -> None:
        """Give the folder its name: it is complete."""
        self._folder.rename(self.final)

    def _append(self, columns: dict[str, Sequence[int] | NDArray[np.float32]]) -> None:
        for name, values in columns.items():
            with (self._folder / name).open("ab") as file:
                file.write(np.asarray(values, dtype=TYPES[name]).tobytes())
                _sync(file.fileno())


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)


class Stored:
    """A complete folder. Only what is asked for is read from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._logps, self._tokens, self._documents, self._targets = (
            np.memmap(folder / name, dtype=kind, mode="r") if (folder / name).stat().st_size else np.zeros(0, kind)
            for name, kind in TYPES.items()
        )

    def __len__(self) -> int:
        return len(self._documents) - 1

    def logps(self, batch: Batch) -> NDArray[np.float32]:
        """Of the trained tokens of a batch on the host, (N,).

        Raises:
            RunError: a row has other trained tokens than it had when its log-probabilities were computed.
        """
        lengths, token, document, found = _document_lengths(batch), 0, 0, []
        targets_N = batch.targets_BT.flatten()[batch.trained_N].numpy()
        for row in batch.rows:
            if row >= len(self):
                raise self._other(row, "no such row")
            first, last = (int(at) for at in self._documents[row : row + 2])
            borders = np.asarray(self._tokens[first : last + 1])
            end = token + int(borders[-1] - borders[0])
            if lengths[document : document + last - first] != np.diff(borders).tolist():
                raise self._other(row, f"{np.diff(borders).tolist()} trained tokens in its documents")
            if checksum(targets_N[token:end]) != int(self._targets[row]):
                raise self._other(row, "as many trained tokens, but not these")
            found.append(np.asarray(self._logps[int(borders[0]) : int(borders[-1])]))
            token, document = end, document + last - first
        return np.concatenate(found) if found else np.zeros(0, np.float32)

    def _other(self, row: int, had: str) -> RunError:
        return RunError(
            f"row {row} of a batch is not the row whose reference was computed: {self.folder} has {had}",
            "Precomputed log-probabilities belong to the rows of the data as they were.",
            "Set reference.how to copy or adapter: a plugin changes rows after the dataset is made.",
        )
