"""What each loss is, by its definition."""

from __future__ import annotations

import math

import pytest
import torch
from pair_rows import Pair, loss_of, padded
from pegbox.types import Outputs
from pegbox_reference_free.config import CpoConfig, SimpoConfig
from pegbox_reference_free.contrast import shaped
from pegbox_reference_free.odds import log_odds


def test_log_odds_equal_the_plain_formula_and_stay_finite() -> None:
    logps = torch.cat([-torch.logspace(-5, 2, 200), torch.tensor([-1e-7])]).requires_grad_()
    exact = logps.detach().double().requires_grad_()
    expected = exact - torch.log1p(-exact.exp())
    made = log_odds(logps)
    torch.testing.assert_close(made[:-1].double(), expected[:-1], rtol=1e-6, atol=1e-6)
    made.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(logps.grad[:-1].double(), exact.grad[:-1], rtol=1e-5, atol=1e-6)
    certain = torch.zeros(2, requires_grad=True)
    log_odds(certain).sum().backward()
    assert bool(log_odds(certain).isfinite().all())
    assert bool(certain.grad.isfinite().all())


def test_a_token_weighs_the_same_whatever_shares_its_micro_batch() -> None:
    """A mean of the means of micro-batches would be 2 here; the mean over tokens is 1.2."""
    short, long = Pair([1], [2], [3]), Pair([1], [2] * 9, [3])
    loss = loss_of("orpo")
    step = [(padded([short]), torch.tensor([-3.0, -1.0])), (padded([long]), torch.tensor([-1.0] * 9 + [-1.0]))]
    terms = [loss(batch, Outputs(logps_N=logps)).terms[0] for batch, logps in step]
    counts = [loss.counts(batch)["nll_loss"] for batch, _ in step]
    assert counts == [1.0, 9.0]
    assert sum(term.total.item() for term in terms) / sum(counts) == pytest.approx(1.2)


@pytest.mark.parametrize("loss", ["hinge", "ipo"])
def test_smoothing_that_would_be_ignored_is_refused(loss: str) -> None:
    with pytest.raises(ValueError, match=f"label_smoothing is 0.1, but loss is {loss}"):
        CpoConfig(loss=loss, label_smoothing=0.1)


def test_the_bent_reward_has_log_p_as_its_limit() -> None:
    logps = -torch.logspace(-3, 1, 50)
    torch.testing.assert_close(shaped(logps, 1e-6), logps, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shaped(logps, 0.25), (1 - logps.exp() ** -0.25) / 0.25, rtol=1e-5, atol=1e-5)


def test_length_brings_nothing_to_simpo() -> None:
    """An answer that repeats itself with the same probabilities has the same reward."""
    short, long = Pair([1], [2, 3], [4]), Pair([1], [2, 3] * 5, [4] * 7)
    losses = [
        loss_of("simpo")(padded([pair]), Outputs(logps_N=torch.tensor(logps))).terms[0].total
        for pair, logps in ((short, [-1.0, -2.0, -3.0]), (long, [-1.0, -2.0] * 5 + [-3.0] * 7))
    ]
    torch.testing.assert_close(losses[0], losses[1])
    expected = math.log1p(math.exp(-(2.0 * (-1.5 + 3.0) - 1.0)))
    assert losses[0].item() == pytest.approx(expected, rel=1e-6)


def test_defaults_of_simpo_are_those_of_the_paper() -> None:
    config = SimpoConfig()
    assert (config.beta, config.gamma, config.sft_weight, config.label_smoothing, config.alpha) == (2.0, 1.0, 0, 0, 0)
