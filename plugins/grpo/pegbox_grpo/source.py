"""Rollouts as batches: the training source of an online method.

    take the prompts of the next generation from the data
    generate, score, measure                                                   collecting.py
    yield `steps_per_generation` optimizer steps, `iterations` times

The place in all this is state: prompts taken, steps made, and the trajectories that are still to be learnt from. A run
that is resumed asks for no prompt twice and leaves none out; the state holds what every rank holds, so it does not
matter how many ranks there are.

`trainer.batch` (or micro_batch, accumulation and processes) is the number of prompts of a generation, `max_steps`
counts optimizer steps, and an epoch ends when each prompt was learnt from as often as the config says.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pegbox.errors import PluginError, RunError
from pegbox.rows import Batch, Dataset, Example, ExampleStream, RowSource

from pegbox_grpo.collecting import Collected, Collector, Rows, own_tokens
from pegbox_grpo.completions_file import CompletionsFile
from pegbox_grpo.figures import with_figures
from pegbox_grpo.trajectories import Trajectory, examples_of, with_rollouts

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model

    from pegbox_grpo.config import GrpoConfig


class OnlineBatches:
    """Optimizer steps of rollouts (`pegbox.rows.BatchSource`).

    Attributes:
        step: optimizer steps handed out; the version of the weights is their number.
        generation: generations made.
    """

    def __init__(self, ctx: Context, model: Model, inner: RowSource, config: GrpoConfig) -> None:
        self.ctx, self.config, self.inner = ctx, config, inner
        self.examples: Dataset = inner.examples
        self.total_steps = total_steps(inner, config)
        self.collector = Collector(ctx, model, inner, config)
        self.file = CompletionsFile(ctx, config.completions)
        self.step = self.generation = self.tokens = 0
        self._trajectories: Sequence[Trajectory] = ()
        self._parts: Sequence[Sequence[int]] = ()
        self._layouts: dict[int, list[Batch]] = {}
        self._made = 0
        self._learn_s: float | None = None

    @property
    def epoch(self) -> float | None:
        """Passes over the prompts so far, as the source of prompts says."""
        return getattr(self.inner, "epoch", None)

    def __iter__(self) -> Iterator[Sequence[Batch]]:
        while self.total_steps is None or self.step < self.total_steps:
            figures: dict[str, tuple[float, float]] = {}
            if self._made == len(self._parts) * self.config.iterations:
                rows = self.inner.take()
                if not rows:
                    return
                figures = self._generate(rows)
            batches = self._batches(self._made % len(self._parts))
            self._made += 1
            self.step += 1
            if figures and self.ctx.runtime.rank == 0:
                batches = with_figures(batches, figures)
            began = time.perf_counter()
            yield batches
            self._learn_s = (self._learn_s or 0.0) + time.perf_counter() - began

    def _generate(self, rows: Rows) -> dict[str, tuple[float, float]]:
        """Make the next generation; its figures, and the seconds that learning from the one before took."""
        seed = self.ctx.rng("grpo/sampling", self.generation).seed
        made = self.collector.collect(rows, "train", seed, self.step, self.config.steps_per_generation)
        self.file.append(made, self.step, "train")
        self.generation += 1
        self.tokens += sum(len(one.prompt) + own_tokens(one) for one in made.rollouts)
        self._trajectories, self._parts, self._made = made.trajectories, made.parts, 0
        self._layouts = {}
        for index, batches in made.layouts.items():
            self._layouts[index] = self._joined(index, batches)
        figures = {**made.figures, "num_tokens": (float(self.tokens), 1.0)}
        if self._learn_s is not None:
            figures["learn_s"] = self._learn_s, 1.0
        self._learn_s = None
        return figures

    def _batches(self, index: int) -> list[Batch]:
        """This rank's micro-batches of one part of the generation."""
        if index not in self._layouts:
            held = [self._trajectories[at] for at in self._parts[index]]
            self._layouts[index] = self._joined(index, self.inner.lay_out(examples_of(held)))
        return self._layouts[index]

    def _joined(self, index: int, batches: Sequence[Batch]) -> list[Batch]:
        held = [self._trajectories[at] for at in self._parts[index]]
        return [with_rollouts(batch, held) for batch in batches]

    def describe(self, batch: Batch) -> str:
        """Where the prompts of a batch came from."""
        return self.inner.describe(batch)

    # ---- state ----

    def state_dict(self) -> dict[str, object]:
        left = self._made < len(self._parts) * self.config.iterations
        return {
            "prompts": self.inner.state_dict(),
            "step": self.step,
            "generation": self.generation,
            "tokens": self.tokens,
            "updates": self.config.updates,
            "made": self._made if left else 0,
            "parts": [list(part) for part in self._parts] if left else [],
            "trajectories": [one.to_json() for one in self._trajectories] if left else [],
            "completions_bytes": self.file.size(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if (before := state_dict["updates"]) != self.config.updates:
            raise RunError(
                f"the checkpoint learns from a generation in {before} steps, this run in {self.config.updates}",
                "Steps and schedule would not be those of the run that began.",
                "Resume with the same grpo.steps_per_generation and grpo.iterations.",
            )
        self.inner.load_state_dict(state_dict["prompts"])
        self.step, self.generation, self.tokens = (state_dict[key] for key in ("step", "generation", "tokens"))
        self._made, self._parts = state_dict["made"], state_dict["parts"]
        self._trajectories = [Trajectory.from_json(saved) for saved in state_dict["trajectories"]]
        self._layouts = {}
        self.file.cut(state_dict["completions_bytes"])


class EvalRollouts:
    """Held-out prompts, completed and scored anew in each evaluation (`pegbox.rows.BatchSource`)."""

    total_steps: int | None = None

    def __init__(self, ctx: Context, examples: Dataset, training: OnlineBatches) -> None:
        self.ctx, self.examples, self.training = ctx, examples, training

    def __iter__(self) -> Iterator[Sequence[Batch]]:
        collector, step = self.training.collector, self.training.step
        for number, rows in enumerate(self._windows()):
            seed = self.ctx.rng("grpo/eval", number).seed
            made: Collected = collector.collect(rows, "eval", seed, step)
            self.training.file.append(made, step, "eval")
            batches = made.layouts.get(0) or collector.source.lay_out(examples_of(made.trajectories))
            joined = [with_rollouts(batch, made.trajectories) for batch in batches]
            yield with_figures(joined, made.figures) if self.ctx.runtime.rank == 0 else joined

    def _windows(self) -> Iterator[list[tuple[int, Example]]]:
        """All rows in order, some at a time."""
        size = self.training.config.eval_batch
        if not isinstance(self.examples, ExampleStream):
            for start in range(0, len(self.examples), size):
                yield [(row, self.examples[row]) for row in range(start, min(start + size, len(self.examples)))]
            return
        begin, first = self.examples.state_dict(), 0
        try:
            while len(taken := self.examples.take(size)):
                yield [(first + row, taken[row]) for row in range(len(taken))]
                first += len(taken)
        finally:
            self.examples.load_state_dict(begin)

    def describe(self, batch: Batch) -> str:
        if isinstance(self.examples, ExampleStream):
            return ", ".join(f"held-out row {row:,}" for row in batch.rows)
        return ", ".join(self.examples.describe(row) for row in batch.rows)

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Nothing: every evaluation is the same."""


def total_steps(inner: RowSource, config: GrpoConfig) -> int | None:
    """Optimizer steps of the run: `max_steps` where the config sets them, else all that the prompts are enough for."""
    if inner.max_steps is not None or inner.total_steps is None:
        return inner.max_steps
    return inner.total_steps * config.updates


def row_source(source: object) -> RowSource:
    """The source of prompts.

    Raises:
        PluginError: it does not hand out rows.
    """
    if not isinstance(source, RowSource):
        raise PluginError(
            f"grpo draws prompts from a {type(source).__name__}, which hands out batches and no rows",
            "Prompts are taken from the source, and completions are laid out by it.",
            "List grpo before the plugin that wraps the source of batches, or use a trainer with a RowSource.",
        )
    return source
