"""The source `synthetic`: rows of random words with lengths as wanted, for benchmarks and dry runs.

Row i depends on the seed and i alone, so that any part of the rows can be made anywhere. Conversations alternate
between user and assistant; a row has the columns of the formats `chat` and `completion` and plain `text`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pegbox.section import Section, setting
from pydantic import model_validator

from pegbox_data.sources import START, Entry, Place

if TYPE_CHECKING:
    from pegbox_data.config import DatasetEntry
    from pegbox_data.files import DigestMemo

SYLLABLES = ("ba", "de", "fi", "go", "lu", "ma", "ne", "ri", "so", "tu", "va", "ze")


class SyntheticOptions(Section):
    """Options of the source `synthetic`."""

    rows: int = setting(1000, "How many rows there are.", unit="rows", ge=1)
    words: int = setting(200, "Mean length of a row.", unit="words", ge=2)
    lengths: Literal["fixed", "uniform", "lognormal"] = setting(
        "lognormal",
        "How lengths are distributed around the mean: all alike, between a half and one and a half of it, or with a "
        "long tail (sigma 0.6), as conversations have.",
    )
    max_words: int | None = setting(None, "No row is longer; no limit if not set.", unit="words", ge=2)
    vocabulary: int = setting(2000, "How many different words there are.", unit="words", ge=1)
    turns: int = setting(2, "Questions and answers in a conversation: 1 is one question and its answer.", ge=1)
    seed: int = setting(0, "Seed of the rows.", ge=0)

    @model_validator(mode="after")
    def _lengths_are_possible(self) -> SyntheticOptions:
        if self.words < 2 * self.turns:
            raise ValueError(f"words ({self.words}) is less than one for each message of {self.turns} turns")
        if self.max_words is not None and self.max_words < self.words:
            raise ValueError(f"max_words ({self.max_words}) is less than the mean, words ({self.words})")
        return self


class Synthetic:
    """Random conversations."""

    options = SyntheticOptions

    def parts(self, entry: DatasetEntry, options: SyntheticOptions, streaming: bool) -> Sequence[SyntheticRows]:
        return [SyntheticRows(options)]


@dataclass(frozen=True)
class SyntheticRows:
    """The rows that some options ask for."""

    options: SyntheticOptions
    name: str = "synthetic"
    is_small: bool = False

    def read(self, start: Place = START) -> Iterator[Entry]:
        words = vocabulary(self.options.vocabulary)
        for number in range(start.offset + 1, self.options.rows + 1):
            yield Entry(number, row(self.options, words, number), None, Place(number, number))

    def identity(self, memo: DigestMemo) -> object:
        return ["synthetic", self.options.model_dump(mode="json")]

    def sketch(self) -> object:
        return ["synthetic", self.options.model_dump(mode="json")]


def vocabulary(size: int) -> list[str]:
    """`size` different words, short ones first."""
    words: list[str] = list(SYLLABLES)
    begin = 0
    while len(words) < size:
        begin, end = len(words) - len(words[begin:]), len(words)
        words += [word + syllable for word in words[begin:end] for syllable in SYLLABLES]
        begin = end
    return words[:size]


def row(options: SyntheticOptions, words: Sequence[str], number: int) -> dict[str, Any]:
    """Row `number` (from 1)."""
    rng = random.Random(f"{options.seed}/{number}")
    length = _length(options, rng)
    messages = 2 * options.turns
    # Answers are twice as long as questions, as they tend to be.
    sizes = [max(1, length * (1 + index % 2) // (3 * options.turns)) for index in range(messages)]
    texts = [" ".join(rng.choices(words, k=size)).capitalize() + "." for size in sizes]
    return {
        "messages": [
            {"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(texts)
        ],
        "prompt": texts[0],
        "completion": texts[1],
        "text": " ".join(texts),
    }


def _length(options: SyntheticOptions, rng: random.Random) -> int:
    sigma = 0.6
    factor = {
        "fixed": lambda: 1.0,
        "uniform": lambda: rng.uniform(0.5, 1.5),
        "lognormal": lambda: rng.lognormvariate(-sigma * sigma / 2, sigma),
    }[options.lengths]()
    return min(max(2 * options.turns, round(options.words * factor)), options.max_words or 1 << 30)


synthetic = Synthetic()
