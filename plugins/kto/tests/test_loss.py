"""The loss is the same however a step is split or padded; what it refuses; what its functions are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kto_rows import Answer, assert_same, padded, random_answers, value_and_gradient, with_extras
from pegbox.errors import DataError, PluginError
from pegbox.rows import UNTRAINED, Batch, Example, Extra
from pegbox.testing.batches import pad_batch, split_batch
from pegbox.testing.tiny import PAD, collate, tiny_model
from pegbox.types import Outputs
from pegbox_kto.config import KtoConfig
from pegbox_kto.loss import KtoLoss
from pegbox_kto.losses import apo_zero_losses, kl_estimate, kto_losses

SETTINGS: list[dict[str, Any]] = [{"desirable_weight": 1.5}, {"loss": "apo_zero_unpaired"}]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


def filler() -> Batch:
    """The micro-batch of a rank that has no rows."""
    none = torch.zeros(0, dtype=torch.int64)
    ids_BT, targets_BT = torch.full((1, 2), PAD), torch.full((1, 2), UNTRAINED)
    return with_extras(Batch(input_ids_BT=ids_BT, targets_BT=targets_BT, trained_N=none, document_N=none, last_D=none))


@pytest.mark.parametrize("config", SETTINGS)
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 1000), rows=st.integers(1, 3), fillers=st.integers(0, 2))
def test_any_split_and_padding_gives_the_same(
    model: Any, config: dict[str, Any], seed: int, rows: int, fillers: int
) -> None:
    loss, answers = KtoLoss(KtoConfig(**config)), random_answers(6, seed)
    wanted = sum(answer.wanted for answer in answers)
    whole = with_extras(padded(answers), answers=(wanted, 6 - wanted))
    step = [pad_batch(part, 2) for part in split_batch(whole, rows)] + [filler()] * fillers
    with_answers = [replace(b, extra={**b.extra, "kto_answers": whole.extra["kto_answers"]}) for b in step]
    assert_same(value_and_gradient(loss, with_answers, model), value_and_gradient(loss, [whole], model))


def test_losses_equal_the_definitions() -> None:
    ratios_D, signs_D = torch.tensor([2.0, -1.0, 0.5, 3.0]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    kl, beta = torch.tensor(0.4), 0.3
    expected = torch.cat([1 - (beta * (ratios_D[:2] - kl)).sigmoid(), 1 - (beta * (kl - ratios_D[2:])).sigmoid()])
    torch.testing.assert_close(kto_losses(ratios_D, signs_D, kl, beta), expected)
    expected = torch.cat([1 - (beta * ratios_D[:2]).sigmoid(), (beta * ratios_D[2:]).sigmoid()])
    torch.testing.assert_close(apo_zero_losses(ratios_D, signs_D, beta), expected)
    assert kl_estimate(torch.tensor(6.0), 4).item() == 1.5
    assert kl_estimate(torch.tensor(-6.0), 4).item() == 0.0


def test_figures_are_means_of_each_kind_and_their_difference() -> None:
    batch, logps = padded(random_answers(5)), torch.linspace(-6, -4, padded(random_answers(5)).trained_tokens)
    signs = batch.sign_D
    assert signs is not None
    wanted = int((signs > 0).sum())
    batch = with_extras(batch, answers=(wanted, 5 - wanted))
    reference_N = batch.extra["reference_logps"].value
    rewards = [0.1 * (logps - reference_N)[batch.document_N == at].sum().item() for at in range(5)]
    means = {sign: sum(r for r, s in zip(rewards, signs, strict=True) if s == sign) for sign in (1, -1)}
    figures = {t.name: (t.total / t.count).item() for t in KtoLoss(KtoConfig())(batch, Outputs(logps_N=logps)).metrics}
    assert figures["rewards/chosen"] == pytest.approx(means[1] / wanted, rel=1e-5)
    assert figures["rewards/rejected"] == pytest.approx(means[-1] / (5 - wanted), rel=1e-5)
    assert figures["rewards/margins"] == pytest.approx(means[1] / wanted - means[-1] / (5 - wanted), rel=1e-5)
    assert figures["kl"] == pytest.approx(0.3)


def test_a_step_with_one_kind_of_answers_has_no_margin() -> None:
    batch = with_extras(padded([answer for answer in random_answers(6) if answer.wanted]), answers=(3, 0))
    output = KtoLoss(KtoConfig())(batch, Outputs(logps_N=torch.zeros(batch.trained_tokens)))
    (margin,) = (term for term in output.metrics if term.name == "rewards/margins")
    assert (float(margin.total), float(margin.count)) == (0.0, 0.0)


@pytest.mark.parametrize("config", SETTINGS)
def test_no_value_of_the_device_is_asked_for(config: dict[str, Any]) -> None:
    """Tensors without values: whatever asked for one would raise."""
    for batch in (with_extras(padded(random_answers(3))), filler()):
        logps_N = torch.zeros(batch.trained_tokens, device="meta", requires_grad=True)
        output = KtoLoss(KtoConfig(**config))(batch.to(torch.device("meta")), Outputs(logps_N=logps_N))
        assert output.terms[0].total.device.type == "meta"
        assert output.terms[0].total.requires_grad


@pytest.mark.parametrize("config", SETTINGS)
def test_a_micro_batch_without_rows_adds_zero_and_hangs_on_the_graph(config: dict[str, Any]) -> None:
    logps_N, loss = torch.zeros(0, requires_grad=True), KtoLoss(KtoConfig(**config))
    (term,) = loss(filler(), Outputs(logps_N=logps_N)).terms
    term.total.backward()
    assert (term.total.item(), term.count, loss.counts(filler())) == (0.0, 0.0, {"kto": 0.0})
    assert logps_N.grad is not None


def test_rows_that_do_not_say_what_is_wanted_are_refused() -> None:
    loss = KtoLoss(KtoConfig())
    unsigned = collate([Example(input_ids=[1, 2], labels=[-100, 2])], (7,))
    with pytest.raises(DataError, match="rows 7 of the data do not say which answers are wanted"):
        loss.counts(unsigned)
    with pytest.raises(DataError, match="do not say which answers are wanted"):
        loss(with_extras(unsigned), Outputs(logps_N=torch.zeros(1)))
    neither = collate([Example(input_ids=[1, 2], labels=[-100, 2], signs=(0,))], (7,))
    with pytest.raises(DataError, match=r"rows 7 of the data have documents with the signs \[0\]"):
        loss.counts(neither)


def test_an_answer_without_a_trained_token_is_refused() -> None:
    with pytest.raises(DataError, match="an answer of row 1 of the data has no trained token"):
        KtoLoss(KtoConfig()).counts(padded([*random_answers(1), Answer([1, 2], [], True)]))


@pytest.mark.parametrize("name", ["reference_logps", "kto_kl"])
def test_a_batch_without_what_the_loss_needs_is_refused(name: str) -> None:
    batch = with_extras(padded(random_answers(2)))
    extra: dict[str, Extra] = {key: value for key, value in batch.extra.items() if key != name}
    loss = KtoLoss(KtoConfig())
    assert name in loss.extras
    with pytest.raises(PluginError, match=f"without {name}"):
        loss(replace(batch, extra=extra), Outputs(logps_N=torch.zeros(batch.trained_tokens)))


def test_weights_of_which_none_weighs_are_refused() -> None:
    with pytest.raises(ValueError, match="both 0: nothing is trained"):
        KtoConfig(desirable_weight=0.0, undesirable_weight=0.0)
