"""From the section `data` to the rows of a split: read, render, tokenize, apply the length rule, hold out,
report.

Every bad row of a file is counted before the run stops, and the first is named with file and line. What is
dropped, cut or unusual is counted per reason and printed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from pegbox.errors import ConfigError, DataError

from pegbox_data.config import DataConfig
from pegbox_data.encoding import BORDER_TOKENS, Encoded, Encoder
from pegbox_data.entries import OpenedEntry, open_entry
from pegbox_data.examples import Table, TableBuilder, TableExamples
from pegbox_data.formats import Rendered

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Json, Processor, Split

    from pegbox_data.sources import Entry

BATCH_ROWS = 512

log = logging.getLogger("pegbox")


@dataclass
class Findings:
    """What happened to the rows of one file: errors, and counts with the line of the first case."""

    name: str
    read: int = 0
    bad: int = 0
    first: tuple[int, DataError] | None = None
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)

    def error(self, line: int, error: DataError) -> None:
        """A row that cannot be used."""
        self.bad += 1
        if self.first is None or line < self.first[0]:
            self.first = (line, error)

    def count(self, what: str, line: int, by: int = 1) -> None:
        """Something worth printing."""
        number, first = self.counts.get(what, (0, line))
        self.counts[what] = (number + by, first)

    def stop(self) -> None:
        """Raise for bad rows, or if there was none at all."""
        if self.first is not None:
            line, error = self.first
            more = f" (the first of {self.bad:,} bad rows among {self.read:,})" if self.bad > 1 else ""
            raise DataError(f"{self.name}:{line}: {error.what}{more}", error.why, error.next) from error
        if self.read == 0:
            raise DataError(
                f"{self.name} holds no rows",
                "The file is empty.",
                "Check the path, or how the file was written.",
            )

    def lines(self) -> Iterator[str]:
        for what, (number, line) in self.counts.items():
            yield f"{self.name}: {number:,} {what} (first: line {line})"


class Datasets:
    """The splits of one run. Files are checked at once, and tokenized when their split is asked for."""

    def __init__(self, ctx: Context, processor: Processor) -> None:
        self._ctx, self._config, self._processor = ctx, ctx.section(DataConfig), processor
        self._entries = {
            split: [open_entry(ctx, split, index, processor) for index in range(len(getattr(self._config, split)))]
            for split in ("train", "eval")
        }
        self._encoder = Encoder(processor)
        self._train: Table | None = None

    def split(self, split: Split) -> TableExamples | None:
        """The rows of a split; None if the config names none for it."""
        if split == "eval" and self._config.eval:
            table = self._load("eval")
            return self._examples(table, np.arange(len(table.lines)), split)
        held_out = self._config.eval_rows or self._config.eval_fraction
        if split == "eval" and not held_out:
            return None
        if self._train is None:
            self._train = self._load("train")
        out = self._held_out(self._train) if held_out else np.zeros(len(self._train.lines), dtype=bool)
        return self._examples(self._train, np.flatnonzero(out if split == "eval" else ~out), split)

    def _held_out(self, table: Table) -> np.ndarray:
        """Which rows are held out. Chosen among all rows read, so that no length rule moves a row."""
        fraction = self._config.eval_fraction
        count = self._config.eval_rows or max(1, round((fraction or 0.0) * table.read))
        if count >= table.read:
            key = "eval_rows" if self._config.eval_rows else "eval_fraction"
            raise ConfigError(
                f"data.{key} holds out {count:,} rows, but the training files have {table.read:,}",
                "At least one row must be left to train on.",
                f"Set data.{key} lower.",
            )
        chosen = self._ctx.rng("data/held_out").python().sample(range(table.read), count)
        return np.isin(table.positions, chosen)

    def _examples(self, table: Table, rows: np.ndarray, split: Split) -> TableExamples:
        if not len(rows):
            raise DataError(
                f"no row is left in the split '{split}'",
                f"All {table.read:,} rows are longer than data.max_length ({self._config.max_length}).",
                "Set data.max_length higher, or data.overlong: truncate.",
            )
        examples = TableExamples(table, rows, split, self._fingerprint(split))
        tokens = int(examples.lengths.sum())
        self._say(
            f"{split}: {len(rows):,} rows, {tokens:,} tokens, {examples.trained_tokens:,} of them trained "
            f"({examples.trained_tokens / tokens:.0%}), longest row {examples.lengths.max():,}"
        )
        return examples

    def _fingerprint(self, split: Split) -> str:
        config = self._config
        part: list[object] = [config.max_length, config.overlong, config.columns]
        if not config.eval and (config.eval_rows or config.eval_fraction):
            part += [split, config.eval_rows, config.eval_fraction, self._ctx.rng("data/held_out").seed]
        own = split if config.eval else "train"
        content = [self._processor.fingerprint, part, [entry.identity() for entry in self._entries[own]]]
        return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()

    def _load(self, split: Split) -> Table:
        builder, began = TableBuilder(), time.perf_counter()
        for entry in self._entries[split]:
            findings = Findings(entry.name)
            builder.names.append(entry.name)
            with self._encoder.session():
                for batch in _batches(entry, findings):
                    self._add(builder, entry, batch, findings)
            builder.read += findings.read
            findings.stop()
            for line in findings.lines():
                self._say(line)
        table = builder.build()
        rate = len(table.ids) / (time.perf_counter() - began)
        self._say(f"{split}: read {table.read:,} rows, tokenized at {rate:,.0f} tokens/s")
        return table

    def _add(self, builder: TableBuilder, entry: OpenedEntry, batch: list[_Row], findings: Findings) -> None:
        encoded = self._encoder.encode([row.rendered for row in batch])
        for row, tokens in zip(batch, encoded, strict=True):
            if tokens.border_tokens:
                findings.count(BORDER_TOKENS, row.line, tokens.border_tokens)
            for note in row.rendered.notes:
                findings.count(note, row.line)
            try:
                kept = self._fitted(tokens, row.line, findings)
            except DataError as error:
                findings.error(row.line, error)
                continue
            if kept is not None:
                builder.add(kept, row.line, builder.read + row.position, row.columns)

    def _fitted(self, row: Encoded, line: int, findings: Findings) -> Encoded | None:
        """The row within the length rule, or None if it is dropped."""
        if not row.trained.any():
            raise DataError(
                f"no token of this row is trained ({len(row.ids)} tokens)",
                "What should be trained is empty, or lies inside tokens that reach over its border.",
                "Remove the row, or check its answers.",
            )
        longest, length = self._config.max_length, len(row.ids)
        if longest is None or length <= longest:
            return row
        if self._config.overlong == "drop":
            findings.count(f"rows dropped: longer than data.max_length ({longest:,} tokens)", line)
            return None
        if self._config.overlong == "error":
            raise DataError(
                f"the row has {length:,} tokens, data.max_length is {longest:,}",
                "data.overlong is error.",
                "Set data.max_length higher, or data.overlong: drop or truncate.",
            )
        if not row.trained[:longest].any():
            raise DataError(
                f"cut to data.max_length ({longest:,} of {length:,} tokens), no token of this row is trained",
                "Its answers begin later.",
                "Set data.max_length higher, or data.overlong: drop.",
            )
        findings.count(f"rows cut to data.max_length ({longest:,} tokens)", line)
        return Encoded(row.ids[:longest], row.trained[:longest], row.border_tokens)

    def _say(self, message: str) -> None:
        if self._ctx.runtime.rank == 0:
            log.info("data: %s", message)


@dataclass(slots=True)
class _Row:
    rendered: Rendered
    line: int
    position: int
    columns: Mapping[str, Json]


def _batches(entry: OpenedEntry, findings: Findings) -> Iterator[list[_Row]]:
    """The usable rows of a file, rendered, some hundred at a time."""
    rows = _rows(entry, findings)
    while batch := list(islice(rows, BATCH_ROWS)):
        yield batch


def _rows(entry: OpenedEntry, findings: Findings) -> Iterator[_Row]:
    for source_row in islice(entry.read(), entry.limit):
        position = findings.read
        findings.read += 1
        try:
            row = _readable(source_row)
            rendered = entry.render(row)
            columns = {column: _column(row, column) for column in entry.columns}
        except DataError as error:
            findings.error(source_row.line, error)
        else:
            yield _Row(rendered, source_row.line, position, columns)


def _readable(entry: Entry) -> Mapping[str, Any]:
    if entry.row is None:
        raise entry.error or DataError("the row cannot be read")
    return entry.row


def _column(row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        raise DataError(
            f"no column '{column}', which data.columns keeps",
            f"The row has: {', '.join(map(str, row))}.",
            "Correct data.columns.",
        )
    return row[column]
