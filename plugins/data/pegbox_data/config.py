"""The section `data` of a config: where rows come from, how they are mixed, and how long one may be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pegbox.section import Section, setting
from pydantic import JsonValue, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from pegbox_data.slices import parse_split

TRUNCATE = "truncate"
PART_OF_ANSWER = "A part of an answer is not what was preferred"
UNJUDGED = "A cut row would have more verdicts than steps"
NEVER_CUT = {
    ("split", "preference"): PART_OF_ANSWER,
    ("split", "unpaired"): PART_OF_ANSWER,
    ("split", "prompts"): "A part of a question is another one",
    (TRUNCATE, "prompts"): "A cut would take the end of the question",
    ("split", "steps"): UNJUDGED,
    (TRUNCATE, "steps"): UNJUDGED,
}
"""Why rows of a format are never cut in this way."""


class DatasetEntry(Section):
    """One source of rows: files, a folder, an address, a dataset of the hub, or what another source makes."""

    path: str | tuple[str, ...] = setting(
        (),
        "File, folder, glob, address (`s3://...`, `https://...`) or dataset of the hub (`org/name`), or a list of "
        "them; relative to the folder of the config. What exists locally wins.",
    )
    format: str = setting("chat", "How a row becomes text: `chat`, `completion`, or another declared format.")
    source: str | None = setting(
        None,
        "How it is read: `jsonl`, `json`, `csv`, `text`, `parquet`, `arrow`, `hub`, `synthetic`, or another "
        "declared source; by its suffix if not set.",
    )
    source_options: dict[str, JsonValue] = setting({}, "Options of the source, such as `{rows: 1000}`.")
    name: str | None = setting(None, "Configuration of a dataset of the hub.")
    split: str | None = setting(
        None,
        "Split of a folder or hub dataset, and which of its rows: `train`, `train[:10%]`, `[100:200]`; of files "
        "without splits `train` is all of them.",
    )
    revision: str | None = setting(None, "Branch, tag or commit of a dataset of the hub.")
    limit: int | None = setting(None, "Use only the first so many rows.", unit="rows", ge=1)
    weight: float | None = setting(
        None,
        "How often each row is used in an epoch: 0.5 takes a seeded half of the rows, 2 takes every row twice, 1.5 "
        "every row once and a seeded half twice. 1 if not set.",
        unit="1",
        gt=0,
    )
    share: float | None = setting(
        None,
        "With `streaming`: the share of rows drawn from this entry, relative to the others' shares. Without shares "
        "entries follow one another.",
        unit="1",
        gt=0,
    )
    fields: dict[str, str] = setting(
        {}, "Names of the format's fields in this source, such as `{messages: conversations}`."
    )
    options: dict[str, JsonValue] = setting({}, "Options of the format, such as `{turns: last}`.")

    @property
    def paths(self) -> tuple[str, ...]:
        """`path` as a list."""
        return (self.path,) if isinstance(self.path, str) else self.path

    @model_validator(mode="after")
    def _names_rows(self) -> DatasetEntry:
        if not self.source and not any(self.paths):
            # The error of a required key: it names the key, with file and line.
            missing = InitErrorDetails(type="missing", loc=("path",), input=self.model_dump(exclude_unset=True))
            raise ValidationError.from_exception_data(type(self).__name__, [missing])
        if self.split is not None:
            parse_split(self.split)
        return self

    @model_validator(mode="after")
    def _options_of_our_formats(self) -> DatasetEntry:
        """Formats of this package are checked as soon as the config is read; others when they are opened."""
        from pegbox_data.declared import check_options

        check_options("format", self.format, self.options)
        if self.source is not None:
            check_options("source", self.source, self.source_options)
        return self


class DataConfig(Section):
    """What the run trains on and is evaluated on."""

    train: tuple[DatasetEntry, ...] = setting(..., "What to train on, one after the other; at least one entry.")
    eval: tuple[DatasetEntry, ...] = setting((), "What to evaluate on.")
    eval_fraction: float | None = setting(
        None, "Share of the training rows held out for evaluation.", unit="1", gt=0, lt=1
    )
    eval_rows: int | None = setting(None, "Number of training rows held out for evaluation.", unit="rows", ge=1)
    limit: int | None = setting(
        None, "Use at most so many rows of every entry and of every split, for a dry run.", unit="rows", ge=1
    )
    deduplicate: bool = setting(
        False,
        "Keep only the first of rows with the same tokens and the same trained tokens, over all entries of a split.",
    )
    shuffle: bool = setting(
        False, "Put the merged rows into a seeded order of their own; the trainer shuffles each epoch anyway."
    )
    max_length: int | None = setting(
        None,
        "Longest row; of answers with signs the longest prompt with its answer; no limit if not set.",
        unit="tokens",
        ge=2,
    )
    min_length: int | None = setting(None, "Shorter rows are left out and counted.", unit="tokens", ge=1)
    overlong: Literal["drop", "truncate", "split", "error"] = setting(
        "drop",
        "What happens to longer rows: leave them out, cut their end off, cut them into rows of `max_length`, or stop. "
        "Counts are always printed.",
    )
    allow: tuple[str, ...] = setting((), "Findings that do not stop the run, by id; they are counted and printed.")
    columns: tuple[str, ...] = setting((), "Columns of the source rows that stay with the examples, for rewards.")
    streaming: bool = setting(
        False, "Read, render and tokenize the training rows while training, for data that memory or disk cannot hold."
    )
    read_ahead: int = setting(
        4096, "With `streaming`: how many rows a background thread prepares ahead.", unit="rows", ge=1
    )
    cache: str = setting(
        "auto",
        "Where tokenized rows are kept between runs: a folder, `off`, or `auto`: the user's cache folder, for all "
        "but small files.",
        min_length=1,
    )
    workers: int | Literal["auto"] = setting(
        "auto", "Processes that tokenize; `auto`: one for each core if there are many rows.", unit="processes"
    )

    @model_validator(mode="after")
    def _one_way_to_evaluate(self) -> DataConfig:
        ways = {"eval": self.eval, "eval_fraction": self.eval_fraction, "eval_rows": self.eval_rows}
        given = [name for name, value in ways.items() if value]
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(given)} are both set. Evaluation rows come either from files of their own "
                f"or from the training rows. Keep one of {', '.join(given)}"
            )
        return self

    @model_validator(mode="after")
    def _allows_known_findings(self) -> DataConfig:
        from pegbox_data.findings import require_known

        require_known(self.allow)
        return self

    @model_validator(mode="after")
    def _possible_together(self) -> DataConfig:
        for wrong, problem in self._impossible():
            if wrong:
                raise ValueError(problem)
        return self

    def _impossible_cuts(self) -> Iterator[tuple[bool, str]]:
        """Formats whose rows cannot be cut up, or not at all."""
        for entry in (*self.train, *self.eval):
            why = NEVER_CUT.get((self.overlong, entry.format))
            yield (
                why is not None,
                f"overlong is {self.overlong}, and an entry has the format {entry.format}. {why}. Set overlong: drop, "
                f"{'' if (TRUNCATE, entry.format) in NEVER_CUT else 'truncate, '}or error",
            )

    def _impossible(self) -> list[tuple[bool, str]]:
        """Combinations that cannot mean anything, and what to say about them."""
        shares = [entry.share is not None for entry in self.train]
        longest, shortest = self.max_length or 0, self.min_length or 0
        whole = "A stream is never known as a whole. "
        streamed = [
            (self.deduplicate, f"deduplicate and streaming are both set. {whole}Remove one of them"),
            (self.shuffle, f"shuffle and streaming are both set. {whole}The trainer shuffles windows. Remove shuffle"),
            (
                bool(self.eval_rows or self.eval_fraction),
                f"rows are to be held out of a stream. {whole}Give evaluation rows of their own: data.eval",
            ),
            (
                any(entry.weight is not None for entry in self.train),
                f"weight and streaming are both set. {whole}Set share, the share of rows drawn from each entry",
            ),
            (any(shares) and not all(shares), "some entries have a share and others none. Set it for all of them"),
        ]
        in_memory = [
            (
                any(entry.share is not None for entry in (*self.train, *self.eval)),
                "share is set without streaming. "
                "Rows in memory are mixed by weight: how often each row is used. Set weight, or streaming: true",
            ),
        ]
        always = [
            (not self.train, "train is empty. There must be rows to train on. Add an entry to data.train"),
            (
                self.max_length is not None and shortest > longest,
                f"min_length ({shortest}) is greater than max_length ({longest}). No row could be used. "
                "Set min_length lower",
            ),
            (
                self.overlong != "drop" and self.max_length is None,
                f"overlong is {self.overlong}, but max_length is not set. No row is too long. Set max_length",
            ),
            *self._impossible_cuts(),
            (isinstance(self.workers, int) and self.workers < 1, "workers is less than 1. Set 1 or more, or auto"),
            (
                any(entry.share is not None for entry in self.eval),
                "share is set in data.eval. Evaluation rows are never streamed. Remove it",
            ),
        ]
        return [*always, *(streamed if self.streaming else in_memory)]
