"""Rows of a config as the model will see them, each with its source and what the audit found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from pegbox import hooks
from pegbox.errors import ConfigError, DataError
from pegbox.plan import compose
from pegbox.rows import UNTRAINED

from pegbox_data.config import DataConfig
from pegbox_data.encoding import Encoder
from pegbox_data.entries import OpenedEntry, open_entry
from pegbox_data.findings import FINDINGS, Found
from pegbox_data.lengths import LengthRule
from pegbox_data.rows import Row, RowEncoder
from pegbox_data.twins import with_templates

if TYPE_CHECKING:
    from pegbox.context import Context
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Seen:
    """One row, looked at.

    Attributes:
        number: its number in the split, from 1; `where`: file and line.
        source: the row as it was read, or None if it cannot be read.
        ids, labels, tokens: of length T; tokens as text, in which a token that holds a part of a character only is
            empty and the last one of the character holds it.
        findings: what the audit found; `allowed` of them do not stop.
        error: why the row cannot be used.
        length: what the length rule does to it, in words; empty: nothing.
        documents, signs: lengths and signs of its documents, if it has signs.
    """

    number: int
    where: str
    source: Mapping[str, Any] | None
    ids: Sequence[int] = ()
    labels: Sequence[int] = ()
    tokens: Sequence[str] = ()
    findings: Sequence[Found] = ()
    allowed: frozenset[str] = field(default_factory=frozenset)
    error: DataError | None = None
    length: str = ""
    documents: Sequence[int] = ()
    signs: Sequence[int] = ()

    @property
    def stops(self) -> bool:
        """Whether this row would stop a run."""
        stopping = any(FINDINGS[one.id].stops and one.id not in self.allowed for one in self.findings)
        return self.error is not None or stopping

    @property
    def trained(self) -> int:
        """How many of its tokens are trained."""
        return sum(label != UNTRAINED for label in self.labels)


def inspected(
    config: str | Path, overrides: Sequence[str], split: str, rows: int, row: int | None = None
) -> Iterator[Seen]:
    """The first rows of a split, or one of them, as a run would read them.

    Raises:
        ConfigError: there is no such split, or no such row.
    """
    return inspected_in(compose(config, overrides), split, rows, row)


def inspected_in(ctx: Context, split: str, rows: int, row: int | None = None) -> Iterator[Seen]:
    """The same for a composed run."""
    section = ctx.section(DataConfig)
    if split not in ("train", "eval") or not getattr(section, split):
        raise ConfigError(
            f"the config has no entries in data.{split}",
            "Rows held out for evaluation come from data.train.",
            "Inspect the split train.",
        )
    with ctx.exit:
        ctx.processor = with_templates(ctx, ctx.call(hooks.load_processor, ctx))
        encoder, rule = Encoder(ctx.processor), LengthRule.of(section)
        entries = [
            open_entry(ctx, cast(Literal["train", "eval"], split), index, ctx.processor)
            for index in range(len(getattr(section, split)))
        ]
        number = 0
        with encoder.session():
            for entry in entries:
                encode = RowEncoder(entry.render, encoder, section.columns)
                for where, line, source in _sources(entry):
                    number += 1
                    if row is None or number == row:
                        yield from _seen(number, f"{where}:{line}", source, encode, rule, ctx.processor.tokenizer)
                    if number >= (rows if row is None else row):
                        return
        if row is not None:
            raise ConfigError(
                f"there is no row {row}", f"data.{split} has {number:,} rows.", "Ask for one of them with --row."
            )


def _sources(entry: OpenedEntry) -> Iterator[tuple[str, int, Any]]:
    """The rows of an entry that a run would read: part, line and what was read."""
    start, stop = entry.bounds()
    every = ((part.name, one.line, one) for part in entry.parts for one in part.read())
    yield from islice(every, start, stop)


def _seen(
    number: int, where: str, source: Any, encode: RowEncoder, rule: LengthRule, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Seen]:
    """The rows that a source row becomes; one that cannot be used is shown too."""
    batch = encode([source], 0)
    if batch.errors:
        yield Seen(number, where, source.row, error=batch.errors[0][1])
    for made in batch.rows:
        ids, trained = made.encoded.ids.tolist(), made.encoded.trained.tolist()
        seen = Seen(
            number,
            where,
            source.row,
            ids,
            [token if one else UNTRAINED for token, one in zip(ids, trained, strict=True)],
            _texts(tokenizer, ids),
            list(made.found),
            rule.allow,
            documents=made.documents,
            signs=made.signs,
        )
        yield _measured_answers(seen, made, rule) if made.signs else _measured(seen, made, rule)


def _measured(seen: Seen, made: Row, rule: LengthRule) -> Seen:
    """A row with what the length rule does to it."""
    length, trained = len(seen.ids), made.encoded.trained
    bounds = rule.bounds(length, made.splits)
    if bounds == [(0, length)]:
        return seen
    found = list(seen.findings)
    if rule.overlong == "truncate" and not trained[: rule.longest].any() and trained.any():
        found.append(Found("truncated-away"))
    error = rule.too_long(length) if rule.overlong == "error" else None
    return replace(seen, findings=found, error=error, length=_cut(rule, length, bounds))


def _measured_answers(seen: Seen, made: Row, rule: LengthRule) -> Seen:
    """The same for a row with signs."""
    longest = max(made.documents)
    if rule.longest is None or longest <= rule.longest:
        return seen
    left = rule.answers(made.documents, made.encoded.trained)
    what = "cut off" if left.documents else "left out" + (", the prompt leaves no room for an answer" * bool(left.why))
    length = f"{longest:,} tokens with the prompt, data.max_length is {rule.longest:,}: {what}"
    return replace(seen, error=left.error, length=length)


def _texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    texts = tokenizer.batch_decode([[token] for token in ids], clean_up_tokenization_spaces=False)
    begun: int | None = None
    for index, text in enumerate(texts):
        if "\N{REPLACEMENT CHARACTER}" not in text:
            begun = None
            continue
        begun = index if begun is None else begun
        whole = tokenizer.decode(ids[begun : index + 1], clean_up_tokenization_spaces=False)
        done = "\N{REPLACEMENT CHARACTER}" not in whole
        if done:
            texts[begun : index + 1] = [*[""] * (index - begun), whole]
            begun = None
    return list(texts)


def _cut(rule: LengthRule, length: int, bounds: Sequence[tuple[int, int]]) -> str:
    seen = f"{length:,} tokens, data.max_length is {rule.longest:,}"
    if not bounds:
        return f"{seen}: left out"
    return f"{seen}: cut off" if len(bounds) == 1 else f"{seen}: split into {len(bounds)} rows"
