"""From the section `data` to the rows of a split: read, render, tokenize (or open what is kept), apply the length
rule, mix, hold out, report.

Tokenized rows are kept part by part, so that a new file or another weight makes nothing else be tokenized again.
Every bad row of a part is counted before the run stops, and the first is named with file and line.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from pegbox.errors import ConfigError, DataError

from pegbox_data.cache import Cache, default_folder, key_of
from pegbox_data.config import DataConfig
from pegbox_data.encoding import Encoder
from pegbox_data.entries import OpenedEntry, count_rows, open_entry
from pegbox_data.examples import ViewExamples
from pegbox_data.files import DigestMemo
from pegbox_data.formats import TEMPLATES
from pegbox_data.lengths import LengthRule, View, apply, joined
from pegbox_data.mixing import first_of_equal, shuffled, weighted
from pegbox_data.pieces import Piece, PieceWriter
from pegbox_data.report import PartReport, nothing_left, summary
from pegbox_data.rows import ALONE, RowEncoder, chunks, worker_count
from pegbox_data.twins import with_templates

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.rows import Examples, Split
    from pegbox.types import Processor

    from pegbox_data.sources import Part
    from pegbox_data.stream import RowStream

log = logging.getLogger("pegbox")


@dataclass
class Loaded:
    """The rows of all entries of a split, before any is held out.

    Attributes:
        pieces, names: one for each part. entries: which entry each piece belongs to.
        offsets: rows read before each piece, and in all.
        views: its rows within the length rule.
        identities: what each piece depends on.
    """

    pieces: list[Piece] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=lambda: [0])
    views: list[View] = field(default_factory=list)
    identities: list[object] = field(default_factory=list)

    def add(self, name: str, entry: int, piece: Piece, view: View, identity: object) -> None:
        """Append a part."""
        self.pieces.append(piece)
        self.names.append(name)
        self.entries.append(entry)
        self.offsets.append(self.offsets[-1] + piece.read)
        self.views.append(view)
        self.identities.append(identity)

    def positions(self, view: View) -> np.ndarray:
        """The number of each row of a view among all rows read, int64, length R."""
        positions = np.concatenate([piece.positions + at for piece, at in zip(self.pieces, self.offsets, strict=False)])
        sizes = np.cumsum([0, *(len(piece.lengths) for piece in self.pieces)])
        found: np.ndarray = positions[sizes[view.piece] + view.row]
        return found


class Datasets:
    """The splits of one run. Entries are checked at once, and tokenized when their split is asked for."""

    def __init__(self, ctx: Context, processor: Processor) -> None:
        processor = with_templates(ctx, processor)
        self._ctx, self._config, self._processor = ctx, ctx.section(DataConfig), processor
        self._entries = {
            split: [open_entry(ctx, split, index, processor) for index in range(len(getattr(self._config, split)))]
            for split in ("train", "eval")
        }
        self._encoder = Encoder(processor)
        self._rule = LengthRule.of(self._config)
        self.cache = self._open_cache()
        self._memo = DigestMemo(self.cache.folder if self.cache is not None else None)
        self._loaded: dict[str, Loaded] = {}
        self._kept: set[str] = set()
        self._stream: RowStream | None = None
        self.report: list[str] = []

    def split(self, split: Split) -> Examples | RowStream | None:
        """The rows of a split; None if the config names none for it."""
        config = self._config
        if split == "train" and config.streaming:
            from pegbox_data.stream import RowStream

            if self._stream is None:
                self._stream = RowStream(self._ctx, self._entries["train"], self._rule, self._processor)
            return self._stream
        held_out = bool(config.eval_rows or config.eval_fraction)
        if split == "eval" and not (config.eval or held_out):
            return None
        own: Split = "eval" if split == "eval" and config.eval else "train"
        loaded = self._load(own)
        view = joined(loaded.views)
        if config.deduplicate:
            kept = first_of_equal(loaded.pieces, view)
            self._say(f"{own}: {np.count_nonzero(~kept):,} rows dropped: the same tokens as an earlier row", once=True)
            view = view.take(np.flatnonzero(kept))
        if held_out:
            out = self._held_out(loaded, view)
            view = view.take(np.flatnonzero(out if split == "eval" else ~out))
        return self._examples(loaded, self._mixed(loaded, view, split), split)

    def stream_report(self) -> list[str]:
        """What became of the rows of a stream so far."""
        if self._stream is None:
            return []
        counts = [f"train: {count:,} {what}" for what, count in self._stream.counts.items()]
        return [f"train: {self._stream.rows:,} rows were taken from the stream", *counts]

    def kept_bytes(self) -> int:
        """Size on disk of the kept rows that this run uses."""
        return sum(self.cache.bytes_of(key) for key in self._kept) if self.cache is not None else 0

    def _open_cache(self) -> Cache | None:
        written = self._config.cache
        if written == "off":
            return None
        folder = default_folder() if written == "auto" else self._ctx.config.path(written)
        return Cache(folder, self._say)

    def _mixed(self, loaded: Loaded, view: View, split: Split) -> View:
        config = self._config
        own = "eval" if split == "eval" and config.eval else "train"
        weights = [entry.entry.weight for entry in self._entries[own]]
        if split == own and any(weight is not None for weight in weights):
            belongs = np.array(loaded.entries)[view.piece]
            parts = [
                weighted(self._ctx, view.take(np.flatnonzero(belongs == index)), weight or 1.0, f"{split}.{index}")
                for index, weight in enumerate(weights)
            ]
            view = joined(parts)
        if config.shuffle:
            view = shuffled(self._ctx, view, split)
        if config.limit is not None and len(view) > config.limit:
            # Spread over the whole: a dry run sees every entry.
            view = view.take(np.linspace(0, len(view) - 1, config.limit).round().astype(np.int64))
        return view

    def _held_out(self, loaded: Loaded, view: View) -> np.ndarray:
        """Which rows are held out. Chosen among all rows read, so that no length rule moves a row."""
        config, read = self._config, loaded.offsets[-1]
        limited = config.eval_rows if config.limit is None else min(config.eval_rows or 0, config.limit)
        count = limited or max(1, round((config.eval_fraction or 0.0) * read))
        if count >= read:
            key = "eval_rows" if config.eval_rows else "eval_fraction"
            raise ConfigError(
                f"data.{key} holds out {count:,} rows, but the training files have {read:,}",
                "At least one row must be left to train on.",
                f"Set data.{key} lower.",
            )
        chosen = self._ctx.rng("data/held_out").python().sample(range(read), count)
        return np.isin(loaded.positions(view), chosen)

    def _examples(self, loaded: Loaded, view: View, split: Split) -> ViewExamples:
        if not len(view):
            raise nothing_left(split, loaded.offsets[-1], self.report, self._config)
        fingerprint, longest = self._fingerprint(loaded, split), self._rule.longest
        examples = ViewExamples(loaded.pieces, loaded.names, view, split, fingerprint, longest)
        self._say(summary(split, examples.lengths, examples.trained_tokens), once=True)
        return examples

    def _fingerprint(self, loaded: Loaded, split: Split) -> str:
        config = self._config
        part: list[object] = [config.max_length, config.min_length, config.overlong, sorted(config.allow)]
        part += [config.deduplicate, config.limit, [entry.entry.weight for entry in self._entries["train"]]]
        if not config.eval and (config.eval_rows or config.eval_fraction):
            part += [split, config.eval_rows, config.eval_fraction, self._ctx.rng("data/held_out").seed]
        if config.shuffle or any(entry.entry.weight is not None for entry in self._entries["train"]):
            part.append(self._ctx.rng("data").seed)
        content = json.dumps([part, loaded.identities, config.shuffle], default=str)
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def _load(self, split: Split) -> Loaded:
        if split in self._loaded:
            return self._loaded[split]
        loaded, began, built = Loaded(), time.perf_counter(), 0
        with self._encoder.session():
            for index, entry in enumerate(self._entries[split]):
                for part, first, last, piece, identity, tokens in self._pieces(entry):
                    report = PartReport(part.name, read=piece.read)
                    view = apply(self._rule, piece, len(loaded.pieces), report)
                    report.stop()
                    loaded.add(part.name, index, piece, view, [identity, first, last])
                    built += tokens
                    for line in report.lines():
                        self._say(line)
        if not loaded.pieces:
            raise DataError(f"no entry of data.{split} holds rows", "Their slices are empty.", "Correct them.")
        rate = (
            f", tokenized at {built / (time.perf_counter() - began):,.0f} tokens/s" if built else ", kept from before"
        )
        self._say(f"{split}: read {loaded.offsets[-1]:,} rows{rate}")
        self._loaded[split] = loaded
        return loaded

    def _pieces(self, entry: OpenedEntry) -> Iterator[tuple[Part, int, int | None, Piece, object, int]]:
        """The parts of an entry that hold wanted rows: first and last row, the piece, what it depends on, and how
        many tokens were made now.
        """
        start, stop = entry.bounds()
        before = 0
        for part in entry.parts:
            if stop is not None and before >= stop:
                return
            first, last = max(start - before, 0), None if stop is None else stop - before
            identity = [part.identity(self._memo), dict(entry.settings), *self._texts(entry)]
            made: list[int] = []
            piece = self._piece(entry, part, (first, last), identity, made)
            if piece.read or not first:
                yield part, first, last, piece, identity, sum(made)
            before += first + piece.read if piece.read else count_rows(part)

    def _piece(
        self, entry: OpenedEntry, part: Part, rows: tuple[int, int | None], identity: object, made: list[int]
    ) -> Piece:
        encode = RowEncoder(entry.render, self._encoder, self._config.columns)

        def build(writer: PieceWriter) -> int:
            report = PartReport(part.name)
            entries = islice(part.read(), *rows)
            alone = ALONE if part.is_small else 0
            for read, chunk, errors in chunks(entries, encode, worker_count(self._config.workers), alone):
                report.read += read
                writer.add(chunk)
                for line, error in errors:
                    report.error(line, error)
            if report.read or not rows[0]:
                report.stop()
            made.append(writer.tokens)
            return report.read

        if self.cache is None or (part.is_small and self._config.cache == "auto"):
            writer = PieceWriter()
            return writer.close(build(writer))
        key = key_of(identity, rows)
        self._kept.add(key)
        return self.cache.piece(key, _telling(build, part.name))

    def _texts(self, entry: OpenedEntry) -> list[object]:
        """Tokenizer and templates; and the day, if a template writes it: rows made yesterday are others then."""
        settings, named = json.dumps(entry.settings, default=str), self._processor.parts.get(TEMPLATES)
        texts = {"": json.dumps(self._processor.tokenizer.chat_template)}
        if isinstance(named, Mapping):
            texts |= {str(name): str(text) for name, text in named.items()}
        used = [text for name, text in texts.items() if not name or json.dumps(name) in settings]
        day = time.strftime("%Y-%m-%d") if any("strftime_now" in text for text in used) else ""
        return [self._processor.fingerprint, hashlib.blake2b(json.dumps(texts).encode()).hexdigest(), day]

    def _say(self, message: str, once: bool = False) -> None:
        if not (once and message in self.report):
            self.report.append(message)


def _telling(build: Callable[[PieceWriter], int], name: str) -> Callable[[PieceWriter], int]:
    """The same, announced at once: it may take long, and of several processes only one does it."""

    def announced(writer: PieceWriter) -> int:
        log.info("data: tokenizing %s", name)
        began = time.perf_counter()
        read = build(writer)
        spent = time.perf_counter() - began
        log.info("data: tokenized %s: %s rows, %s tokens in %.1f s", name, f"{read:,}", f"{writer.tokens:,}", spent)
        return read

    return announced
