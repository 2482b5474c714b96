"""What the loss needs to know of a whole step, attached to each of its micro-batches.

The divergence has no gradient, so it is computed before the first micro-batch of a step is handed out: the rows of the
step over all ranks are taken, their answers go to other prompts (`mismatch.py`), and policy and reference are asked for
their log-probabilities. Every micro-batch then carries the one number: how the step is split changes nothing.

Held-out rows have one divergence, over all of them. Dropout is off while it is measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from operator import itemgetter
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

import torch
from pegbox.errors import ConfigError, DataError, PluginError
from pegbox.rows import Batch, BatchSource, Dataset, Example, Examples, ExampleStream, Extra, RowSource
from torch import Tensor

from pegbox_kto.config import REFERENCE, KtoConfig
from pegbox_kto.losses import kl_estimate
from pegbox_kto.mismatch import mismatched

if TYPE_CHECKING:
    from pegbox.types import Model, Runtime

KL, ANSWERS = "kto_kl", "kto_answers"
"""Names of extras: the divergence, a scalar in nats; and how many answers are wanted and unwanted, two numbers."""
WINDOW = 256
"""Held-out rows whose mismatched documents are laid out together."""


@runtime_checkable
class LaysOut(Protocol):
    """A source that lays out examples of others, as `pegbox.rows.RowSource` does."""

    def lay_out(self, examples: Sequence[Example]) -> Sequence[Batch]: ...


def with_step_figures(source: BatchSource, runtime: Runtime, model: Model, config: KtoConfig) -> BatchSource:
    """The source whose batches carry what the loss needs of their step.

    Raises:
        PluginError: the source cannot lay out the documents that the divergence is measured on.
        DataError, ConfigError: the rows cannot be mismatched.
    """
    split, diverges = source.examples.split, config.loss == "kto"
    if diverges and not isinstance(source, RowSource if split == "train" else LaysOut):
        raise PluginError(
            f"the source of {split} batches, {type(source).__name__}, does not hand out rows",
            "The KL term is measured on documents made of the rows of a step, laid out as these are.",
            "List kto directly after trainer and reference; or set kto.loss=apo_zero_unpaired, which has no KL term.",
        )
    divergence = Divergence(source, runtime, model) if diverges else None
    return (TrainSteps if split == "train" else HeldOut)(source, runtime, divergence)


class Divergence:
    """Estimates how far the policy is from the reference."""

    def __init__(self, source: BatchSource, runtime: Runtime, model: Model) -> None:
        rows = source.examples
        if not isinstance(rows, ExampleStream) and len(rows) < 2:
            raise DataError(
                f"the {rows.split} split has {len(rows)} row",
                "The KL term is measured on answers of other rows.",
                "Give it more rows; or set kto.loss=apo_zero_unpaired, which has no KL term.",
            )
        self._source, self._runtime, self._model = cast("LaysOut", source), runtime, model
        if not isinstance(rows, ExampleStream):
            # One document now, rather than an error at the first evaluation.
            self._lay_out(mismatched([rows[1]], rows[0]))

    def total(self, examples: Sequence[Example]) -> Tensor:
        """The sum of the log-ratios of documents over this rank's share of them, on the device."""
        assert self._model.forward is not None, "batches are made after the model was placed"
        total = torch.zeros((), device=self._runtime.device)
        batches = self._lay_out(examples)
        with _evaluating(self._model.module), torch.no_grad():
            for batch in batches:
                placed = batch.to(self._runtime.device)
                logps_N = self._model.forward(placed, frozenset({"logps"})).logps_N
                assert logps_N is not None, "the model provides every need"
                total += (logps_N.float() - placed.extra[REFERENCE].value.float()).sum()
        return total

    def _lay_out(self, examples: Sequence[Example]) -> Sequence[Batch]:
        batches = self._source.lay_out(examples)
        if any(REFERENCE not in batch.extra for batch in batches):
            raise PluginError(
                f"batches that were laid out came without {REFERENCE}",
                "The KL term compares policy and reference on documents made of the rows of a step.",
                "List reference before kto; another plugin that brings them has to refine lay_out as well.",
            )
        return batches

    def estimate(self, total: Tensor, documents: int) -> Tensor:
        """The estimate over all ranks, from each rank's total; the device is not waited for."""
        return kl_estimate(self._runtime.sum(total), documents)


class TrainSteps:
    """Training batches with the figures of their step (`pegbox.rows.BatchSource`); its place is that of the source."""

    def __init__(self, source: BatchSource, runtime: Runtime, divergence: Divergence | None) -> None:
        self.examples: Dataset = source.examples
        self.total_steps = source.total_steps
        self._source, self._runtime, self._divergence = source, runtime, divergence
        if divergence is None:
            # Rows stay as they are: what is listed after kto may lay them out, such as to precompute the reference.
            if isinstance(source, LaysOut):
                self.lay_out = source.lay_out
            if isinstance(source, RowSource):
                self.take, self.max_steps = source.take, source.max_steps

    @property
    def epoch(self) -> float | None:
        """Passes over the data so far; None if the source does not say."""
        return getattr(self._source, "epoch", None)

    def __iter__(self) -> Iterator[Sequence[Batch]]:
        for batches, kl in ((b, None) for b in self._source) if self._divergence is None else self._steps():
            device = self._runtime.device
            answers_2 = torch.tensor(_answers(batches), dtype=torch.float32, pin_memory=device.type == "cuda")
            yield _attach(batches, self._runtime.sum(answers_2.to(device, non_blocking=True)), kl)

    def _steps(self) -> Iterator[tuple[Sequence[Batch], Tensor]]:
        """The steps of the source, made of the rows that it hands out, and the divergence at each."""
        assert self._divergence is not None, "callers ask"
        source = cast("RowSource", self._source)
        while taken := source.take():
            numbers, rows = zip(*taken, strict=True)
            # In the order of the data: packing takes the rows of a step in another one.
            ordered = [row for _, row in sorted(taken, key=itemgetter(0))]
            documents = mismatched(ordered, ordered[-1] if len(ordered) > 1 else self._row_before(numbers[0]))
            kl = self._divergence.estimate(self._divergence.total(documents), len(documents))
            yield [replace(b, rows=tuple(numbers[at] for at in b.rows)) for b in source.lay_out(rows)], kl

    def _row_before(self, number: int) -> Example:
        """The row of the data that lends its answers to the only row of a step."""
        if isinstance(self.examples, ExampleStream):
            raise ConfigError(
                f"a step has one row, {number}, of a stream",
                "The KL term is measured on answers of other rows of the step.",
                "Raise trainer.batch; or set kto.loss=apo_zero_unpaired, which has no KL term.",
            )
        return self.examples[(number or len(self.examples)) - 1]

    def describe(self, batch: Batch) -> str:
        return self._source.describe(batch)

    def state_dict(self) -> dict[str, object]:
        return self._source.state_dict()

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self._source.load_state_dict(state_dict)


class HeldOut(TrainSteps):
    """Held-out batches with the figures of all held-out rows."""

    def __iter__(self) -> Iterator[Sequence[Batch]]:
        kl = None if self._divergence is None else self._measure(self._divergence, self._rows)
        answers_2 = torch.tensor(self._signs, dtype=torch.float32)
        for batches in self._source:
            yield _attach(batches, answers_2, kl)

    def _measure(self, divergence: Divergence, rows: Examples) -> Tensor:
        total, documents = torch.zeros((), device=self._runtime.device), 0
        for start in range(0, len(rows), WINDOW):
            window = [rows[at] for at in range(start, min(start + WINDOW, len(rows)))]
            made = mismatched(window, rows[(start or len(rows)) - 1])
            total, documents = total + divergence.total(made), documents + len(made)
        return divergence.estimate(total, documents)

    @cached_property
    def _signs(self) -> tuple[int, int]:
        signs = Counter(sign for at in range(len(self._rows)) for sign in self._rows[at].signs or (1,))
        return signs[1], signs[-1]

    @property
    def _rows(self) -> Examples:
        if isinstance(self.examples, ExampleStream):
            raise ConfigError(
                "the held-out rows are a stream",
                "Figures over all of them are needed before the first is evaluated, and a stream is read once.",
                "Give the held-out rows as files that are read whole, or evaluate with another loss.",
            )
        return self.examples


def _attach(batches: Sequence[Batch], answers_2: Tensor, kl: Tensor | None) -> list[Batch]:
    figures = {ANSWERS: answers_2} if kl is None else {ANSWERS: answers_2, KL: kl}
    extra = {name: Extra(value=value, layout="global") for name, value in figures.items()}
    return [replace(batch, extra={**batch.extra, **extra}) for batch in batches]


def _answers(batches: Sequence[Batch]) -> tuple[int, int]:
    """How many documents of batches on the host are wanted and unwanted."""
    signs = Counter(sign for batch in batches if batch.sign_D is not None for sign in batch.sign_D.tolist())
    return signs[1], signs[-1]


@contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """In evaluation mode; afterwards each part of the module is in the mode it was in."""
    trained = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in trained:
            part.training = True
