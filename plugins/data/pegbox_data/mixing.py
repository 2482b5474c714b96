"""How the rows of several entries become those of a split: duplicates, weights, order. All of it exact and seeded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pegbox_data.lengths import View, joined

if TYPE_CHECKING:
    from pegbox.context import Context

    from pegbox_data.pieces import Piece


def first_of_equal(pieces: Sequence[Piece], view: View) -> np.ndarray:
    """Which rows of a view are the first with their tokens and trained tokens; bool, length R.

    Rows that were cut are compared as source rows, whole: their parts stay together.
    """
    digests = np.concatenate([piece.digests.reshape(-1, 2) for piece in pieces])
    offsets = np.cumsum([0, *(len(piece.lengths) for piece in pieces)])
    sources = offsets[view.piece] + view.row
    present, source_of = np.unique(sources, return_inverse=True)
    keys = np.ascontiguousarray(digests[present]).view([("a", "<u8"), ("b", "<u8")]).ravel()
    _, first = np.unique(keys, return_index=True)
    kept = np.zeros(len(present), dtype=bool)
    kept[first] = True
    result: np.ndarray = kept[source_of]
    return result


def weighted(ctx: Context, view: View, weight: float, name: str) -> View:
    """Every row `weight` times: whole repetitions, then a seeded part of the rows, in their order.

    Of R rows exactly round(weight * R) remain, at least one.
    """
    rows = len(view)
    wanted = max(1, round(weight * rows)) if rows else 0
    whole, part = divmod(wanted, rows) if rows else (0, 0)
    chosen = np.sort(_permutation(ctx, f"data/weight/{name}", rows)[:part])
    return joined([view.take(np.arange(rows))] * whole + [view.take(chosen)])


def shuffled(ctx: Context, view: View, split: str) -> View:
    """The rows in a seeded order."""
    return view.take(_permutation(ctx, f"data/shuffle/{split}", len(view)))


def _permutation(ctx: Context, name: str, rows: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(ctx.rng(name).seed)).permutation(rows)
