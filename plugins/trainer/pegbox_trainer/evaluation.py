"""The loss on held-out rows: sum of totals over sum of counts, each row once over all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from pegbox.errors import RunError
from pegbox.rows import Batch, BatchSource
from pegbox.types import Loss, Model
from torch import Tensor, nn

from pegbox_trainer.finiteness import without_tensors
from pegbox_trainer.metrics import Extremes, Sums
from pegbox_trainer.normalization import refuse_split

if TYPE_CHECKING:
    from pegbox.types import Runtime


def evaluate(runtime: Runtime, model: Model, loss: Loss, source: BatchSource, extremes: Extremes) -> dict[str, float]:
    """`eval_loss`, and `eval_<name>` for each of several terms and each further figure; waits for the device.

    Raises:
        RunError: a loss is not finite, or the held-out rows have no trained token.
    """
    assert model.forward is not None, "a model is evaluated after it was placed"
    terms, further = Sums(runtime.device, {}), Sums(runtime.device, extremes)
    weights: dict[str, float] = {}
    seen: list[tuple[Batch, Tensor]] = []
    with _evaluating(model.module), torch.no_grad():
        for micro_batches in source:
            refuse_split(runtime, loss, micro_batches)
            for batch in micro_batches:
                loss.counts(batch)  # a loss refuses rows that it cannot take while they are on the host
                placed = batch.to(runtime.device)
                output = loss(placed, model.forward(placed, loss.needs))
                terms.add(output.terms)
                further.add(output.metrics)
                weights.update((term.name, term.weight) for term in output.terms)
                total = torch.stack([term.total.detach().float() for term in output.terms]).sum()
                seen.append((without_tensors(batch), torch.isfinite(total)))
    _refuse_non_finite(runtime, source, seen)
    means = terms.values(runtime)
    if not means:
        raise RunError(
            "the held-out rows have no trained token",
            "A loss over nothing has no value.",
            "Check the format of the held-out data and which tokens it trains.",
        )
    metrics = {"eval_loss": sum(weights[name] * mean for name, mean in means.items())}
    if len(means) > 1:
        metrics.update((f"eval_{name}", mean) for name, mean in means.items())
    metrics.update((f"eval_{name}", mean) for name, mean in further.values(runtime).items())
    return metrics


def _refuse_non_finite(runtime: Runtime, source: BatchSource, seen: list[tuple[Batch, Tensor]]) -> None:
    fine = torch.stack([finite for _, finite in seen]).tolist() if seen else []
    first_bad = next((source.describe(batch) for (batch, _), good in zip(seen, fine, strict=True) if not good), None)
    for rows in runtime.gather_objects(first_bad):
        if rows is not None:
            raise RunError(
                f"the evaluation loss of the batch {rows} is not finite",
                "The average over all held-out rows has no value.",
                "Look at these rows, or set trainer.precision to bf16 or fp32.",
            )


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """In evaluation mode; afterwards each part of the module is in the mode it was in."""
    trained = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in trained:
            part.training = True
