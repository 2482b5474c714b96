"""Examples as batches: which rows a step takes, and which process gets them.

Training. The order of an epoch is a permutation that depends on the seed and the epoch alone. A step takes
the next `micro_batch * accumulation * processes` rows of it; within the step, rows are sorted by length and
dealt out so that rows of like length share a micro-batch (little padding) and processes that compute at the
same time have like lengths (little waiting). That is allowed because a loss is normalized over the whole
step: where a row is computed changes no result. For the same global batch, the rows of each step are
therefore the same on any number of processes. The last step of an epoch takes what is left.

Evaluation. Dataset order, each row once; windows of rows are sorted and dealt out in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from pegbox.errors import DataError, RunError
from pegbox.types import UNTRAINED, Batch, Example, Examples

from pegbox_trainer.collation import collate
from pegbox_trainer.config import TrainerConfig

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
    """What training and evaluation share: this rank's micro-batches of some rows."""

    def __init__(self, ctx: Context, examples: Examples, micro_batch: int) -> None:
        if len(examples) == 0:
            raise DataError(
                f"the {examples.split} split has no rows",
                "Every row was filtered out, or the files are empty.",
                "Look at the section of the plugin that makes the dataset.",
            )
        self.examples = examples
        self._micro_batch = micro_batch
        self._rank, self._ranks = ctx.runtime.rank, ctx.runtime.world_size
        self._pad_id = ctx.processor.pad_id
        self._pin = ctx.runtime.device.type == "cuda"

    def describe(self, batch: Batch) -> str:
        """Where the rows of a batch came from; `no row` for one that only fills up."""
        named = ", ".join(self.examples.describe(row) for row in batch.rows[:NAMED_ROWS])
        more = len(batch.rows) - NAMED_ROWS
        return f"{named} and {more} more" if more > 0 else named or "no row"

    def _micro_batches(self, rows: Sequence[int], *, must_train: bool) -> list[Batch]:
        examples = [self.examples[row] for row in rows]
        if must_train and not any(_trains(example) for example in examples):
            named = ", ".join(self.examples.describe(row) for row in rows[:NAMED_ROWS])
            raise DataError(
                f"a step of {len(rows)} rows has no trained token: {named}",
                "Every token of these rows is masked, so there is nothing to learn from them.",
                "Check the data's format and which tokens it trains, or raise trainer.micro_batch.",
            )
        dealt = deal([len(example.input_ids) for example in examples], self._micro_batch, self._ranks)
        return [
            collate(
                [(rows[at], examples[at]) for at in positions],
                self._pad_id,
                self.examples.describe,
                pin=self._pin,
            )
            for positions in dealt[self._rank]
        ]


class TrainBatches(RowBatches):
    """The training source: one optimizer step at a time, from a place in the data that checkpoints keep."""

    def __init__(self, ctx: Context, examples: Examples) -> None:
        config = ctx.section(TrainerConfig)
        super().__init__(ctx, examples, config.micro_batch)
        self._ctx, self._shuffle = ctx, config.shuffle
        self._step_rows = config.micro_batch * config.accumulation * self._ranks
        self.steps_per_epoch = math.ceil(len(examples) / self._step_rows)
        epochs = 1.0 if config.epochs is None else config.epochs
        self.total_steps: int | None = config.max_steps or math.ceil(epochs * self.steps_per_epoch)
        self._position = 0
        self._order: tuple[int, torch.Tensor] = (-1, torch.empty(0))

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self._position / self.steps_per_epoch

    def __iter__(self) -> Iterator[Sequence[Batch]]:
        while self._position < (self.total_steps or 0):
            rows = self.rows_of_step(self._position)
            self._position += 1
            yield self._micro_batches(rows, must_train=True)

    def rows_of_step(self, position: int) -> list[int]:
        """The rows of a step over all processes, in the order of the epoch."""
        epoch, step = divmod(position, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, self._permutation(epoch))
        start = step * self._step_rows
        rows: list[int] = self._order[1][start : start + self._step_rows].tolist()
        return rows

    def state_dict(self) -> dict[str, object]:
        epoch, step = divmod(self._position, self.steps_per_epoch)
        return {"epoch": epoch, "step": step, **self._identity}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        for key, now in self._identity.items():
            if state_dict[key] != now:
                raise RunError(
                    f"the checkpoint's place in the data has {key} {state_dict[key]}, this run has {now}",
                    "Going on from there would repeat or skip rows.",
                    "Resume with the same data, micro_batch * accumulation * processes and shuffle.",
                )
        epoch, step = state_dict["epoch"], state_dict["step"]
        assert isinstance(epoch, int)
        assert isinstance(step, int)
        self._position = epoch * self.steps_per_epoch + step

    @cached_property
    def _identity(self) -> dict[str, object]:
        return {
            "rows": len(self.examples),
            "fingerprint": self.examples.fingerprint,
            "rows_per_step": self._step_rows,
            "shuffle": self._shuffle,
        }

    def _permutation(self, epoch: int) -> torch.Tensor:
        if not self._shuffle:
            return torch.arange(len(self.examples))
        source = torch.Generator().manual_seed(self._ctx.rng("shuffle", epoch).seed)
        return torch.randperm(len(self.examples), generator=source)


class EvalBatches(RowBatches):
    """The evaluation source: each iteration starts anew and yields every row once over all ranks."""

    total_steps: int | None = None

    def __init__(self, ctx: Context, examples: Examples) -> None:
        config = ctx.section(TrainerConfig)
        super().__init__(ctx, examples, config.eval_micro_batch or config.micro_batch)

    def __iter__(self) -> Iterator[Sequence[Batch]]:
        window = self._micro_batch * self._ranks * EVAL_WINDOW
        for start in range(0, len(self.examples), window):
            yield self._micro_batches(range(start, min(start + window, len(self.examples))), must_train=False)

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Nothing: every evaluation is the same."""


def _trains(example: Example) -> bool:
    """Whether a row has a trained token; the first of a document is never a target."""
    firsts, at = set(), 0
    for length in example.documents or (len(example.labels),):
        firsts.add(at)
        at += length
    return any(label != UNTRAINED and at not in firsts for at, label in enumerate(example.labels))
