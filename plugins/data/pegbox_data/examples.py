"""The rows of a split, as the engine sees them: slices of tokenized pieces; labels are made when a row is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from pegbox.record import Json
from pegbox.rows import UNTRAINED, Example, Split

from pegbox_data.lengths import cut_documents

if TYPE_CHECKING:
    from pegbox_data.lengths import View
    from pegbox_data.pieces import Piece
    from pegbox_data.rows import Row


class ViewExamples:
    """The rows of a split held in memory or mapped into it.

    Attributes:
        split: the split they make.
        fingerprint: identifies content, format, template, tokenizer and every option that changes a row.
        lengths: tokens of each row, int64, length R.
        trained_tokens: trained tokens of all rows.

    Args:
        longest: documents of rows with signs are cut to so many tokens.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        names: Sequence[str],
        view: View,
        split: Split,
        fingerprint: str,
        longest: int | None = None,
    ) -> None:
        self.split, self.fingerprint = split, fingerprint
        self.lengths = view.stop - view.start
        self.trained_tokens = int(view.counts.sum())
        self._pieces, self._names, self._view, self._longest = pieces, names, view, longest

    def __len__(self) -> int:
        return len(self._view)

    def __getitem__(self, index: int) -> Example:
        view = self._view
        piece, start, stop = self._pieces[view.piece[index]], view.start[index], view.stop[index]
        row = int(view.row[index])
        documents, signs = piece.answers_of(row)
        ids, trained = piece.ids, piece.trained
        if sum(documents) > stop - start:
            whole = slice(start, start + sum(documents))
            documents, ids, trained = cut_documents(documents, ids[whole], trained[whole], self._longest)
            start, stop = 0, len(ids)
        return _example(ids[start:stop], trained[start:stop], piece.kept_columns(row), documents, signs)

    def describe(self, index: int) -> str:
        """`data/train.jsonl:17`."""
        piece = self._view.piece[index]
        return f"{self._names[piece]}:{self._pieces[piece].lines[self._view.row[index]]}"


class WindowExamples:
    """Some rows of a stream."""

    def __init__(
        self,
        rows: Sequence[tuple[str, Row, int, int]],
        split: Split,
        fingerprint: str,
    ) -> None:
        self.split, self.fingerprint = split, fingerprint
        self.lengths = np.array([stop - start for _, _, start, stop in rows], dtype=np.int64)
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        _, row, start, stop = self._rows[index]
        ids, trained = row.encoded.ids[start:stop], row.encoded.trained[start:stop]
        return _example(ids, trained, row.columns, row.documents, row.signs)

    def describe(self, index: int) -> str:
        """`data/train.jsonl:17`."""
        name, row, _, _ = self._rows[index]
        return f"{name}:{row.line}"


def _example(
    ids: np.ndarray,
    trained: np.ndarray,
    columns: Mapping[str, Json],
    documents: tuple[int, ...],
    signs: tuple[int, ...],
) -> Example:
    own = np.asarray(ids)
    labels = np.where(trained, own, np.int32(UNTRAINED))
    return Example(input_ids=own, labels=labels, documents=documents, signs=signs, columns=columns)  # type: ignore[arg-type]
