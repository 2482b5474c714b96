"""Several losses of one run as one: `loss: {dpo: 1.0, sft: 0.1}`.

The core owns `build_loss` then, and asks each plugin that is weighed for its own. Every loss sees the same outputs of
one forward; its terms keep their own counts, get its weight, and are named after the plugin.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pegbox import hooks
from pegbox.rows import Batch
from pegbox.types import Loss, LossOutput, Outputs

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model

OWNER = "weighed-losses"


class WeighedLosses:
    """Owns `build_loss` of a run whose config weighs several."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights = weights

    @hooks.hookimpl
    def build_loss(self, ctx: Context, model: Model) -> Loss:
        losses = {name: ctx.kernel.ask(name, hooks.build_loss, ctx, model) for name in self.weights}
        return WeighedLoss(losses, self.weights)


class WeighedLoss:
    """The terms of all losses, each times its weight (`pegbox.types.Loss`)."""

    def __init__(self, losses: Mapping[str, Loss], weights: Mapping[str, float]) -> None:
        self.losses, self.weights = losses, weights
        self.needs = frozenset().union(*(loss.needs for loss in losses.values()))
        self.extras = frozenset().union(*(getattr(loss, "extras", ()) for loss in losses.values()))
        self.entropy_gradient = any(getattr(loss, "entropy_gradient", False) for loss in losses.values())
        self.scope: Literal["token", "batch"] = (
            "batch" if "batch" in {loss.scope for loss in losses.values()} else "token"
        )

    def counts(self, batch: Batch) -> Mapping[str, float]:
        every = {name: loss.counts(batch) for name, loss in self.losses.items()}
        return {f"{name}/{term}": count for name, counts in every.items() for term, count in counts.items()}

    def __call__(self, batch: Batch, outputs: Outputs) -> LossOutput:
        made = {name: loss(batch, outputs) for name, loss in self.losses.items()}
        terms = [(name, term) for name, output in made.items() for term in output.terms]
        weighed = (replace(t, name=f"{name}/{t.name}", weight=t.weight * self.weights[name]) for name, t in terms)
        return LossOutput(terms=tuple(weighed), metrics=tuple(m for output in made.values() for m in output.metrics))
