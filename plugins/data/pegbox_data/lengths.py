"""The length rule, and the view of rows that it makes: which slices of which pieces are the rows of a split.

Rows are never copied: to truncate or to split a row is to choose other bounds of a slice. Of rows with signs the rule
is about each document: a cut takes the ends of answers, never the prompt. Whatever is left out, cut or refused is
counted by reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from pegbox.errors import DataError

from pegbox_data.findings import FINDINGS, Found, stopping

if TYPE_CHECKING:
    from pegbox_data.config import DataConfig
    from pegbox_data.pieces import Piece
    from pegbox_data.report import PartReport

NO_ROOM = "rows dropped: their prompt leaves no room for an answer within data.max_length"


@dataclass(frozen=True)
class View:
    """Rows as slices of pieces: arrays of length R.

    Attributes:
        piece: which piece; row: which of its rows; start, stop: tokens of the piece; counts: trained ones among them.
            Of rows with signs whose documents are cut, `stop - start` tokens are left, but not those in between.
    """

    piece: np.ndarray
    row: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    counts: np.ndarray

    def take(self, rows: np.ndarray) -> View:
        """Some of the rows, in another order, or several times."""
        return View(self.piece[rows], self.row[rows], self.start[rows], self.stop[rows], self.counts[rows])

    def __len__(self) -> int:
        return len(self.row)


class AnswersLeft(NamedTuple):
    """What is left of a row with signs: tokens of each document (none: the row is left out) and how many are trained;
    why it is left out, if not for its length alone; or the error that it is.
    """

    documents: tuple[int, ...]
    trained: int
    why: str
    error: DataError | None


@dataclass(frozen=True)
class LengthRule:
    """What happens to rows by their length, and to those with findings.

    Attributes:
        longest, shortest: tokens; None: no limit.
        overlong: `drop truncate split error`.
        allow: findings that do not stop.
    """

    longest: int | None
    shortest: int | None
    overlong: str
    allow: frozenset[str]

    @classmethod
    def of(cls, config: DataConfig) -> LengthRule:
        return cls(config.max_length, config.min_length, config.overlong, frozenset(config.allow))

    def bounds(self, length: int, splits: bool) -> list[tuple[int, int]]:
        """The slices of a row of this length that become rows of their own; none: the row is left out."""
        longest = self.longest
        if longest is None or length <= longest:
            return [(0, length)]
        if self.overlong == "split" or (splits and self.overlong == "drop"):
            return [(at, min(at + longest, length)) for at in range(0, length, longest)]
        return [(0, longest)] if self.overlong == "truncate" else []

    def answers(self, documents: Sequence[int], trained: np.ndarray) -> AnswersLeft:
        """What becomes of a row of documents with signs, one of which is longer than allowed; `trained` is its mask."""
        if self.overlong == "split":
            return AnswersLeft((), 0, "", _unsplittable())
        if self.overlong != "truncate":
            return AnswersLeft((), 0, "", self.too_long(max(documents)) if self.overlong == "error" else None)
        kept = tuple(min(length, self.longest or length) for length in documents)
        ends = np.cumsum(documents)
        counts = [
            int(np.count_nonzero(trained[end - d : end - d + k]))
            for end, d, k in zip(ends, documents, kept, strict=True)
        ]
        if not all(counts):
            return AnswersLeft((), 0, NO_ROOM, None)
        return AnswersLeft(kept, sum(counts), "", None)

    def too_long(self, length: int) -> DataError:
        """The error for a row that is too long."""
        return DataError(
            f"the row has {length:,} tokens, data.max_length is {self.longest:,}",
            "data.overlong is error.",
            "Set data.max_length higher, or data.overlong: drop, truncate or split.",
        )

    def truncated_away(self, length: int) -> DataError:
        """The error for a row whose cut left nothing to train."""
        seen = f"cut to data.max_length ({self.longest:,} of {length:,} tokens), no token of this row is trained"
        return stopping(Found("truncated-away", seen))


def apply(rule: LengthRule, piece: Piece, index: int, report: PartReport) -> View:
    """The rows of piece number `index` within the rule; what happened to the others goes to the report."""
    keep = _usable(rule, piece, report)
    shortest, lengths = piece.spread()
    if rule.shortest is not None:
        short = keep & (shortest < rule.shortest)
        report.count(f"rows dropped: shorter than data.min_length ({rule.shortest:,} tokens)", piece.lines[short])
        keep &= ~short
    long = keep & (lengths > rule.longest) if rule.longest is not None else np.zeros(len(lengths), dtype=bool)
    fitting = np.flatnonzero(keep & ~long)
    starts = piece.starts
    parts = [(fitting, starts[fitting], starts[fitting + 1], piece.counts[fitting])]
    if long.any():
        parts.append(_overlong(rule, piece, np.flatnonzero(long), report))
    row, start, stop, counts = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(start, kind="stable")
    view = View(np.full(len(row), index, dtype=np.int32), row, start, stop, counts)
    return view.take(order) if long.any() else view


def _usable(rule: LengthRule, piece: Piece, report: PartReport) -> np.ndarray:
    """Which rows remain after findings: those that stop are errors, those that are allowed are counted."""
    keep = np.ones(len(piece.lengths), dtype=bool)
    for name, tally in piece.findings.items():
        finding = FINDINGS.get(name)
        if finding is not None and finding.stops and name not in rule.allow:
            for row in sorted(set(tally.rows)):
                report.error(int(piece.lines[row]), stopping(Found(name, tally.detail)))
            continue
        dropped = finding is not None and finding.drops
        if dropped:
            keep[tally.rows] = False
        counted = finding.counted if finding is not None else name
        report.add(f"{counted}{': dropped' if dropped else ''}", tally.count, tally.line)
    return keep


def _overlong(
    rule: LengthRule, piece: Piece, rows: np.ndarray, report: PartReport
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows, starts, stops and counts of trained tokens of what becomes of rows that are too long."""
    made: list[tuple[int, int, int, int]] = []
    limit = f"data.max_length ({rule.longest:,} tokens)"
    for row in rows.tolist():
        length, line, begin = int(piece.lengths[row]), int(piece.lines[row]), int(piece.starts[row])
        documents, _ = piece.answers_of(row)
        if documents:
            left = rule.answers(documents, piece.trained[begin : begin + length])
            if left.error is not None:
                report.error(line, left.error)
            if left.documents:
                made.append((row, begin, begin + sum(left.documents), left.trained))
            report.add(
                f"rows cut to {limit}" if left.documents else left.why or f"rows dropped: longer than {limit}", 1, line
            )
            continue
        bounds = rule.bounds(length, bool(piece.splits[row]))
        if not bounds:
            if rule.overlong == "error":
                report.error(line, rule.too_long(length))
            report.add(f"rows dropped: longer than {limit}", 1, line)
            continue
        report.add(f"rows {'split' if len(bounds) > 1 else 'cut'} to {limit}", 1, line)
        for start, stop in bounds:
            trained = int(np.count_nonzero(piece.trained[begin + start : begin + stop]))
            if trained and (rule.shortest is None or stop - start >= rule.shortest):
                made.append((row, begin + start, begin + stop, trained))
            elif len(bounds) > 1:
                what = "without a trained token" if not trained else "shorter than data.min_length"
                report.add(f"parts of split rows dropped: {what}", 1, line)
            elif "truncated-away" in rule.allow:
                report.add(f"{FINDINGS['truncated-away'].counted}: dropped", 1, line)
            else:
                report.error(line, rule.truncated_away(length))
    columns = np.array(made, dtype=np.int64).reshape(-1, 4).T
    return columns[0], columns[1], columns[2], columns[3]


def joined(views: Sequence[View]) -> View:
    """The rows of several views, one after the other."""
    names = ("piece", "row", "start", "stop", "counts")
    return View(*(np.concatenate([getattr(view, name) for view in views]) for name in names))


def cut_documents(
    documents: Sequence[int], ids: np.ndarray, trained: np.ndarray, longest: int | None
) -> tuple[tuple[int, ...], np.ndarray, np.ndarray]:
    """Documents that stand one after the other, each without what lies behind its first `longest` tokens."""
    kept = tuple(length if longest is None else min(length, longest) for length in documents)
    starts = np.cumsum([0, *documents])
    chosen = np.concatenate([np.arange(start, start + length) for start, length in zip(starts, kept, strict=False)])
    return kept, ids[chosen], trained[chosen]


def _unsplittable() -> DataError:
    return DataError(
        "the row has answers with signs, and data.overlong is split",
        "Parts of an answer are not what was preferred.",
        "Set data.overlong: drop, or truncate.",
    )
