"""`row_losses.jsonl`: one row per line, highest loss first."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pegbox_row_losses.config import RowLossesConfig
from pegbox_row_losses.ledger import RowLoss, merge

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.rows import Examples

FILE = "row_losses.jsonl"
DIGITS = 6


def write_report(ctx: Context, states: Sequence[Any], examples: Examples | None) -> None:
    """Merge what the ranks recorded and write it, whole or not at all; rank 0 does."""
    if ctx.runtime.rank != 0:
        return
    listed = ranked(merge(states), ctx.section(RowLossesConfig))
    path = ctx.folder / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{FILE}.new")
    lines = (json.dumps(as_line(row, examples), ensure_ascii=False) + "\n" for row in listed)
    temporary.write_text("".join(lines), encoding="utf-8")
    temporary.replace(path)


def ranked(rows: Sequence[RowLoss], config: RowLossesConfig) -> list[RowLoss]:
    """The rows to list, in order; equal losses stay in the order of the dataset."""
    long_enough = [row for row in rows if row.tokens >= config.min_tokens]
    by_loss = sorted(long_enough, key=lambda row: -(row.loss if config.rank_by == "mean" else row.last_loss))
    return by_loss[: config.keep]


def as_line(row: RowLoss, examples: Examples | None) -> Mapping[str, object]:
    """What is written about one row; `where` is the file and line it came from."""
    where = examples.describe(row.row) if examples is not None else f"row {row.row}"
    return {
        "where": where,
        "loss": _rounded(row.loss),
        "last_loss": _rounded(row.last_loss),
        "tokens": row.tokens,
        "visits": row.visits,
        "row": row.row,
    }


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
