"""From source rows to chunks of tokenized rows: render, tokenize, audit; in this process or in several.

The parent reads, workers render and tokenize batches of rows, and the parent takes results in the order of the rows:
the result does not depend on how many workers there are.
"""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from pegbox.errors import DataError, RunError

from pegbox_data.findings import Found
from pegbox_data.formats import Rendered
from pegbox_data.pieces import Chunk
from pegbox_data.signed import signed_rows

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from pegbox.record import Json

    from pegbox_data.encoding import Encoded, Encoder
    from pegbox_data.formats import Answers
    from pegbox_data.sources import Entry

BATCH_ROWS = 256
ALONE = 8
"""So many batches are tokenized by this process before others are started: they cost some tenths of a second."""

Render = Callable[[Mapping[str, Any]], "Rendered | Answers"]


@dataclass(slots=True)
class Row:
    """One tokenized row, and where it came from; with the lengths of its documents and their signs if it has any."""

    line: int
    position: int
    encoded: Encoded
    splits: bool
    found: list[Found]
    columns: Mapping[str, Json]
    documents: tuple[int, ...] = ()
    signs: tuple[int, ...] = ()


@dataclass(slots=True)
class Batch:
    """What became of some source rows: usable rows; numbers of bad ones, and errors with their lines."""

    rows: list[Row] = field(default_factory=list)
    bad: list[int] = field(default_factory=list)
    errors: list[tuple[int, DataError]] = field(default_factory=list)


@dataclass(frozen=True)
class RowEncoder:
    """Renders and tokenizes source rows of one entry; `encoder` is in a session."""

    render: Render
    encoder: Encoder
    columns: tuple[str, ...]

    def __call__(self, entries: Sequence[Entry], first: int) -> Batch:
        """The rows of some entries, the first of which is row number `first` of its part."""
        batch = Batch()
        usable: list[tuple[int, int, Rendered | Answers, Mapping[str, Json]]] = []
        for position, entry in enumerate(entries, first):
            try:
                row = _readable(entry)
                rendered = self.render(row)
                kept = _kept(row, self.columns, rendered)
            except DataError as error:
                batch.bad.append(position)
                batch.errors.append((entry.line, error))
            else:
                usable.append((entry.line, position, rendered, kept))
        encoded = iter(self.encoder.encode([text for _, _, rendered, _ in usable for text in _texts(rendered)]))
        for line, position, rendered, kept in usable:
            if isinstance(rendered, Rendered):
                tokens = next(encoded)
                found = self.encoder.audit(rendered, tokens)
                batch.rows.append(Row(line, position, tokens, rendered.split, found, kept))
            else:
                own = list(islice(encoded, len(rendered.texts)))
                batch.rows += [
                    Row(line, position, one.encoded, False, one.found, kept, one.documents, one.signs)
                    for one in signed_rows(rendered, own, self.encoder)
                ]
        return batch

    def chunk(self, entries: Sequence[Entry], first: int) -> tuple[Chunk, list[tuple[int, DataError]]]:
        """The same as bytes, which travel between processes at little cost."""
        batch = self(entries, first)
        return _chunk(batch.rows), batch.errors


def _texts(rendered: Rendered | Answers) -> Sequence[Rendered]:
    return (rendered,) if isinstance(rendered, Rendered) else rendered.texts


def _chunk(rows: Sequence[Row]) -> Chunk:
    ids = [row.encoded.ids for row in rows]
    trained = [row.encoded.trained for row in rows]
    columns: list[bytes] = []
    signed = rows if any(row.signs for row in rows) else ()
    if any(row.columns for row in rows):
        columns = [json.dumps(row.columns, default=str).encode() for row in rows]
    arrays = {
        "ids": np.concatenate(ids).astype("<i4").tobytes() if ids else b"",
        "trained": np.concatenate(trained).tobytes() if ids else b"",
        "lengths": np.array([len(tokens) for tokens in ids], dtype="<i8").tobytes(),
        "counts": np.array([np.count_nonzero(mask) for mask in trained], dtype="<i8").tobytes(),
        "lines": np.array([row.line for row in rows], dtype="<i8").tobytes(),
        "positions": np.array([row.position for row in rows], dtype="<i8").tobytes(),
        "splits": np.array([row.splits for row in rows], dtype="|b1").tobytes(),
        "digests": b"".join(map(_digest, rows)),
        "columns": b"".join(columns),
        "column_lengths": np.array([len(column) for column in columns], dtype="<i8").tobytes(),
        "documents": np.array([length for row in signed for length in row.documents], dtype="<i8").tobytes(),
        "signs": np.array([sign for row in signed for sign in row.signs], dtype="|i1").tobytes(),
        "answers": np.array([len(row.signs) for row in signed], dtype="|u1").tobytes(),
    }
    found = [(one, index, row.line) for index, row in enumerate(rows) for one in row.found]
    return Chunk(arrays, len(rows), found)


def _digest(row: Row) -> bytes:
    """Of tokens and mask, and of documents and signs: an answer and its opposite are not the same row."""
    content = row.encoded.ids.tobytes() + row.encoded.trained.tobytes()
    if row.signs:
        content += np.array([*row.documents, *row.signs], dtype="<i8").tobytes()
    return hashlib.blake2b(content, digest_size=16).digest()


def chunks(
    entries: Iterator[Entry], encode: RowEncoder, workers: int, alone: int = ALONE
) -> Iterator[tuple[int, Chunk, list[tuple[int, DataError]]]]:
    """Chunks in the order of the rows, each with how many rows were read for it, and the bad ones.

    The first `alone` batches are made by this process; if there are more, by `workers` processes.
    """
    batches = _numbered(entries)
    for first, batch in islice(batches, alone if workers > 1 else None):
        yield len(batch), *encode.chunk(batch, first)
    current = next(batches, None)
    if current is None:
        return
    with _workers(encode, workers) as connections:
        waiting: deque[tuple[Connection, int]] = deque()
        for connection in connections:
            if current is not None:
                connection.send(current)
                waiting.append((connection, len(current[1])))
                current = next(batches, None)
        while waiting:
            # One batch at a time for each worker: neither side ever waits for the other to empty a pipe.
            connection, read = waiting.popleft()
            done = _received(connection)
            if current is not None:
                connection.send(current)
                waiting.append((connection, len(current[1])))
                current = next(batches, None)
            yield read, *done


def _numbered(entries: Iterator[Entry]) -> Iterator[tuple[int, list[Entry]]]:
    first = 0
    while batch := list(islice(entries, BATCH_ROWS)):
        yield first, batch
        first += len(batch)


@contextmanager
def _workers(encode: RowEncoder, count: int) -> Iterator[list[Connection]]:
    """Connections to processes that render and tokenize. They are forked: templates and tokenizers are inherited."""
    context = multiprocessing.get_context("fork")
    with ExitStack() as stack:
        stack.enter_context(_one_thread_each())
        connections: list[Connection] = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(encode, theirs, [*connections, ours]), daemon=True)
            process.start()
            theirs.close()
            stack.callback(process.join)
            stack.callback(process.terminate)
            connections.append(ours)
        try:
            yield connections
        finally:
            for connection in connections:
                connection.close()


def _serve(encode: RowEncoder, connection: Connection, others: Sequence[Connection]) -> None:
    """The work of one process, until its parent closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()  # what was inherited is neither searched nor copied
    for other in others:
        other.close()
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            first, entries = connection.recv()
            try:
                result: object = encode.chunk(entries, first)
            except BaseException as error:  # a format of a third party may raise anything: the parent shows it
                error.add_note("raised in a process that tokenizes (data.workers)")
                result = error
            connection.send(result)


def _received(connection: Connection) -> tuple[Chunk, list[tuple[int, DataError]]]:
    try:
        result = connection.recv()
    except (EOFError, ConnectionResetError) as error:
        raise RunError(
            "a process that tokenizes ended without a word",
            "Most often the machine has run out of memory.",
            "Set data.workers to a smaller number.",
        ) from error
    if isinstance(result, BaseException):
        raise result
    return cast("tuple[Chunk, list[tuple[int, DataError]]]", result)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes, not the tokenizer's threads, use the cores; its Rust part reads this when it runs."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def worker_count(wanted: int | str) -> int:
    """How many processes to use: those that are asked for, or one for each core that this process may use."""
    if "fork" not in multiprocessing.get_all_start_methods() or multiprocessing.current_process().daemon:
        return 1
    if isinstance(wanted, int):
        return wanted
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _readable(entry: Entry) -> Mapping[str, Any]:
    if entry.row is None:
        raise entry.error or DataError("the row cannot be read")
    return entry.row


def _kept(row: Mapping[str, Any], columns: Sequence[str], rendered: Rendered | Answers) -> Mapping[str, Json]:
    """The columns that stay with a row: those that the config names, and what its format adds."""
    own = rendered.columns if isinstance(rendered, Rendered) else None
    if own is None:
        return {column: _column(row, column) for column in columns}
    return {**{column: _column(row, column) for column in columns if column not in own}, **own}


def _column(row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        raise DataError(
            f"no column '{column}', which data.columns keeps",
            f"The row has: {', '.join(map(str, row))}.",
            "Correct data.columns.",
        )
    return row[column]
