"""The loss equals TRL's, value, gradient and metrics; rows that are no pairs are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from pegbox.errors import DataError
from pegbox.rows import Batch, Example, Extra
from pegbox.testing.tiny import collate, tiny_batches
from pegbox.types import Outputs
from pegbox_reward.loss import RewardLoss, bradley_terry
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

PAIRS = [([3, 4, 5, 6], [3, 4, 9]), ([7, 8], [7, 9, 10, 11, 12]), ([20, 21, 22], [20, 30, 31])]
MARGINS = [0.5, 2.0, 0.0]
METRICS = ("accuracy", "margin", "mean_reward", "min_reward", "max_reward")


def batch_of(margins: bool) -> Batch:
    examples = [
        Example(input_ids=ids, labels=ids, signs=(sign,))
        for pair in PAIRS
        for ids, sign in zip(pair, (1, -1), strict=True)
    ]
    batch = collate(examples, tuple(range(len(PAIRS))))
    value_D = torch.tensor(MARGINS).repeat_interleave(2)
    return replace(batch, extra={"margin": Extra(value=value_D, layout="document")} if margins else {})


def classifier(base: Path) -> PreTrainedModel:
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    with torch.no_grad():
        model.score.weight.mul_(30)  # differences of a size at which the sigmoid bends
    return model.train()


def ours(model: PreTrainedModel, batch: Batch, loss: RewardLoss) -> dict[str, torch.Tensor | float]:
    """Loss and metrics as the loop computes them; the gradients are left in the model."""
    hidden_BTH = model.model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT).last_hidden_state
    output = loss(batch, Outputs(values_BTC=model.score(hidden_BTH)))
    counts = loss.counts(batch)
    assert counts == {term.name: term.count for term in output.terms}
    value = sum(term.weight * term.total / counts[term.name] for term in output.terms)
    value.backward()
    return {"loss": value.detach(), **{metric.name: metric.total / metric.count for metric in output.metrics}}


@pytest.fixture
def theirs(base: Path, tmp_path: Path) -> Callable[..., tuple[PreTrainedModel, dict[str, float]]]:
    """TRL's loss and metrics on the pairs, its gradients left in the model, or in the rewards that stand for one."""
    from trl import RewardConfig, RewardTrainer

    def run(
        margins: bool, center: float | None, rewards_B1: torch.Tensor | None = None
    ) -> tuple[PreTrainedModel, dict[str, float]]:
        rows = [{"chosen_ids": chosen, "rejected_ids": rejected} for chosen, rejected in PAIRS]
        rows = [{**row, "margin": margin} for row, margin in zip(rows, MARGINS, strict=True)] if margins else rows
        arguments = RewardConfig(
            output_dir=str(tmp_path),
            center_rewards_coefficient=center,
            disable_dropout=False,
            gradient_checkpointing=False,
            report_to=[],
            use_cpu=True,
            bf16=False,
        )
        model, tokenizer = classifier(base), AutoTokenizer.from_pretrained(base)
        trainer = RewardTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        inputs = trainer.data_collator(rows)
        fixed = None if rewards_B1 is None else lambda **_: SimpleNamespace(logits=rewards_B1)
        loss = trainer.compute_loss(fixed or model, dict(inputs))
        loss.backward()
        seen = {name: values[-1] for name, values in trainer._metrics["train"].items()}
        return model, {"loss": loss.item(), **seen}

    return run


@pytest.mark.parametrize("margins", [False, True])
@pytest.mark.parametrize("center", [None, 0.01, 0.7])
def test_loss_gradients_and_metrics_equal_trls(
    margins: bool, center: float | None, base: Path, theirs: Callable[..., tuple[PreTrainedModel, dict[str, float]]]
) -> None:
    other, expected = theirs(margins, center)
    model = classifier(base)
    seen = ours(model, batch_of(margins), RewardLoss(margin=margins, center=center or 0.0))
    for name in ("loss", *METRICS):
        assert float(seen[name]) == pytest.approx(float(expected[name]), rel=1e-5, abs=1e-6), name
    for (name, mine), their in zip(model.named_parameters(), other.parameters(), strict=True):
        assert float((mine.grad - their.grad).norm()) <= 1e-5 * float(their.grad.norm()), name


@pytest.mark.parametrize("spread", [0.3, 3.0, 30.0])
@pytest.mark.parametrize("margins", [False, True])
@pytest.mark.parametrize("center", [None, 0.01, 0.7])
def test_on_fixed_rewards_the_gradient_of_each_reward_equals_trls(
    margins: bool, center: float | None, spread: float, theirs: Callable[..., tuple[PreTrainedModel, dict[str, float]]]
) -> None:
    rewards_D = spread * torch.randn(2 * len(PAIRS), generator=torch.Generator().manual_seed(5))
    their_B1 = torch.cat([rewards_D[::2], rewards_D[1::2]])[:, None].requires_grad_()
    _, expected = theirs(margins, center, their_B1)
    batch, loss = batch_of(margins), RewardLoss(margin=margins, center=center or 0.0)
    values_BTC = torch.full((*batch.input_ids_BT.shape, 1), 7.0)
    values_BTC.view(-1)[batch.last_D] = rewards_D
    output, counts = loss(batch, Outputs(values_BTC=values_BTC.requires_grad_())), loss.counts(batch)
    value = sum(term.weight * term.total / counts[term.name] for term in output.terms)
    value.backward()
    seen = {"loss": value.detach(), **{metric.name: metric.total / metric.count for metric in output.metrics}}
    for name in ("loss", *METRICS):
        assert float(seen[name]) == pytest.approx(float(expected[name]), rel=1e-5, abs=1e-6), name
    gradient_D = values_BTC.grad.flatten()[batch.last_D]
    torch.testing.assert_close(gradient_D, their_B1.grad.view(2, -1).T.flatten(), rtol=1e-5, atol=1e-6)
    assert values_BTC.grad.count_nonzero() == gradient_D.count_nonzero() > 0


def test_the_gradient_is_that_of_finite_differences() -> None:
    source = torch.Generator().manual_seed(0)
    both = chosen, rejected = [torch.randn(4, generator=source).requires_grad_() for _ in range(2)]
    margin = torch.tensor([0.0, 0.5, 1.0, 3.0])
    bradley_terry(chosen, rejected, margin).backward()
    for answers in (chosen, rejected):
        for at in range(4):
            nudge = torch.zeros(4).index_fill(0, torch.tensor(at), 1e-2)
            parts = [[part + sign * nudge if part is answers else part for part in both] for sign in (1, -1)]
            moved = [bradley_terry(*part, margin) for part in parts]
            assert answers.grad[at].item() == pytest.approx((moved[0] - moved[1]).item() / 2e-2, rel=1e-2, abs=1e-4)


def test_no_pair_is_nothing_and_hangs_on_the_model() -> None:
    empty = replace(batch_of(False), last_D=torch.zeros(0, dtype=torch.int64), sign_D=None, rows=(), extra={})
    values = torch.zeros(*empty.input_ids_BT.shape, 1, requires_grad=True)
    loss = RewardLoss(margin=True, center=0.1)
    output = loss(empty, Outputs(values_BTC=values))
    assert dict(loss.counts(empty)) == {"reward": 0.0, "center": 0.0}
    assert output.metrics == ()
    sum(term.total for term in output.terms).backward()
    assert values.grad is not None
    assert not values.grad.any()


def test_half_precision_is_summed_in_float32() -> None:
    batch = batch_of(False)
    values = torch.randn(*batch.input_ids_BT.shape, 1).bfloat16().requires_grad_()
    (term,) = RewardLoss()(batch, Outputs(values_BTC=values)).terms
    assert term.total.dtype == torch.float32


@pytest.mark.parametrize("signs", [None, [1, 1, 1, -1, 1, -1], [-1, 1, 1, -1, 1, -1], [0, 0, 1, -1, 1, -1]])
def test_rows_that_are_no_pairs_are_refused(signs: list[int] | None) -> None:
    batch = batch_of(False)
    broken = replace(batch, sign_D=None if signs is None else torch.tensor(signs, dtype=torch.int8))
    with pytest.raises(DataError, match="reward needs pairs of a chosen and a rejected answer; row 0"):
        RewardLoss().counts(broken)
    with pytest.raises(DataError, match="have no signs"):
        RewardLoss().counts(tiny_batches(rows=2)[0])


def test_margins_that_are_missing_or_not_asked_for_are_refused() -> None:
    with pytest.raises(DataError, match=r"reward\.margin is true, and rows of row 0 .* no number in a column 'margin'"):
        RewardLoss(margin=True).counts(batch_of(False))
    with pytest.raises(DataError, match=r"keep a column 'margin', and reward\.margin is false"):
        RewardLoss().counts(batch_of(True))


def test_an_answer_that_ends_in_padding_is_refused() -> None:
    assert RewardLoss(pad_id=99).counts(batch_of(False)) == {"reward": 3.0}
    with pytest.raises(DataError, match="ends in the token 31, which also pads rows"):
        RewardLoss(pad_id=31).counts(batch_of(False))


def test_the_loss_is_built_without_a_tokenizer(tmp_path: Path) -> None:
    """As a plan that only measures a step does."""
    from pegbox import hooks
    from pegbox.plan import compose
    from pegbox.testing.tiny import plain_model

    ctx = compose({"model": {"name": "tiny"}, "plugins": ["reward"], "output": str(tmp_path)})
    assert ctx.call(hooks.build_loss, ctx, plain_model()).needs == {"values"}
