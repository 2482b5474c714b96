"""The loss of a step: each term's total over the whole step, divided by its count over the whole step.

    loss = sum over terms of weight * (sum of total) / (sum of count)       sums over micro-batches and ranks

Counts depend on the batches alone, so they are summed before the first backward, and each micro-batch
contributes its part of the one quotient. A mean of means (of micro-batches, or of ranks) would weigh a token
by how few others share its part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from pegbox.errors import ConfigError, PluginError
from pegbox.rows import Batch
from pegbox.types import Loss, LossOutput
from torch import Tensor

if TYPE_CHECKING:
    from pegbox.types import Runtime


@dataclass(frozen=True)
class StepCounts:
    """Counts of one optimizer step over all ranks, on the device.

    Attributes:
        names: names of the terms, C of them.
        counts_C: their counts.
        trained: trained tokens of the step.
    """

    names: tuple[str, ...]
    counts_C: Tensor
    trained: Tensor

    @property
    def nothing(self) -> Tensor:
        """Whether no term counted anything."""
        return self.counts_C.sum() == 0

    def values(self, output: LossOutput) -> Tensor:
        """What one micro-batch adds to the loss and to each term of the step: `[loss, term, ...]`."""
        terms = {term.name: term for term in output.terms}
        if terms.keys() != set(self.names):
            raise PluginError(
                f"the loss returned the terms {sorted(terms)} but counted {sorted(self.names)}",
                "Each term is divided by its own count over the step.",
                "Fix the plugin that owns build_loss.",
            )
        ordered = [terms[name] for name in self.names]
        # A term that nothing of the step belongs to is 0, not 0 / 0.
        divisors_C = torch.where(self.counts_C > 0, self.counts_C, 1.0)
        values = [term.total / divisor for term, divisor in zip(ordered, divisors_C, strict=True)]
        loss = sum((term.weight * value for term, value in zip(ordered, values, strict=True)), start=0.0)
        return torch.stack([loss, *values])


def count_step(runtime: Runtime, loss: Loss, batches: Sequence[Batch]) -> StepCounts:
    """Sum the counts of a step over micro-batches and ranks; the device is not waited for."""
    refuse_split(runtime, loss, batches)
    counts: dict[str, float] = {}
    for batch in batches:
        for name, count in loss.counts(batch).items():
            counts[name] = counts.get(name, 0.0) + count
    trained = float(sum(batch.trained_tokens for batch in batches))
    pin = runtime.device.type == "cuda"
    local = torch.tensor([*counts.values(), trained], dtype=wide_dtype(runtime.device), pin_memory=pin)
    total = runtime.sum(local.to(runtime.device, non_blocking=True))
    return StepCounts(tuple(counts), total[:-1].float(), total[-1])


def refuse_split(runtime: Runtime, loss: Loss, batches: Sequence[Batch]) -> None:
    """Raise if the loss needs a whole batch at once and the step is split."""
    if loss.scope == "batch" and len(batches) * runtime.world_size > 1:
        raise ConfigError(
            f"the loss needs the whole batch at once (scope 'batch'), but a step is split into "
            f"{len(batches)} micro-batches on each of {runtime.world_size} processes",
            "Its value would depend on how the rows were split.",
            "Set trainer.accumulation=1, raise trainer.micro_batch instead, and run one process.",
        )


def wide_dtype(device: torch.device) -> torch.dtype:
    """What sums are kept in: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
