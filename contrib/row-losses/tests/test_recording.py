"""What is recorded is each row's loss, and the wrapped loss does not notice."""

from __future__ import annotations

import pytest
import torch
from pegbox import hooks
from pegbox.errors import PluginError
from pegbox.plan import compose
from pegbox.rows import Batch
from pegbox.testing import FakeRuntime, tiny_batches, tiny_model
from pegbox_row_losses.config import RowLossesConfig
from pegbox_row_losses.ledger import Ledger, RowLoss, merge
from pegbox_row_losses.recording import record
from pegbox_row_losses.report import ranked
from stand_in import NegativeLogLikelihood, Plugin


class OfState(NegativeLogLikelihood):
    """A loss that keeps state."""

    state_scope = "rank"
    beta = 0.5

    def state_dict(self):
        return {"beta": self.beta}

    def load_state_dict(self, state_dict):
        self.beta = state_dict["beta"]


class OfHidden(NegativeLogLikelihood):
    needs = frozenset({"hidden"})


def step(loss, model, batch):
    """Value and gradients of one micro-batch."""
    model.module.zero_grad()
    output = loss(batch, model.compute(model.module, batch, loss.needs))
    output.terms[0].total.backward()
    return output.terms[0].total.detach(), [p.grad for p in model.module.parameters() if p.grad is not None]


def plain_row_losses(model, batches: list[Batch]) -> dict[int, tuple[float, int]]:
    """Mean loss and trained tokens of each row, one token at a time, from the logits."""
    found = {}
    for batch in batches:
        with torch.no_grad():
            logits = model.module(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits
        for b, row in enumerate(batch.rows):
            losses = [
                torch.nn.functional.cross_entropy(logits[b, t].double(), target).item()
                for t, target in enumerate(batch.targets_BT[b])
                if target != -100
            ]
            if losses:
                found[row] = sum(losses) / len(losses), len(losses)
    return found


def test_the_recorded_losses_are_those_of_each_row() -> None:
    model, batches, ledger = tiny_model(), tiny_batches(rows=3), Ledger()
    loss = record(NegativeLogLikelihood(), ledger)
    for batch in batches:
        step(loss, model, batch)
    expected = plain_row_losses(model, batches)
    recorded = merge([ledger.state_dict()])
    assert [found.row for found in recorded] == sorted(expected)
    for found in recorded:
        mean, tokens = expected[found.row]
        assert found.loss == pytest.approx(mean, rel=1e-5)
        assert found.last_loss == found.loss
        assert (found.tokens, found.visits) == (tokens, 1)


def test_values_and_gradients_of_the_wrapped_loss_are_the_same_to_the_bit() -> None:
    model = tiny_model()
    wrapped = record(NegativeLogLikelihood(), Ledger())
    for batch in tiny_batches():
        value, gradients = step(NegativeLogLikelihood(), model, batch)
        same_value, same_gradients = step(wrapped, model, batch)
        assert torch.equal(value, same_value)
        assert len(gradients) > 5
        assert all(torch.equal(a, b) for a, b in zip(gradients, same_gradients, strict=True))
        assert wrapped.counts(batch) == NegativeLogLikelihood().counts(batch)


def test_visits_are_averaged_over_tokens_and_the_last_one_is_kept() -> None:
    batch, ledger = tiny_batches(rows=2)[0], Ledger()
    tokens = {row: int((batch.targets_BT[b] != -100).sum()) for b, row in enumerate(batch.rows)}
    for logp in (-3.0, -1.0):
        ledger.add(batch, torch.full((batch.trained_tokens,), logp))
    assert merge([ledger.state_dict()]) == [
        RowLoss(row=row, loss=2.0, last_loss=1.0, tokens=count, visits=2) for row, count in tokens.items()
    ]


def test_evaluation_is_not_recorded() -> None:
    model, ledger = tiny_model(), Ledger()
    loss = record(NegativeLogLikelihood(), ledger)
    with torch.no_grad():
        for batch in tiny_batches():
            loss(batch, model.compute(model.module, batch, loss.needs))
    assert merge([ledger.state_dict()]) == []


def test_rows_without_a_trained_token_and_batches_without_rows_are_not_visited() -> None:
    (batch, _), ledger = tiny_batches(rows=3), Ledger()
    nothing = Batch(
        input_ids_BT=torch.zeros(1, 1, dtype=torch.long),
        targets_BT=torch.full((1, 1), -100),
        trained_N=torch.zeros(0, dtype=torch.long),
    )
    ledger.add(nothing, torch.zeros(0))
    kept = batch.trained_N >= batch.input_ids_BT.shape[1]
    without_first = Batch(
        input_ids_BT=batch.input_ids_BT,
        targets_BT=batch.targets_BT,
        trained_N=batch.trained_N[kept],
        rows=(7, 300, 2),
    )
    ledger.add(without_first, torch.full((int(kept.sum()),), -1.0))
    assert [row.row for row in merge([ledger.state_dict()])] == [2, 300]


def test_recording_never_asks_the_device() -> None:
    """Fake tensors have no values: whatever reads one on the host raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.device("cpu"):
        batch = Batch(
            input_ids_BT=torch.zeros(2, 5, dtype=torch.long),
            targets_BT=torch.zeros(2, 5, dtype=torch.long),
            trained_N=torch.arange(10),
            rows=(3, 1),
        )
        ledger, logps_N = Ledger(), torch.zeros(10)
        with pytest.raises(Exception, match=r"local_scalar_dense"):
            logps_N[0].item()
        for _ in range(2):
            ledger.add(batch, logps_N)


def test_ranks_are_merged_and_the_latest_visit_wins() -> None:
    first, second = tiny_batches(rows=2)
    one, other = Ledger(), Ledger()
    for ledger, batch, logp in ((one, first, -1.0), (other, second, -2.0)):
        ledger.add(batch, torch.full((batch.trained_tokens,), logp))
    for ledger, batch, logp in ((one, second, -4.0), (other, first, -5.0)):
        ledger.add(batch, torch.full((batch.trained_tokens,), logp))
    for states in ([one.state_dict(), other.state_dict()], [other.state_dict(), one.state_dict()]):
        found = {row.row: (row.loss, row.last_loss, row.visits) for row in merge(states)}
        assert found == dict.fromkeys(first.rows, (3.0, 5.0, 2)) | dict.fromkeys(second.rows, (3.0, 4.0, 2))


def test_a_ledger_goes_on_where_its_state_was_saved() -> None:
    batches = tiny_batches(rows=2)
    whole, begun, resumed = Ledger(), Ledger(), Ledger()
    for ledger in (whole, begun):
        ledger.add(batches[0], torch.full((batches[0].trained_tokens,), -1.5))
    resumed.load_state_dict(begun.state_dict())
    begun.add(batches[0], torch.full((batches[0].trained_tokens,), -9.0))
    for ledger in (whole, resumed):
        ledger.add(batches[1], torch.full((batches[1].trained_tokens,), -2.5))
    assert merge([resumed.state_dict()]) == merge([whole.state_dict()])


def test_rows_are_ranked_by_what_the_config_says() -> None:
    rows = [
        RowLoss(row=row, loss=loss, last_loss=last, tokens=tokens, visits=1)
        for row, loss, last, tokens in ((0, 1.0, 3.0, 9), (1, 2.0, 1.0, 9), (2, 9.0, 9.0, 1), (3, 2.0, 2.0, 9))
    ]
    order = {
        RowLossesConfig(): [2, 1, 3, 0],
        RowLossesConfig(keep=2): [2, 1],
        RowLossesConfig(keep=None, min_tokens=2): [1, 3, 0],
        RowLossesConfig(rank_by="last"): [2, 0, 3, 1],
    }
    for config, expected in order.items():
        assert [row.row for row in ranked(rows, config)] == expected


def test_a_loss_without_log_probabilities_is_refused(tmp_path) -> None:
    class HiddenOnly(Plugin):
        @hooks.hookimpl
        def build_loss(self):
            return OfHidden()

    mapping = {"model": {"name": "tiny"}, "plugins": ["plain", "row-losses"], "output": str(tmp_path / "run")}
    ctx = compose(mapping, instances={"plain": HiddenOnly()})
    ctx.runtime = FakeRuntime()
    with pytest.raises(PluginError) as caught:
        ctx.call(hooks.build_loss, ctx, tiny_model())
    assert caught.value.what == "row-losses cannot record OfHidden: it needs hidden, not logps"
    assert "Remove row-losses" in caught.value.next


def test_the_state_of_a_wrapped_loss_stays_a_state_of_the_run(tmp_path) -> None:
    class Stateful(Plugin):
        @hooks.hookimpl
        def build_loss(self):
            return OfState()

    mapping = {"model": {"name": "tiny"}, "plugins": ["plain", "row-losses"], "output": str(tmp_path / "run")}
    ctx = compose(mapping, instances={"plain": Stateful()})
    loss = ctx.call(hooks.build_loss, ctx, tiny_model())
    assert ctx.states.pop("row-losses/plugin").state_scope == "rank"
    assert ctx.states == {"plain/loss": loss}
    assert loss.state_dict() == {"beta": 0.5}
    assert loss.state_scope == "rank"
    loss.load_state_dict({"beta": 0.25})
    assert loss.state_dict() == {"beta": 0.25}


def test_a_wrapped_loss_without_state_registers_none(tmp_path) -> None:
    mapping = {"model": {"name": "tiny"}, "plugins": ["plain", "row-losses"], "output": str(tmp_path / "run")}
    ctx = compose(mapping, instances={"plain": Plugin()})
    ctx.call(hooks.build_loss, ctx, tiny_model())
    assert list(ctx.states) == ["row-losses/plugin"]
