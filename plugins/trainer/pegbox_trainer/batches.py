"""Examples as batches: which rows a step takes, and which process gets them.

Training. The order of an epoch is a permutation that depends on the seed and the epoch alone. A step takes the next
`batch` bins of it (a bin is a row, or several that packing joined), or `micro_batch * accumulation * processes`; within
the step, bins are sorted by length and dealt out so that those of like length share a micro-batch (little padding) and
processes that compute at the same time have like lengths (little waiting). That is allowed because a loss is normalized
over the whole step: where a row is computed changes no result. For the same global batch, the rows of each step are
therefore the same on any number of processes. The last step of an epoch takes what is left; a stream has no epochs, and
its steps go on from one window of rows to the next.

Evaluation. Dataset order, each row once; windows of rows are sorted and dealt out in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, Any

from pegbox.errors import ConfigError, DataError, RunError
from pegbox.rows import Batch, Dataset, Example, ExampleStream, PackedExamples

from pegbox_trainer.collation import Bin, collate, documents_of, shares_lines
from pegbox_trainer.config import TrainerConfig
from pegbox_trainer.windows import Epochs, StreamWindows, Windows, trains

if TYPE_CHECKING:
    from pegbox.context import Context

EVAL_WINDOW = 16
"""Micro-batches per process that are sorted together in evaluation."""

NAMED_ROWS = 16
"""Rows of a batch that a message names."""


def deal(lengths: Sequence[int], micro_batch: int, ranks: int) -> list[list[list[int]]]:
    """Deal rows out, longest first: `[rank][micro-batch]` gives positions in `lengths`.

    Every rank gets the same number of micro-batches, the fewest that hold all rows; with fewer rows than
    micro-batches some are empty. Neighbours in length share a micro-batch; the direction alternates between
    ranks, which evens out their sums.
    """
    order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    rounds = math.ceil(len(order) / (micro_batch * ranks))
    base, longer = divmod(len(order), rounds * ranks)
    dealt: list[list[list[int]]] = [[] for _ in range(ranks)]
    start = 0
    for slot in range(rounds * ranks):
        # The first slots hold the longest rows, so the last ones take what does not divide.
        size = base + (slot >= rounds * ranks - longer)
        turn, lane = divmod(slot, ranks)
        dealt[lane if turn % 2 == 0 else ranks - 1 - lane].append(order[start : start + size])
        start += size
    return dealt


class RowBatches:
    """What training and evaluation share: this rank's micro-batches of some bins."""

    def __init__(self, ctx: Context, examples: Dataset, micro_batch: int) -> None:
        if not isinstance(examples, ExampleStream) and len(examples) == 0:
            raise _no_rows(examples.split)
        config = ctx.section(TrainerConfig)
        self.examples = examples
        self._micro_batch = micro_batch
        self._rank, self._ranks = ctx.runtime.rank, ctx.runtime.world_size
        self._pad_id = ctx.processor.pad_id
        self._pin = ctx.runtime.device.type == "cuda"
        shuffle = config.shuffle and examples.split == "train"
        self._packed = hasattr(examples, "fit")
        self._windows: Windows = (
            StreamWindows(ctx, examples, config.stream_window, shuffle=shuffle)
            if isinstance(examples, ExampleStream)
            else Epochs(ctx, examples, shuffle=shuffle)
        )

    def describe(self, batch: Batch) -> str:
        """Where the rows of a batch came from; `no row` for one that only fills up."""
        return self._named(batch.rows) or "no row"

    def lay_out(self, examples: Sequence[Example]) -> list[Batch]:
        """This rank's micro-batches of examples that every rank holds: packed and dealt out as the rows of a step."""
        bins: Sequence[Sequence[int]] = [(at,) for at in range(len(examples))]
        if self._packed:
            bins = self.examples.fit([len(example.input_ids) for example in examples])  # type: ignore[union-attr]
        return self._micro_batches([[(at, examples[at]) for at in rows] for rows in bins], must_train=False)

    def _named(self, rows: Sequence[int]) -> str:
        named = ", ".join(self._windows.describe(row) for row in rows[:NAMED_ROWS])
        more = len(rows) - NAMED_ROWS
        return f"{named} and {more} more" if more > 0 else named

    def _micro_batches(self, bins: Sequence[Bin], *, must_train: bool) -> list[Batch]:
        if must_train and not any(trains(example) for rows in bins for _, example in rows):
            rows = [row for rows in bins for row, _ in rows]
            raise DataError(
                f"a step of {len(rows)} rows has no trained token: {self._named(rows)}",
                "Every token of these rows is masked, so there is nothing to learn from them.",
                "Check the data's format and which tokens it trains, or raise trainer.micro_batch.",
            )
        packed = self._packed or shares_lines(bins)
        dealt = deal([_width(rows, packed) for rows in bins], self._micro_batch, self._ranks)
        return [
            collate([bins[at] for at in positions], self._pad_id, self._windows.describe, pin=self._pin, packed=packed)
            for positions in dealt[self._rank]
        ]


class TrainBatches(RowBatches):
    """The training source: one optimizer step at a time, from a place in the data that checkpoints keep.

    The place is (window, bins taken of it), which no number of processes changes.
    """

    def __init__(self, ctx: Context, examples: Dataset) -> None:
        self._config = config = ctx.section(TrainerConfig)
        super().__init__(ctx, examples, config.micro_batch)
        self._step_rows = config.batch or config.micro_batch * config.accumulation * self._ranks
        self._spans = isinstance(self._windows, StreamWindows)
        self._step, self._window, self._taken = 0, 0, 0
        self.max_steps = config.max_steps
        self.total_steps: int | None = config.max_steps or self._steps_of_epochs()

    @property
    def epoch(self) -> float | None:
        """Passes over the data so far; None for a stream."""
        if self._spans:
            return None
        return self._window + (self._taken / len(self._windows.window(self._window).bins) if self._taken else 0.0)

    def __iter__(self) -> Iterator[Sequence[Batch]]:
        while self._step < (self.total_steps or 0) and (bins := self._next_bins()):
            self._step += 1
            yield self._micro_batches(bins, must_train=True)

    def take(self) -> list[tuple[int, Example]]:
        """The rows of the next step over all ranks; none: the data, or the run, has ended."""
        bins = self._next_bins() if self._step < (self.total_steps or 0) else []
        self._step += bool(bins)
        return [row for rows in bins for row in rows]

    def _next_bins(self) -> list[Bin]:
        """The bins of the next step over all processes; none: the data has ended.

        An epoch ends with the step that takes what is left of it; a step of a stream goes on in its next window.
        """
        bins: list[Bin] = []
        while len(bins) < self._step_rows:
            window = self._windows.window(self._window)
            if not window.bins:
                break
            upto = min(self._taken + self._step_rows - len(bins), len(window.bins))
            bins += [window.rows(at) for at in range(self._taken, upto)]
            self._taken = upto
            if upto == len(window.bins):
                self._window, self._taken = self._window + 1, 0
                if not self._spans:
                    break
        return bins

    def _steps_of_epochs(self) -> int:
        if self._spans:
            raise ConfigError(
                "the training data is a stream, and trainer.max_steps is not set",
                "How many steps an epoch of a stream has is known when it ends, too late for a schedule.",
                "Set trainer.max_steps.",
            )
        epochs = 1.0 if self._config.epochs is None else self._config.epochs
        # Bins differ from epoch to epoch; without packing every epoch has as many.
        packed = isinstance(self.examples, PackedExamples)
        sizes = [len(self._windows.window(n if packed else 0).bins) for n in range(math.ceil(epochs))]
        steps = [math.ceil(bins / self._step_rows) for bins in sizes]
        return math.ceil(sum(steps[:-1]) + (epochs - len(steps) + 1) * steps[-1])

    def state_dict(self) -> dict[str, object]:
        place = {"step": self._step, "window": self._window, "taken": self._taken}
        return {
            **place,
            "rows_per_step": self._step_rows,
            "source": self._windows.state_dict(self._window),
            **self._identity,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for key, now in self._identity.items():
            if state_dict[key] != now:
                raise RunError(
                    f"the checkpoint's place in the data has {key} {state_dict[key]}, this run has {now}",
                    "Going on from there would repeat or skip rows.",
                    "Resume with the same data, packing and trainer.shuffle.",
                )
        if (before := state_dict["rows_per_step"]) != self._step_rows:
            raise RunError(
                f"a step of the checkpoint takes {before} rows over all processes, one of this run {self._step_rows}",
                "Steps, schedule and loss would not be those of the run that began.",
                f"Set trainer.batch={before}: it holds for any number of processes.",
            )
        self._step, self._window, self._taken = (state_dict[key] for key in ("step", "window", "taken"))
        self._windows.go_to(self._window, state_dict["source"])

    @cached_property
    def _identity(self) -> dict[str, object]:
        size = (
            {"stream_window": self._config.stream_window}
            if isinstance(self.examples, ExampleStream)
            else {"rows": len(self.examples)}
        )
        return {**size, "fingerprint": self.examples.fingerprint, "shuffle": self._config.shuffle}


class EvalBatches(RowBatches):
    """The evaluation source: each iteration starts anew and yields every row once over all ranks."""

    total_steps: int | None = None

    def __init__(self, ctx: Context, examples: Dataset) -> None:
        config = ctx.section(TrainerConfig)
        super().__init__(ctx, examples, config.eval_micro_batch or config.micro_batch)
        self._start = self._windows.state_dict(0)

    def __iter__(self) -> Iterator[Sequence[Batch]]:
        together = self._micro_batch * self._ranks * EVAL_WINDOW
        self._windows.go_to(0, self._start)
        for number in count():
            window = self._windows.window(number)
            for start in range(0, len(window.bins), together):
                bins = range(start, min(start + together, len(window.bins)))
                yield self._micro_batches([window.rows(at) for at in bins], must_train=False)
            if isinstance(self._windows, Epochs) or not window.bins:
                return

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Nothing: every evaluation is the same."""


def _no_rows(split: str) -> DataError:
    return DataError(
        f"the {split} split has no rows",
        "Every row was filtered out, or the files are empty.",
        "Look at the section of the plugin that makes the dataset.",
    )


def _width(rows: Bin, packed: bool) -> int:
    """Tokens of the longest line that a bin becomes."""
    documents = [length for _, example in rows for length in documents_of(example)]
    return sum(documents) if packed else max(documents)
