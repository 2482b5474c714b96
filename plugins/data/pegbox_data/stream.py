"""Rows of a split that is never held as a whole: read, rendered and tokenized ahead by a thread.

The stream's place is the place behind the last source row that was taken, and how many parts of the next one were
(rows that are too long may be split). From there a resumed run goes on: no row is skipped, none comes twice, and
nothing before it is read again. Every process reads the same rows; the trainer deals them out.
"""

from __future__ import annotations

import copy
import hashlib
import json
import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from pegbox.errors import DataError, RunError

from pegbox_data.config import DataConfig
from pegbox_data.cursor import Drawn, Mix, MixPlace
from pegbox_data.encoding import Encoder
from pegbox_data.examples import WindowExamples
from pegbox_data.findings import FINDINGS, stopping
from pegbox_data.lengths import cut_documents
from pegbox_data.rows import Row, RowEncoder

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.rows import Split
    from pegbox.types import Processor

    from pegbox_data.entries import OpenedEntry
    from pegbox_data.lengths import LengthRule

BATCH_ROWS = 64
BARREN = 100_000
"""So many rows in a row without one that can be used are an error: the stream would never end."""

Slice = tuple[str, Row, int, int]


@dataclass(frozen=True)
class Unit:
    """What became of one source row: rows of the stream, counts by reason, or an error."""

    slices: Sequence[Slice]
    counts: Sequence[str]
    error: DataError | None
    behind: MixPlace


class RowStream:
    """The rows of a split, over and over, in an order that the seed fixes."""

    split: Split = "train"

    def __init__(self, ctx: Context, entries: Sequence[OpenedEntry], rule: LengthRule, processor: Processor) -> None:
        self._ctx, self._entries, self._rule, self._processor = ctx, entries, rule, processor
        self._config = ctx.section(DataConfig)
        sketches = [[part.sketch() for part in entry.parts] + [dict(entry.settings)] for entry in entries]
        shares = [[entry.entry.share, entry.entry.split, entry.limit] for entry in entries]
        rules = [rule.longest, rule.shortest, rule.overlong, sorted(rule.allow)]
        content = json.dumps([sketches, shares, rules, processor.fingerprint, ctx.rng("data/share").seed], default=str)
        self.fingerprint = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
        self._place: MixPlace | None = None
        self._skip = 0
        self._unit: Unit | None = None
        self._ahead: _Ahead | None = None
        self.counts: dict[str, int] = {}
        self.rows = 0
        ctx.exit.callback(self.close)

    def take(self, rows: int) -> WindowExamples:
        """The next rows; the stream begins anew when its data ends."""
        taken: list[Slice] = []
        barren = 0
        while len(taken) < rows:
            unit = self._unit if self._unit is not None else self._next_unit()
            barren = 0 if unit.slices else barren + 1
            if barren > BARREN:
                raise DataError(
                    f"none of {BARREN:,} rows can be used, one after the other",
                    f"They are left out: {', '.join(f'{count:,} {what}' for what, count in self.counts.items())}.",
                    "Set data.max_length higher, or data.overlong: truncate.",
                )
            part = unit.slices[self._skip : self._skip + rows - len(taken)]
            taken += part
            self._skip += len(part)
            if self._skip < len(unit.slices):
                self._unit = unit
            else:
                self._unit, self._place, self._skip = None, unit.behind, 0
        self.rows += len(taken)
        return WindowExamples(taken, self.split, self.fingerprint)

    def state_dict(self) -> dict[str, object]:
        """The exact place: source rows, parts of a split row, choices between entries."""
        place = json.dumps(self._place) if self._place is not None else ""
        counts = json.dumps(self.counts)
        return {
            "fingerprint": self.fingerprint,
            "place": place,
            "skip": self._skip,
            "rows": self.rows,
            "counts": counts,
        }

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Go on from a place.

        Raises:
            RunError: the place belongs to other data or other settings.
        """
        if state_dict["fingerprint"] != self.fingerprint:
            raise RunError(
                "the place in the training data belongs to other data",
                "Files, formats, lengths or shares have changed, so rows would be skipped or repeated.",
                "Put the data back, or begin a new run from the checkpoint's weights.",
            )
        self.close()
        place = str(state_dict["place"])
        self._place = MixPlace.from_state(json.loads(place)) if place else None
        self._skip, self.rows = int(str(state_dict["skip"])), int(str(state_dict["rows"]))
        self.counts = json.loads(str(state_dict["counts"]))

    def close(self) -> None:
        """End the thread that reads ahead; the place remains."""
        if self._ahead is not None:
            self._ahead.close()
        self._ahead, self._unit = None, None

    def _next_unit(self) -> Unit:
        if self._ahead is None:
            self._ahead = _Ahead(self._units(), max(1, self._config.read_ahead // BATCH_ROWS))
        unit = self._ahead.next()
        if unit.error is not None:
            raise unit.error
        if not self._skip:  # else it was counted before the place was saved
            for what in unit.counts:
                self.counts[what] = self.counts.get(what, 0) + 1
        return unit

    def _units(self) -> Iterator[list[Unit]]:
        """What becomes of the source rows from the current place on, some at a time."""
        drawn = iter(Mix(self._ctx, self._entries, self._place))
        # A tokenizer of its own: the run's may be used while this thread works.
        tokenizer = copy.deepcopy(self._processor.tokenizer)
        with Encoder(replace(self._processor, tokenizer=tokenizer)).session() as encoder:
            encode = [RowEncoder(entry.render, encoder, self._config.columns) for entry in self._entries]
            while True:
                rows: list[Drawn] = []
                try:
                    rows += islice(drawn, BATCH_ROWS)
                except DataError as error:
                    yield [*self._batch(rows, encode), Unit((), (), error, MixPlace(()))]
                    return
                yield list(self._batch(rows, encode))

    def _batch(self, rows: Sequence[Drawn], encode: Sequence[RowEncoder]) -> Iterator[Unit]:
        made: dict[int, list[Row]] = {}
        bad: dict[int, DataError] = {}
        for entry in {row.entry for row in rows}:
            own = [number for number, row in enumerate(rows) if row.entry == entry]
            batch = encode[entry]([rows[number].row for number in own], 0)
            for row in batch.rows:
                made.setdefault(own[row.position], []).append(row)
            bad.update((own[position], error) for position, (_, error) in zip(batch.bad, batch.errors, strict=True))
        for number, drawn in enumerate(rows):
            if number in bad:
                error = bad[number]
                where = f"{drawn.name}:{drawn.row.line}: {error.what}"
                yield Unit((), (), DataError(where, error.why, error.next), drawn.behind)
            else:
                yield self._unit_of(drawn, made.get(number, ()))

    def _unit_of(self, drawn: Drawn, rows: Sequence[Row]) -> Unit:
        slices: list[Slice] = []
        counts: list[str] = []
        for row in rows:
            error = self._use(drawn.name, row, slices, counts)
            if error is not None:
                where = f"{drawn.name}:{row.line}: {error.what}"
                return Unit((), (), DataError(where, error.why, error.next), drawn.behind)
        return Unit(slices, counts, None, drawn.behind)

    def _use(self, name: str, row: Row, slices: list[Slice], counts: list[str]) -> DataError | None:
        """Add what becomes of a row, and what is counted of it; an error if it stops the run."""
        dropped, rule = False, self._rule
        for found in row.found:
            finding = FINDINGS.get(found.id)
            if finding is not None and finding.stops and found.id not in rule.allow:
                return stopping(found)
            dropped |= finding is not None and finding.drops
            counts.append(finding.counted if finding is not None else found.id)
        if dropped:
            return None
        documents = row.documents or (len(row.encoded.ids),)
        if rule.shortest is not None and min(documents) < rule.shortest:
            counts.append("rows dropped: shorter than data.min_length")
            return None
        if row.signs:
            return self._use_answers(name, row, slices, counts)
        return self._use_bounds(name, row, slices, counts)

    def _use_answers(self, name: str, row: Row, slices: list[Slice], counts: list[str]) -> DataError | None:
        """The same for a row with signs that is not too short."""
        if self._rule.longest is not None and max(row.documents) > self._rule.longest:
            left = self._rule.answers(row.documents, row.encoded.trained)
            if left.error is not None or not left.documents:
                counts.append(left.why or "rows dropped: longer than data.max_length")
                return left.error
            ids, trained = row.encoded.ids, row.encoded.trained
            kept, ids, trained = cut_documents(row.documents, ids, trained, self._rule.longest)
            row = replace(row, encoded=replace(row.encoded, ids=ids, trained=trained), documents=kept)
            counts.append("rows cut to data.max_length")
        slices.append((name, row, 0, len(row.encoded.ids)))
        return None

    def _use_bounds(self, name: str, row: Row, slices: list[Slice], counts: list[str]) -> DataError | None:
        """The same for a row without signs."""
        rule, length = self._rule, len(row.encoded.ids)
        bounds = rule.bounds(length, row.splits)
        if not bounds:
            counts.append("rows dropped: longer than data.max_length")
            return rule.too_long(length) if rule.overlong == "error" else None
        whole = bounds == [(0, length)]
        if not whole:
            counts.append(f"rows {'split' if len(bounds) > 1 else 'cut'} to data.max_length")
        for start, stop in bounds:
            trained = whole or np.count_nonzero(row.encoded.trained[start:stop])
            if trained and (rule.shortest is None or stop - start >= rule.shortest):
                slices.append((name, row, start, stop))
            elif len(bounds) > 1:
                counts.append("parts of split rows dropped: without a trained token, or too short")
            elif "truncated-away" in rule.allow:
                counts.append(f"{FINDINGS['truncated-away'].counted}: dropped")
            else:
                return rule.truncated_away(length)
        return None


class _Ahead:
    """Runs an iterator of batches in a thread, some batches ahead of whoever takes them."""

    def __init__(self, batches: Iterator[list[Unit]], most: int) -> None:
        self._queue: queue.Queue[list[Unit] | BaseException] = queue.Queue(maxsize=most)
        self._closed = threading.Event()
        self._current: deque[Unit] = deque()
        self._thread = threading.Thread(target=self._run, args=(batches,), name="pegbox-data", daemon=True)
        self._thread.start()

    def next(self) -> Unit:
        """The next unit; what the thread raised, raised here."""
        while not self._current:
            batch = self._queue.get()
            if isinstance(batch, BaseException):
                raise batch
            self._current.extend(batch)
        return self._current.popleft()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join()

    def _run(self, batches: Iterator[list[Unit]]) -> None:
        try:
            for batch in batches:
                if not self._put(batch):
                    return
        except BaseException as error:  # shown where the rows are taken
            self._put(error)

    def _put(self, item: list[Unit] | BaseException) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False
