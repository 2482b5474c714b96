"""Places in the entries of a stream, and the endless order in which their rows come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from pegbox.errors import ConfigError, DataError

from pegbox_data.sources import Place

if TYPE_CHECKING:
    from pegbox.context import Context

    from pegbox_data.entries import OpenedEntry
    from pegbox_data.sources import Entry

BLOCK = 4096
"""So many choices between entries are drawn at once."""


class EntryPlace(NamedTuple):
    """Where reading an entry goes on: its part, the place there, rows read in this round, and rounds completed."""

    part: int = 0
    offset: int = 0
    line: int = 0
    token: str = ""
    read: int = 0
    round: int = 0


class MixPlace(NamedTuple):
    """Where reading all entries goes on. `draw` counts rows drawn."""

    entries: tuple[EntryPlace, ...]
    draw: int = 0

    @classmethod
    def from_state(cls, state: Sequence[object]) -> MixPlace:
        entries, draw = state
        return cls(tuple(EntryPlace(*place) for place in entries), int(draw))  # type: ignore[attr-defined,call-overload]


class Drawn(NamedTuple):
    """A source row of a stream: its entry, what messages call its part, the row, and the place behind it."""

    entry: int
    name: str
    row: Entry
    behind: MixPlace


class EntryCursor:
    """Reads one entry from a place on, over and over."""

    def __init__(self, entry: OpenedEntry, place: EntryPlace) -> None:
        if entry.wanted.needs_total:
            raise ConfigError(
                f"data.{entry.key}.split is '{entry.entry.split}', and data.streaming is set",
                "How many rows a stream has is not known before its end.",
                "Write the slice with row numbers, such as train[1000:].",
            )
        self._entry, self.place = entry, place
        self._start, self._stop = entry.bounds()
        self._rows: Iterator[Entry] | None = None

    def next(self) -> tuple[str, Entry] | None:
        """What messages call its part, and the next row; None once at the end of each round."""
        while True:
            place, parts = self.place, self._entry.parts
            if place.part == len(parts) or (self._stop is not None and place.read >= self._stop):
                if place.read <= self._start:
                    raise DataError(
                        f"data.{self._entry.key} holds no rows",
                        "Its files are empty, or its slice begins behind their end.",
                        "Check its path and split.",
                    )
                self.place, self._rows = EntryPlace(round=place.round + 1), None
                return None
            part = parts[place.part]
            if self._rows is None:
                self._rows = iter(part.read(Place(place.offset, place.line, place.token)))
            row = next(self._rows, None)
            if row is None:
                self.place, self._rows = EntryPlace(place.part + 1, read=place.read, round=place.round), None
                continue
            behind = row.behind
            self.place = EntryPlace(place.part, behind.offset, behind.line, behind.token, place.read + 1, place.round)
            if place.read >= self._start:
                return part.name, row


class Mix:
    """The rows of several entries in an endless order: one entry after the other, or drawn by their shares.

    The order depends on the seed and the number of rows drawn alone.
    """

    def __init__(self, ctx: Context, entries: Sequence[OpenedEntry], place: MixPlace | None) -> None:
        self._ctx = ctx
        self._place = place if place is not None else MixPlace(tuple(EntryPlace() for _ in entries))
        self._cursors = [EntryCursor(entry, at) for entry, at in zip(entries, self._place.entries, strict=True)]
        shares = np.array([entry.entry.share or 0.0 for entry in entries])
        self._bounds = np.cumsum(shares) / shares.sum() if shares.any() else None
        self._choices: tuple[int, np.ndarray] = (-1, np.zeros(0, dtype=np.int64))

    def __iter__(self) -> Iterator[Drawn]:
        while True:
            index = self._chosen()
            cursor = self._cursors[index]
            found = cursor.next()
            if found is None:
                continue
            self._place = MixPlace(tuple(cursor.place for cursor in self._cursors), self._place.draw + 1)
            yield Drawn(index, *found, self._place)

    def _chosen(self) -> int:
        """The entry whose turn it is."""
        if self._bounds is None:
            rounds = [cursor.place.round for cursor in self._cursors]
            return rounds.index(min(rounds))
        block, at = divmod(self._place.draw, BLOCK)
        if self._choices[0] != block:
            generator = np.random.Generator(np.random.Philox(self._ctx.rng("data/share", block).seed))
            self._choices = (block, np.searchsorted(self._bounds, generator.random(BLOCK), side="right"))
        return int(self._choices[1][at])
