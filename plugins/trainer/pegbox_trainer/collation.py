"""Rows as one micro-batch of tensors.

    B  lines of a micro-batch    T  tokens of a line (padded)    N  trained tokens    S  document borders
    D  documents of the rows

Lines are padded on the right. Targets are the labels shifted by one, and the last token of each document is not
trained, so that no document predicts the start of the next one. A bin, rows that share a line, comes with positions
that start anew at each document and with the borders of all documents in the flattened batch; its padding is a document
of its own, and instead of a mask, the borders say who may attend to whom. Without bins a row is a line; the documents
of a row with signs (the two answers of a preference) are lines of their own then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy
import torch
from numpy.typing import NDArray
from pegbox.errors import DataError
from pegbox.rows import UNTRAINED, Batch, Example, Extra

Bin = Sequence[tuple[int, Example]]
"""Rows that share a line, each with its number in the dataset."""
Integers = NDArray[numpy.integer]

FILLER_TOKENS = 2
"""Length of a micro-batch without rows: enough for two documents, which a packed forward is tried with."""
UNSIGNED = 1
"""The sign of a row without one among rows with signs: it is a plain demonstration."""


@dataclass(frozen=True)
class Line:
    """What becomes one line of a batch: ids, labels, and lengths of documents."""

    ids: Integers
    labels: Integers
    documents: tuple[int, ...]


def collate(
    bins: Sequence[Bin], pad_id: int, describe: Callable[[int], str], *, pin: bool = False, packed: bool = False
) -> Batch:
    """One micro-batch of bins.

    No rows at all give one line of padding without a trained token: ranks that have nothing to compute still take
    part in the step, and do with it what the others do with theirs.

    Args:
        bins: what goes in, in order.
        pad_id: token id of padding.
        describe: where a row came from, for messages.
        pin: put tensors into page-locked memory, from which copies to a GPU do not wait.
        packed: other micro-batches of the step are packed.

    Raises:
        DataError: a row is empty, or its labels or documents do not fit its tokens.
    """
    rows = [numbered for rows in bins for numbered in rows]
    for number, example in rows:
        _check(example, number, describe)
    packed = packed or shares_lines(bins)
    lines = [line for rows_of_bin in bins for line in _lines(rows_of_bin, packed)]
    shape = (max(len(lines), 1), max((len(line.ids) for line in lines), default=FILLER_TOKENS))
    input_ids_BT = numpy.full(shape, pad_id, dtype=numpy.int64)
    targets_BT = numpy.full(shape, UNTRAINED, dtype=numpy.int64)
    document_BT = numpy.zeros(shape, dtype=numpy.int64)
    last_D: list[Integers] = []
    for b, line in enumerate(lines):
        length, ends = len(line.ids), numpy.cumsum(line.documents)
        input_ids_BT[b, :length] = line.ids
        targets_BT[b, : length - 1] = line.labels[1:]
        targets_BT[b, ends - 1] = UNTRAINED
        before = sum(map(len, last_D))
        document_BT[b, :length] = numpy.repeat(numpy.arange(before, before + len(ends)), line.documents)
        last_D.append(b * shape[1] + ends - 1)

    def tensor(array: NDArray[numpy.generic]) -> torch.Tensor:
        made = torch.from_numpy(array)
        return made.pin_memory() if pin else made

    trained_N = numpy.flatnonzero(targets_BT != UNTRAINED)
    padded = any(len(line.ids) < shape[1] for line in lines)
    positions, borders = _documents(lines, shape) if packed else (None, None)
    examples = [example for _, example in rows]
    signs, numbers = _signs(examples), _numbers(examples)
    return Batch(
        input_ids_BT=tensor(input_ids_BT),
        targets_BT=tensor(targets_BT),
        trained_N=tensor(trained_N),
        attention_mask_BT=tensor(_mask(lines, shape)) if padded and not packed else None,
        position_ids_BT=None if positions is None else tensor(positions),
        cu_seqlens_S=None if borders is None else tensor(borders),
        max_seqlen=None if borders is None else int(numpy.diff(borders).max()),
        document_N=tensor(document_BT.ravel()[trained_N]),
        last_D=tensor(numpy.concatenate([numpy.zeros(0, dtype=numpy.int64), *last_D])),
        sign_D=None if signs is None else tensor(signs),
        rows=tuple(number for number, _ in rows),
        extra={name: Extra(value=tensor(values), layout="document") for name, values in numbers},
    )


def shares_lines(bins: Sequence[Bin]) -> bool:
    """Whether documents share a line: rows are packed, or a row without signs has several documents."""
    return any(len(rows) > 1 or (example.documents and not example.signs) for rows in bins for _, example in rows)


def _lines(rows: Bin, packed: bool) -> Iterator[Line]:
    """The lines of one bin."""
    ids = [numpy.asarray(example.input_ids) for _, example in rows]
    labels = [numpy.asarray(example.labels) for _, example in rows]
    documents = tuple(length for _, example in rows for length in documents_of(example))
    whole = Line(numpy.concatenate(ids), numpy.concatenate(labels), documents)
    if packed:
        yield whole
        return
    ends = numpy.cumsum(documents)
    for start, end in zip((0, *ends[:-1]), ends, strict=True):
        yield Line(whole.ids[start:end], whole.labels[start:end], (int(end - start),))


def documents_of(example: Example) -> tuple[int, ...]:
    """The lengths of a row's documents; a row that names none is one."""
    return example.documents or (len(example.input_ids),)


def _signs(examples: Sequence[Example]) -> NDArray[numpy.int8] | None:
    if not any(example.signs for example in examples):
        return None
    signs = [example.signs or (UNSIGNED,) * len(documents_of(example)) for example in examples]
    return numpy.concatenate(signs).astype(numpy.int8)


def _numbers(examples: Sequence[Example]) -> Iterator[tuple[str, NDArray[numpy.float32]]]:
    """The kept columns that hold a number in every row, one value for each document."""
    for name in examples[0].columns if examples else ():
        values = [example.columns.get(name) for example in examples]
        if all(isinstance(value, int | float) for value in values):
            repeats = [len(documents_of(example)) for example in examples]
            yield name, numpy.repeat(numpy.array(values, dtype=numpy.float32), repeats)


def _mask(lines: Sequence[Line], shape: tuple[int, int]) -> NDArray[numpy.int64]:
    lengths = numpy.array([len(line.ids) for line in lines])
    return (numpy.arange(shape[1]) < lengths[:, None]).astype(numpy.int64)


def _documents(lines: Sequence[Line], shape: tuple[int, int]) -> tuple[NDArray[numpy.int64], NDArray[numpy.int32]]:
    """Positions within documents, and the borders of documents in the flattened batch, from 0 to B * T."""
    documents: list[int] = []
    for line in lines:
        padding = shape[1] - len(line.ids)
        documents += [*line.documents, *([padding] if padding else [])]
    if not lines:
        documents = [shape[1]] * shape[0]
    positions_BT = numpy.concatenate([numpy.arange(length) for length in documents]).reshape(shape)
    return positions_BT, numpy.cumsum([0, *documents], dtype=numpy.int32)


def _check(example: Example, index: int, describe: Callable[[int], str]) -> None:
    tokens, labels, documents = len(example.input_ids), len(example.labels), example.documents
    signs = example.signs
    if tokens == 0:
        raise DataError(f"{describe(index)} has no token", "An empty row cannot be trained.", "Remove the row.")
    if labels != tokens:
        raise DataError(
            f"{describe(index)} has {tokens} tokens and {labels} labels",
            "Each token has one label: its own id where it is trained, else -100.",
            "Fix the plugin that makes or refines the dataset.",
        )
    if documents and (sum(documents) != tokens or min(documents) < 1):
        raise DataError(
            f"{describe(index)} has {tokens} tokens, but its documents have lengths {list(documents)}",
            "The lengths of a packed row's documents are positive and sum to the row's.",
            "Fix the plugin that packs the rows.",
        )
    if signs and len(signs) != len(documents_of(example)):
        raise DataError(
            f"{describe(index)} has {len(documents_of(example))} documents and {len(signs)} signs",
            "Each document has one sign.",
            "Fix the plugin that makes or refines the dataset.",
        )
