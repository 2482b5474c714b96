"""Several losses of one run, each with its weight: what the loop gets is their weighed sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pegbox import hooks
from pegbox.errors import ConfigError, PluginError
from pegbox.hooks import hookimpl
from pegbox.plan import compose
from pegbox.rows import Batch
from pegbox.testing.rules.losses import evaluate
from pegbox.testing.tiny import plain_model, tiny_batches
from pegbox.types import LossOutput, Outputs, Term


class Plain:
    """Minus the sum of the log-probabilities, over the number of trained tokens."""

    needs: Any = frozenset({"logps"})
    scope: Any = "token"

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"sample": float(batch.trained_tokens)}

    def __call__(self, batch: Batch, outputs: Outputs) -> LossOutput:
        term = Term(name="sample", total=-outputs.logps_N.sum(), count=self.counts(batch)["sample"])
        return LossOutput(terms=(term,))


class Squared(Plain):
    """The sum of squared log-probabilities over the number of rows; it keeps how often it was asked."""

    scope = "batch"
    extras = frozenset({"reference_logps"})
    asked = 0

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"sample": float(len(batch.rows))}

    def __call__(self, batch: Batch, outputs: Outputs) -> LossOutput:
        self.asked += 1
        term = Term(name="sample", total=(outputs.logps_N**2).sum(), count=self.counts(batch)["sample"], weight=2.0)
        return LossOutput(terms=(term,), metrics=(Term(name="asked", total=outputs.logps_N.sum(), count=1.0),))

    def state_dict(self) -> dict[str, object]:
        return {"asked": self.asked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.asked = state["asked"]


class Owns:
    def __init__(self, loss: type[Plain]) -> None:
        self.loss = loss

    @hookimpl
    def build_loss(self) -> Plain:
        return self.loss()


class Doubled:
    """Wraps `build_loss`: what it gets is the whole."""

    seen: Any = None

    @hookimpl(wrapper=True)
    def build_loss(self) -> Any:
        self.seen = yield
        return self.seen


def composed(loss: dict[str, float], **instances: object) -> Any:
    known = {"plain": Owns(Plain), "squared": Owns(Squared), **instances}
    config = {"model": {"name": "m"}, "plugins": ["plain", "squared", *instances], "loss": loss}
    return compose(config, instances=known)


def test_the_weighed_loss_is_the_sum_of_its_parts_with_values_and_gradients() -> None:
    wrapper, model, batch = Doubled(), plain_model(), tiny_batches()[0]
    ctx = composed({"squared": 0.25, "plain": 3.0}, wrapper=wrapper)
    loss = ctx.call(hooks.build_loss, ctx, model)
    assert wrapper.seen is loss
    output = evaluate(loss, model, batch)
    counts = loss.counts(batch)
    assert counts == {"squared/sample": 3.0, "plain/sample": float(batch.trained_tokens)}
    found = sum(term.weight * term.total / counts[term.name] for term in output.terms)
    logps_N = model.compute(model.module, batch, frozenset({"logps"})).logps_N
    want = 0.25 * 2.0 * (logps_N**2).sum() / 3 - 3.0 * logps_N.mean()
    assert found.item() == pytest.approx(want.item(), rel=1e-6)
    weight = model.module["head"].weight
    grads = [torch.autograd.grad(value, weight)[0] for value in (found, want)]
    assert grads[0].allclose(grads[1], rtol=1e-5, atol=1e-8)
    assert [term.name for term in output.metrics] == ["asked"]


def test_it_needs_what_any_of_them_needs_and_keeps_their_states() -> None:
    ctx = composed({"squared": 1.0, "plain": 1.0})
    loss = ctx.call(hooks.build_loss, ctx, plain_model())
    assert (loss.scope, loss.needs, loss.extras) == ("batch", {"logps"}, {"reference_logps"})
    assert set(ctx.states) == {"squared/loss"}


@pytest.mark.parametrize("weights", [{"plain": 1.0}, {"plain": 1.0, "squared": 1.0, "dpo": 1.0}])
def test_a_weight_without_a_loss_or_a_loss_without_a_weight_is_refused(weights) -> None:
    with pytest.raises(ConfigError, match=r"loss weighs plain.*make a loss are: plain, squared"):
        composed(weights)


def test_without_weights_two_losses_are_still_refused_and_the_key_is_named() -> None:
    with pytest.raises(PluginError, match=r"2 plugins own build_loss(.|\n)*unless the config weighs them"):
        composed({})
