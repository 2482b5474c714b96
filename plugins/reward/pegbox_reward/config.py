"""The section `reward` of a config."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pegbox.errors import DataError
from pegbox.rows import ExampleStream
from pegbox.section import Section, setting

if TYPE_CHECKING:
    from pegbox.rows import Dataset

PAIR = (1, -1)
"""The signs of a row: its answers in order, chosen and rejected."""


class RewardConfig(Section):
    """Training of an outcome reward model on preferences. The rows are pairs: chosen, then rejected."""

    margin: bool = setting(
        False,
        "Ask for a difference of at least the pair's margin: the column `margin` of the rows, a number that "
        "`data.columns: [margin]` keeps.",
    )
    center: float = setting(
        0.0, "Weight of the mean of (chosen + rejected)², which keeps rewards around zero; 0.01 is usual.", ge=0.0
    )


def require_pair_rows(rows: Dataset) -> None:
    """Raise if the first row is no pair; a stream and later rows are looked at when they are batches.

    Raises:
        DataError: naming the row.
    """
    if not isinstance(rows, ExampleStream) and len(rows) and rows[0].signs != PAIR:
        raise DataError(
            f"{rows.describe(0)} is no pair of a chosen and a rejected answer",
            "A reward model learns which of two answers is the better one.",
            "Give the data the format preference; or train with prm, if it judges steps.",
        )
