"""Preferences in a batch: document 2 p is the wanted answer of pair p, document 2 p + 1 the unwanted one.

    N  trained tokens    D  documents    P  pairs, D / 2

What looks at values does so on the host, before the batch moves; the rest never waits for the device. A micro-batch
without rows has no document, no pair, and totals of zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pegbox.errors import DataError
from pegbox.rows import ExampleStream
from pegbox.types import Term

if TYPE_CHECKING:
    from pegbox.rows import Batch, Dataset
    from torch import Tensor

NAMED_ROWS = 8
PAIR = (1, -1)
"""The signs of a row: its answers in order, wanted and unwanted."""


def require_pair_rows(rows: Dataset) -> None:
    """Raise if the first row is no pair; a stream and later rows are looked at when they are batches.

    Raises:
        DataError: naming the row.
    """
    if not isinstance(rows, ExampleStream) and len(rows) and rows[0].signs != PAIR:
        raise DataError(
            f"{rows.describe(0)} is no pair of a chosen and a rejected answer",
            "This loss compares the two answers of each row.",
            "Give the data the format preference; or take another loss: kto for answers that stand alone.",
        )


def count_pairs(batch: Batch) -> int:
    """P, of a batch on the host.

    Raises:
        DataError: the documents are no pairs, or one of them has no trained token.
    """
    documents = count_documents(batch)
    if documents == 0:
        return 0
    assert batch.sign_D is not None, "count_documents asks"
    assert batch.document_N is not None, "batches name the documents of their tokens"
    signs = batch.sign_D.tolist()
    if signs != [1, -1] * (documents // 2):
        raise _no_pairs(batch, f"have documents with the signs {signs[: 2 * NAMED_ROWS]}, which are no pairs")
    empty = set(range(documents)) - set(batch.document_N.tolist())
    if empty:
        at = min(empty)
        where = f"row {batch.rows[at // 2]}" if 2 * len(batch.rows) == documents else f"one of {_named(batch)}"
        raise DataError(
            f"the {'rejected' if at % 2 else 'chosen'} answer of {where} of the data has no trained token",
            "An answer without tokens has no probability to compare.",
            "Remove the row, or let the data section drop rows that are too long instead of cutting them.",
        )
    return documents // 2


def count_documents(batch: Batch) -> int:
    """D; no device is asked.

    Raises:
        DataError: the rows do not say which answer is wanted, or an answer lacks its other one.
    """
    assert batch.last_D is not None, "batches name the ends of their documents"
    documents = int(batch.last_D.shape[0])
    if documents and batch.sign_D is None:
        raise _no_pairs(batch, "do not say which answer is wanted")
    if documents % 2:
        raise _no_pairs(batch, f"have {documents} documents, and one is left without its other one")
    return documents


def sums_by_document(values_N: Tensor, batch: Batch) -> Tensor:
    """The sum over the trained tokens of each document, float32 of length D; it hangs on the graph of `values_N`."""
    assert batch.document_N is not None, "batches name the documents of their tokens"
    values_N = values_N.float()
    return values_N.new_zeros(count_documents(batch)).index_add(0, batch.document_N, values_N)


def lengths_by_document(batch: Batch) -> Tensor:
    """Trained tokens of each document, float32 of length D."""
    assert batch.document_N is not None, "batches name the documents of their tokens"
    return sums_by_document(batch.document_N.new_ones(batch.document_N.shape), batch)


def split_pairs(values_D: Tensor) -> tuple[Tensor, Tensor]:
    """The values of the wanted and of the unwanted answers, length P each."""
    chosen_P, rejected_P = values_D.view(-1, 2).unbind(1)
    return chosen_P, rejected_P


def figures(rewards_D: Tensor, logps_D: Tensor) -> tuple[Term, ...]:
    """What is logged of pairs, under the names of the field; none of it has a gradient."""
    chosen_P, rejected_P = split_pairs(rewards_D.detach())
    chosen_logps_P, rejected_logps_P = split_pairs(logps_D.detach())
    named = {
        "rewards/chosen": chosen_P,
        "rewards/rejected": rejected_P,
        "rewards/accuracies": (chosen_P > rejected_P).float(),
        "rewards/margins": chosen_P - rejected_P,
        "logps/chosen": chosen_logps_P,
        "logps/rejected": rejected_logps_P,
    }
    return tuple(Term(name=name, total=values_P.sum(), count=float(len(values_P))) for name, values_P in named.items())


def _no_pairs(batch: Batch, seen: str) -> DataError:
    return DataError(
        f"{_named(batch)} of the data {seen}",
        "This loss compares two answers: each row is a preference, the wanted answer before the unwanted one.",
        "Name a format of preferences in the data section.",
    )


def _named(batch: Batch) -> str:
    more = len(batch.rows) - NAMED_ROWS
    return f"rows {', '.join(map(str, batch.rows[:NAMED_ROWS]))}" + (f" and {more} more" if more > 0 else "")
