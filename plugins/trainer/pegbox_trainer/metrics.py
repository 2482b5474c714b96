"""Figures of a run: summed on the device, read only when they are logged, written to `metrics.jsonl`.

`metrics.jsonl` holds one JSON object per logged step (`kind: train`) and per evaluation (`kind: eval`). Every
field but those in `WALL_CLOCK` depends on the config, the data and the seed alone: a run that is resumed
writes the same file as one that never stopped.

A figure is a mean, the sum of totals over the sum of counts, unless a plugin declares `Item(kind="metric", name=...,
target="min")` or `"max"`: then it is the extreme of the totals of its terms that count anything. Both are exact over
micro-batches, ranks, the steps of a logged window, and a resume.
"""

from __future__ import annotations

import json
import math
import operator
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pegbox.errors import PluginError
from pegbox.rows import Batch
from pegbox.types import Term
from torch import Tensor

from pegbox_trainer.normalization import StepCounts, wide_dtype

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Runtime

WALL_CLOCK = ("elapsed_s", "tokens_per_s", "peak_memory_bytes", "generate_s", "score_s", "learn_s")
"""Fields of a record that may differ between two runs of one config."""


@dataclass(frozen=True)
class MetricsFile:
    """`metrics.jsonl`, written by one rank."""

    path: Path
    writes: bool

    def size(self) -> int:
        """Bytes written so far: the end of the last record."""
        return self.path.stat().st_size if self.writes and self.path.exists() else 0

    def cut(self, size: int) -> None:
        """Drop the records that follow; truncating a file is atomic."""
        if self.writes and self.size() > size:
            os.truncate(self.path, size)

    def append(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """Write one record; a figure that is not finite (the norm of an overflow in fp16) is null."""
        if self.writes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            figures = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, "step": step, **figures}) + "\n")

    def sync(self) -> None:
        """Wait until what was written would survive a power cut."""
        if self.writes and self.path.exists():
            with self.path.open("ab") as file:
                os.fsync(file.fileno())


@dataclass(frozen=True)
class Extreme:
    """How the values of an extreme become one: on the device, on the host, and what nothing is."""

    of_tensors: Callable[[Tensor, Tensor], Tensor]
    of_numbers: Callable[[float, float], float]
    nothing: float

    def value(self, term: Term, total: Tensor) -> Tensor:
        """What a term says, or nothing where it counts nothing."""
        if isinstance(term.count, Tensor):
            return torch.where(term.count > 0, total, self.nothing)
        return total if term.count else torch.full_like(total, self.nothing)


EXTREMES = {"min": Extreme(torch.minimum, min, math.inf), "max": Extreme(torch.maximum, max, -math.inf)}
Extremes = Mapping[str, Extreme]
"""Figures that are extremes, by name."""


def declared_extremes(ctx: Context) -> Extremes:
    """The figures that active plugins declare as extremes.

    Raises:
        PluginError: one is to be neither the smallest nor the largest.
    """
    items = ctx.items("metric")
    for name, item in items.items():
        if item.target not in EXTREMES:
            raise PluginError(
                f"the metric '{name}' is declared as '{item.target}'",
                "A figure is a mean unless it is declared as min or max.",
                "Fix the plugin whose register_items names it.",
            )
    return {name: EXTREMES[str(item.target)] for name, item in items.items()}


class Sums:
    """Totals and counts by name, summed without waiting for the device; of extremes the totals' smallest or largest."""

    def __init__(self, device: torch.device, extremes: Extremes) -> None:
        self._device, self._extremes = device, extremes
        self._totals: dict[str, Tensor] = {}
        self._counts: dict[str, float | Tensor] = {}

    def add(self, terms: Iterable[Term]) -> None:
        """Add what one micro-batch contributes to each term."""
        for term in terms:
            total = term.total.detach().to(wide_dtype(self._device))
            extreme, join = self._extremes.get(term.name), torch.add
            if extreme is not None:
                total, join = extreme.value(term, total), extreme.of_tensors
            self._totals[term.name] = join(self._totals[term.name], total) if term.name in self._totals else total
            self._counts[term.name] = self._counts.get(term.name, 0.0) + term.count  # type: ignore[operator]

    def values(self, runtime: Runtime) -> dict[str, float]:
        """Totals over counts of all ranks, and extremes, where anything was counted; waits for the device."""
        local = [(name, total.item(), float(self._counts[name])) for name, total in self._totals.items()]
        totals: dict[str, tuple[float, float]] = {}
        for gathered in runtime.gather_objects(local):
            for name, total, count in gathered:  # type: ignore[attr-defined]
                before, extreme = totals.get(name), self._extremes.get(name)
                join = operator.add if extreme is None else extreme.of_numbers
                totals[name] = (total, count) if before is None else (join(before[0], total), before[1] + count)
        return {
            name: total if name in self._extremes else total / count for name, (total, count) in totals.items() if count
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "totals": {name: total.cpu() for name, total in self._totals.items()},
            "counts": {name: float(count) for name, count in self._counts.items()},
        }

    def load_rank_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Take the sum of what several ranks had."""
        self._totals, self._counts = {}, {}
        for state in states:
            self.add(
                Term(name=name, total=total.to(self._device), count=state["counts"][name])
                for name, total in state["totals"].items()
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._totals = {name: total.to(self._device) for name, total in state["totals"].items()}
        self._counts = dict(state["counts"])


class Meter:
    """What happened since the last logged step, and since the run began.

    A checkpoint keeps it, so that one between two logged steps changes nothing of what is logged.
    """

    def __init__(self, runtime: Runtime, extremes: Extremes) -> None:
        self._runtime, self._extremes = runtime, extremes
        self.trained_tokens = 0
        self._elapsed_before_s = 0.0
        self._started = self._since = time.perf_counter()
        self._reset()

    def _reset(self) -> None:
        self._steps = self._tokens = 0
        self._names: tuple[str, ...] = ()
        self._values_K = self._trained = torch.zeros(
            (), dtype=wide_dtype(self._runtime.device), device=self._runtime.device
        )
        self._further = Sums(self._runtime.device, self._extremes)
        self._grad_norm = self._values_K
        self._learning_rate = 0.0

    def add_batch(self, batch: Batch, metrics: Iterable[Term]) -> None:
        """Count one micro-batch of this rank (its tensors still on the host) and its further figures."""
        mask = batch.attention_mask_BT
        if mask is not None and mask.device.type == "cpu":
            self._tokens += int(mask.sum())
        else:
            self._tokens += batch.input_ids_BT.numel()
        self._further.add(metrics)

    def add_step(self, counts: StepCounts, values_K: Tensor, grad_norm: Tensor, learning_rate: float) -> None:
        """Count one optimizer step; `values_K` is `[loss, term, ...]` of all ranks."""
        self._grad_norm, self._learning_rate = grad_norm, learning_rate
        self._names = ("loss", *counts.names)
        self._values_K = self._values_K + values_K
        self._trained = self._trained + counts.trained
        self._steps += 1

    @property
    def empty(self) -> bool:
        """Whether no step was made since the last read."""
        return self._steps == 0

    def read(self) -> dict[str, float]:
        """Metrics since the last read, over all ranks; waits for the device. The next window begins.

        The loss and its terms are means over the steps; the gradient's norm and the learning rate are the
        last step's.
        """
        metrics = dict(zip(self._names, (self._values_K / self._steps).tolist(), strict=True))
        if len(self._names) == 2:
            del metrics[self._names[1]]
        metrics.update(self._further.values(self._runtime))
        metrics |= {"grad_norm": self._grad_norm.item(), "learning_rate": self._learning_rate}
        self.trained_tokens += round(self._trained.item())
        tokens = sum(self._runtime.gather_objects(self._tokens))  # type: ignore[arg-type]
        now = time.perf_counter()
        metrics |= {
            "trained_tokens": self.trained_tokens,
            "tokens_per_step": tokens / self._steps,
            "tokens_per_s": tokens / max(now - self._since, 1e-9),
        }
        metrics["elapsed_s"] = self.elapsed_s
        if self._runtime.device.type == "cuda":
            metrics["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self._runtime.device)
        self._since = now
        self._reset()
        return metrics

    @property
    def elapsed_s(self) -> float:
        """Seconds since the run began, without the time it was stopped."""
        return self._elapsed_before_s + time.perf_counter() - self._started

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time of an evaluation or a checkpoint out of `tokens_per_s`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - began

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self._steps,
            "tokens": self._tokens,
            "names": self._names,
            "values": self._values_K.cpu(),
            "trained": self._trained.cpu(),
            "trained_tokens": self.trained_tokens,
            "elapsed_s": self.elapsed_s,
            "grad_norm": self._grad_norm.cpu(),
            "learning_rate": self._learning_rate,
            "further": self._further.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        device = self._runtime.device
        self._steps, self._tokens, self._names = state["steps"], state["tokens"], tuple(state["names"])
        self._values_K, self._trained = state["values"].to(device), state["trained"].to(device)
        self.trained_tokens, self._elapsed_before_s = state["trained_tokens"], state["elapsed_s"]
        self._grad_norm, self._learning_rate = state["grad_norm"].to(device), state["learning_rate"]
        self._further.load_state_dict(state["further"])

    def load_rank_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from the states of another number of ranks: the first takes the sums of all."""
        self.load_state_dict(states[0])
        first = self._runtime.rank == 0
        self._tokens = sum(state["tokens"] for state in states) if first else 0
        self._further.load_rank_states([state["further"] for state in states] if first else [])
