"""Splits and slices as `datasets` writes them: `train`, `train[:10%]`, `[100:-5]`."""

from __future__ import annotations

import re
from typing import NamedTuple

FORM = re.compile(r"(?P<name>[\w.-]*)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


class SplitSlice(NamedTuple):
    """A split by name, and which of its rows; bounds are row numbers or percentages as written, or empty."""

    name: str
    start: str
    stop: str

    @property
    def whole(self) -> bool:
        return not (self.start or self.stop)

    @property
    def needs_total(self) -> bool:
        """Whether the bounds depend on how many rows there are."""
        return any("%" in bound or bound.startswith("-") for bound in (self.start, self.stop))

    def bounds(self, total: int | None) -> tuple[int, int | None]:
        """First row, and the row behind the last (None: all that follow). `total` rows in all, if needed."""
        start = _bound(self.start, total, 0)
        stop = _bound(self.stop, total, total)
        return (start or 0), (stop if stop is None else max(stop, start or 0))


def parse_split(written: str) -> SplitSlice:
    """Read a split.

    Raises:
        ValueError: it is none; the message says what a split looks like.
    """
    found = FORM.fullmatch(written.strip())
    if found is None or not written.strip():
        raise ValueError(
            f"split is '{written}'. A split is a name, a slice or both. Write it like train, train[:10%] or [100:200]"
        )
    return SplitSlice(found["name"] or "", found["start"] or "", found["stop"] or "")


def _bound(written: str, total: int | None, otherwise: int | None) -> int | None:
    if not written:
        return otherwise
    if total is None and ("%" in written or written.startswith("-")):
        raise ValueError("a percentage or a negative bound needs the number of rows")
    if written.endswith("%"):
        assert total is not None
        # As `datasets` rounds: to the nearest row, so that [:50%] and [50%:] are disjoint and complete.
        at = round(int(written[:-1]) / 100 * total)
    else:
        at = int(written)
    if total is None:
        return at
    return min(max(at + total if at < 0 else at, 0), total)
