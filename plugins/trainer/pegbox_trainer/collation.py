"""Rows as one micro-batch of tensors.

    B  rows of a micro-batch      T  tokens of a row (padded)      N  trained tokens      S  document borders

Rows are padded on the right. Targets are the labels shifted by one, and the last token of each document is
not trained, so that no document predicts the start of the next one. Rows that are packed of documents come
with positions that start anew at each document and with the borders of all documents in the flattened batch;
their padding is a document of its own, and instead of a mask, the borders say who may attend to whom.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy
import torch
from numpy.typing import NDArray
from pegbox.errors import DataError
from pegbox.types import UNTRAINED, Batch, Example

Row = tuple[tuple[int, ...], Example]
"""The dataset rows of a bin, and what they are joined to."""

FILLER_TOKENS = 2
"""Length of a micro-batch without rows: enough for two documents, which a packed forward is tried with."""


def collate(
    rows: Sequence[Row], pad_id: int, describe: Callable[[int], str], *, pin: bool = False, packed: bool = False
) -> Batch:
    """One micro-batch of bins.

    No rows at all give one row of padding without a trained token: ranks that have nothing to compute still take
    part in the step, and do with it what the others do with theirs.

    Args:
        rows: what goes in, in order.
        pad_id: token id of padding.
        describe: where a row came from, for messages.
        pin: put tensors into page-locked memory, from which copies to a GPU do not wait.
        packed: other micro-batches of the step are packed.

    Raises:
        DataError: a row is empty, or its labels or documents do not fit its tokens.
    """
    for numbers, example in rows:
        _check(example, numbers[0], describe)
    examples = [example for _, example in rows]
    lengths = [len(example.input_ids) for example in examples]
    shape = (max(len(rows), 1), max(lengths, default=FILLER_TOKENS))
    input_ids_BT = numpy.full(shape, pad_id, dtype=numpy.int64)
    targets_BT = numpy.full(shape, UNTRAINED, dtype=numpy.int64)
    for b, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        input_ids_BT[b, :length] = numpy.asarray(example.input_ids)
        targets_BT[b, : length - 1] = numpy.asarray(example.labels)[1:]
        targets_BT[b, numpy.cumsum(example.documents or (length,)) - 1] = UNTRAINED

    def tensor(array: NDArray[numpy.integer]) -> torch.Tensor:
        made = torch.from_numpy(array)
        return made.pin_memory() if pin else made

    packed = packed or any(example.documents for example in examples)
    padded = any(length < shape[1] for length in lengths)
    positions, borders = _documents(examples, shape) if packed else (None, None)
    return Batch(
        input_ids_BT=tensor(input_ids_BT),
        targets_BT=tensor(targets_BT),
        trained_N=tensor(numpy.flatnonzero(targets_BT != UNTRAINED)),
        attention_mask_BT=tensor(_mask(lengths, shape)) if padded and not packed else None,
        position_ids_BT=None if positions is None else tensor(positions),
        cu_seqlens_S=None if borders is None else tensor(borders),
        max_seqlen=None if borders is None else int(numpy.diff(borders).max()),
        rows=tuple(row for numbers, _ in rows for row in numbers),
    )


def _mask(lengths: Sequence[int], shape: tuple[int, int]) -> NDArray[numpy.int64]:
    return (numpy.arange(shape[1]) < numpy.asarray(lengths)[:, None]).astype(numpy.int64)


def _documents(
    examples: Sequence[Example], shape: tuple[int, int]
) -> tuple[NDArray[numpy.int64], NDArray[numpy.int32]]:
    """Positions within documents, and the borders of documents in the flattened batch, from 0 to B * T."""
    documents: list[int] = []
    for example in examples:
        padding = shape[1] - len(example.input_ids)
        documents += [*(example.documents or (len(example.input_ids),)), *([padding] if padding else [])]
    if not examples:
        documents = [shape[1]] * shape[0]
    positions_BT = numpy.concatenate([numpy.arange(length) for length in documents]).reshape(shape)
    return positions_BT, numpy.cumsum([0, *documents], dtype=numpy.int32)


def _check(example: Example, index: int, describe: Callable[[int], str]) -> None:
    tokens, labels, documents = len(example.input_ids), len(example.labels), example.documents
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
