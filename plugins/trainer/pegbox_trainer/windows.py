"""What a training source draws from, one window at a time: the order of rows, and which of them share a row of a batch.

A window is an epoch of rows that are indexed, or some thousand rows taken from a stream. Within a window rows are
permuted by the seed and the window's number alone, and packed examples say which rows share a bin. So neither order nor
bins depend on how many processes there are, and a place in the data is (window, bins taken), with the state the stream
had before the window was taken.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from pegbox.errors import RunError
from pegbox.rows import UNTRAINED, Example, Examples, ExampleStream, PackedExamples

from pegbox_trainer.collation import documents_of

if TYPE_CHECKING:
    from pegbox.context import Context

KEPT_WINDOWS = 4
"""Windows of a stream whose rows messages can still name."""

FIRST_ROWS = 16
"""Rows of a window that are looked at to tell prompts from rows with trained tokens."""

Bin = Sequence[int]


@dataclass(frozen=True)
class Window:
    """Some rows and the bins they are in; `first` is added to an index to tell rows of windows apart."""

    examples: Examples
    bins: Sequence[Bin]
    first: int = 0

    def rows(self, at: int) -> list[tuple[int, Example]]:
        """The rows of one bin, with numbers that `describe` of the windows understands."""
        return [(self.first + row, self.examples[row]) for row in self.bins[at]]


class Windows(Protocol):
    """Windows in order; `go_to` and `state_dict` are exact."""

    def window(self, number: int) -> Window: ...
    def describe(self, row: int) -> str: ...
    def state_dict(self, number: int) -> dict[str, object]: ...
    def go_to(self, number: int, state: Mapping[str, Any]) -> None: ...


def bins_of(examples: Examples, order: Sequence[int]) -> Sequence[Bin]:
    """The bins of some rows in an order; one row each, unless the examples are packed.

    Rows that train nothing are prompts: what is made from them is packed, and a step counts them one by one.

    Raises:
        RunError: the bins leave out a row or hold one twice.
    """
    if not isinstance(examples, PackedExamples) or not any(trains(examples[row]) for row in order[:FIRST_ROWS]):
        return [(row,) for row in order]
    bins = examples.bins(order)
    if sum(map(len, bins)) != len(order) or len({row for rows in bins for row in rows}) != len(order):
        raise RunError(
            f"packing put {len(order)} rows into bins that hold {sum(map(len, bins))}",
            "Every row is in exactly one bin.",
            "Fix the plugin that packs the rows.",
        )
    return bins


def trains(example: Example) -> bool:
    """Whether a row has a trained token; the first of a document is never a target."""
    trained = np.asarray(example.labels) != UNTRAINED
    trained[np.cumsum((0, *documents_of(example)[:-1]))] = False
    return bool(trained.any())


class Epochs:
    """Indexed rows: a window is an epoch."""

    def __init__(self, ctx: Context, examples: Examples, *, shuffle: bool) -> None:
        self._ctx, self._examples, self._shuffle = ctx, examples, shuffle
        self._latest: tuple[int, Window] | None = None

    def window(self, number: int) -> Window:
        if self._latest is None or self._latest[0] != number:
            rows = len(self._examples)
            order = _permutation(self._ctx, "shuffle", number, rows) if self._shuffle else range(rows)
            self._latest = number, Window(self._examples, bins_of(self._examples, order))
        return self._latest[1]

    def describe(self, row: int) -> str:
        return self._examples.describe(row)

    def state_dict(self, number: int) -> dict[str, object]:
        return {}

    def go_to(self, number: int, state: Mapping[str, Any]) -> None:
        """Nothing: an epoch follows from its number."""


class StreamWindows:
    """Rows of a stream: a window is what one `take` gives. At most two are in use, and the last few can be named."""

    def __init__(self, ctx: Context, stream: ExampleStream, rows: int, *, shuffle: bool) -> None:
        self._ctx, self._stream, self._rows, self._shuffle = ctx, stream, rows, shuffle
        self._taken: deque[tuple[int, dict[str, object], Window]] = deque(maxlen=KEPT_WINDOWS)
        self._next, self._first = 0, 0

    def window(self, number: int) -> Window:
        """A window in use, or the next one; an empty one ends the stream."""
        while self._next <= number:
            before = {"stream": dict(self._stream.state_dict()), "first": self._first}
            examples = self._stream.take(self._rows)
            count = len(examples)
            order = _permutation(self._ctx, "shuffle/stream", self._next, count) if self._shuffle else range(count)
            window = Window(examples, bins_of(examples, order), self._first)
            self._taken.append((self._next, before, window))
            self._next, self._first = self._next + 1, self._first + count
        return next(window for at, _, window in self._taken if at == number)

    def describe(self, row: int) -> str:
        for _, _, window in self._taken:
            if window.first <= row < window.first + len(window.examples):
                return window.examples.describe(row - window.first)
        return f"row {row:,} of the stream"

    def state_dict(self, number: int) -> dict[str, object]:
        if number == self._next:
            return {"stream": dict(self._stream.state_dict()), "first": self._first}
        return next(before for at, before, _ in self._taken if at == number)

    def go_to(self, number: int, state: Mapping[str, Any]) -> None:
        """Take windows from `number` on, as the state says where that is."""
        self._stream.load_state_dict(state["stream"])
        self._next, self._first = number, state["first"]
        self._taken.clear()


def _permutation(ctx: Context, name: str, number: int, rows: int) -> list[int]:
    source = torch.Generator().manual_seed(ctx.rng(name, number).seed)
    order: list[int] = torch.randperm(rows, generator=source).tolist()
    return order
