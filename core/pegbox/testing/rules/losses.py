"""What a loss promises: terms with counts, computed from what one forward returned.

The loop sums totals and counts over all micro-batches and ranks of a step and then divides. A loss that keeps these
rules gives the same result whatever the accumulation, the number of processes, and the padding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, get_args

from pegbox.rows import UNTRAINED, Batch
from pegbox.testing.batches import pad_batch, split_batch
from pegbox.testing.libraries import torch
from pegbox.testing.rule import require
from pegbox.types import LossOutput, Need

if TYPE_CHECKING:
    from pegbox.types import Loss, Model

Sums = dict[str, list[float]]
COLUMNS = 5
"""How much padding is added."""
SAME = 1e-4
"""Largest relative difference of two float32 results that are equal in exact arithmetic."""


def evaluate(loss: Loss, model: Model, batch: Batch) -> LossOutput:
    """The loss of one micro-batch; the model computes what the loss declares and nothing else."""
    return loss(batch, model.compute(model.module, batch, frozenset(loss.needs)))


def declares_what_it_needs(loss: Loss) -> None:
    """`needs` are known outputs, `scope` is `token` or `batch`."""
    needs, known = getattr(loss, "needs", None), frozenset(get_args(Need))
    require(
        isinstance(needs, frozenset) and bool(needs) and needs <= known,
        f"{type(loss).__name__}.needs is {needs!r}",
        "The loop runs one forward for the union of what the losses need, and gives them nothing else.",
        f"Set it to a frozenset of: {', '.join(sorted(known))}.",
    )
    scope = getattr(loss, "scope", None)
    require(
        scope in ("token", "batch"),
        f"{type(loss).__name__}.scope is {scope!r}",
        "The loop splits a step into micro-batches unless the loss belongs to a whole batch.",
        "Set it to 'token', or to 'batch' for a loss that needs all rows of a step at once.",
    )


def is_finite(loss: Loss, model: Model, batches: Sequence[Batch]) -> None:
    """Every total is one finite number, also for a micro-batch without a trained token."""
    for batch in [*batches, *(_untrained(batch) for batch in batches)]:
        output = evaluate(loss, model, batch)
        for term in (*output.terms, *output.metrics):
            value = term.total.detach()
            require(
                value.ndim == 0 and math.isfinite(float(value)),
                f"the term '{term.name}' is {value} for a micro-batch with {batch.trained_tokens} trained tokens",
                "A step may hold micro-batches in which nothing is trained; one bad number spoils the whole step.",
                "Sum over the trained tokens (the sum of none is 0) and do not divide: the loop does.",
            )
        require(
            bool(output.terms),
            f"{type(loss).__name__} returned no term",
            "Nothing would be trained.",
            "Return LossOutput(terms=(Term(...),)).",
        )


def _untrained(batch: Batch) -> Batch:
    nothing = batch.targets_BT.new_full(batch.targets_BT.shape, UNTRAINED)
    trained = {name: extra for name, extra in batch.extra.items() if extra.layout == "trained"}
    empty = {name: replace(extra, value=extra.value[:0]) for name, extra in trained.items()}
    none = {
        "trained_N": batch.trained_N[:0],
        "document_N": batch.trained_N[:0] if batch.document_N is not None else None,
    }
    return replace(batch, targets_BT=nothing, **none, extra={**batch.extra, **empty})


def is_differentiable(loss: Loss, model: Model, batches: Sequence[Batch]) -> None:
    """The gradient of the weighted terms reaches the model, is finite and is not zero everywhere."""
    batch = next(iter(batches))
    parameters = {name: p for name, p in model.module.named_parameters() if p.requires_grad}
    model.module.zero_grad()
    output = evaluate(loss, model, batch)
    for term in output.terms:
        require(
            term.total.requires_grad,
            f"the term '{term.name}' has no gradient",
            "A term that is cut off from the model trains nothing, silently.",
            "Compute it with torch operations from the outputs; use no item(), detach() or no_grad.",
        )
    sum(term.total * term.weight for term in output.terms).backward()
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    bad = [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]
    model.module.zero_grad()
    require(
        not bad,
        f"the gradient of {', '.join(bad[:3])} is not finite",
        "One such gradient makes all parameters NaN at the next step.",
        "Look for a division by zero, or for log(0) behind a mask: both have a gradient although they are not used.",
    )
    require(
        any(bool(gradient.any()) for gradient in gradients.values()),
        f"the gradient of all {len(parameters)} parameters is zero",
        "Nothing would be learnt.",
        "Compute the terms from the outputs; check that a clip or a mask does not cut everything off.",
    )


def counts_depend_on_the_batch_alone(loss: Loss, model: Model, batches: Sequence[Batch]) -> None:
    """`counts(batch)` is known before the forward, as host numbers, and each term carries the same count."""
    for batch in batches:
        counts = loss.counts(batch)
        require(
            isinstance(counts, Mapping) and all(type(value) in (int, float) for value in counts.values()),
            f"counts(batch) is {counts!r}",
            "Counts are summed over ranks before the first backward; a tensor would make the loop wait for the device.",
            "Return a mapping of term names to floats: batch.trained_tokens is known on the host.",
        )
        output = evaluate(loss, model, batch)
        carried = {term.name: term.count for term in output.terms}
        require(
            dict(loss.counts(batch)) == dict(counts) == carried,
            f"counts(batch) is {dict(counts)}, the terms carry {carried}",
            "The loop divides by the sum of counts(batch) over the step: a count that depends on the outputs, or has "
            "another name, gives a wrong mean.",
            "Compute both from the batch, in one function.",
        )


def does_not_depend_on_padding(loss: Loss, model: Model, batches: Sequence[Batch]) -> None:
    """More padding on the right changes no total and no count."""
    for batch in batches:
        padded = pad_batch(batch, COLUMNS)
        narrow, wide = _sums(loss, model, [batch]), _sums(loss, model, [padded])
        _same(
            narrow,
            wide,
            f"with {COLUMNS} more columns of padding",
            "How far a row is padded depends on the rows beside it.",
            "Look at trained tokens only: batch.trained_N, or targets_BT != -100; no mean over columns.",
        )


def does_not_depend_on_the_split(loss: Loss, model: Model, batches: Sequence[Batch], rows: int = 1) -> None:
    """The sums over micro-batches of `rows` rows are the sums over the whole; a loss of scope `batch` is not split."""
    if loss.scope == "batch":
        return
    for batch in batches:
        whole, parts = _sums(loss, model, [batch]), _sums(loss, model, split_batch(batch, rows))
        _same(
            whole,
            parts,
            f"when its rows come as micro-batches of {rows}",
            "The result of a step must not depend on accumulation or the number of processes.",
            "Return sums, not means: Term.total is divided by the count of the whole step. If it needs all rows at "
            "once, set scope = 'batch'.",
        )


def never_calls_the_model(loss: Loss, model: Model, batches: Sequence[Batch]) -> None:
    """The model runs once, in the loop; the loss works on what came out."""
    batch = next(iter(batches))
    outputs = model.compute(model.module, batch, frozenset(loss.needs))
    calls: list[str] = []
    names = {module: name or "the model" for name, module in model.module.named_modules()}
    hooks = [module.register_forward_pre_hook(lambda module, _: calls.append(names[module])) for module in names]
    loss(batch, outputs)
    for hook in hooks:
        hook.remove()
    require(
        not calls,
        f"{type(loss).__name__} ran {calls[0] if calls else ''}",
        "A second forward costs as much as the first and escapes placement, precision and patches.",
        "Declare what it takes in `needs`; ask ctx.open_model for a second model and precompute with it.",
    )


def _sums(loss: Loss, model: Model, batches: Sequence[Batch]) -> Sums:
    """Total and count of each term, summed over micro-batches."""
    sums: Sums = {}
    with torch().no_grad():
        for batch in batches:
            counts = loss.counts(batch)
            for term in evaluate(loss, model, batch).terms:
                pair = sums.setdefault(term.name, [0.0, 0.0])
                pair[0] += float(term.total)
                pair[1] += counts.get(term.name, term.count)
    return sums


def _same(first: Sums, second: Sums, when: str, why: str, next: str) -> None:
    for name in first.keys() | second.keys():
        before, after = first.get(name, [0.0, 0.0]), second.get(name, [0.0, 0.0])
        for what, old, new in zip(("total", "count"), before, after, strict=True):
            require(
                math.isclose(old, new, rel_tol=SAME, abs_tol=SAME),
                f"the {what} of the term '{name}' is {old:.6g}, and {new:.6g} {when}",
                why,
                next,
            )
