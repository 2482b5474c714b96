"""On fixed logits, loss, figures and the gradient of each logit equal TRL's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pair_rows import loss_of, padded, random_pairs
from torch.nn.functional import cross_entropy
from trl_preferences import Theirs, assert_equal, logits_of, ours

SIMPO = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0}
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("orpo", {}, {}),
    ("orpo", {"alpha": 0.7}, {"beta": 0.7}),
    ("cpo", {}, {}),
    ("cpo", {"beta": 0.3, "label_smoothing": 0.2}, {"beta": 0.3, "label_smoothing": 0.2}),
    ("cpo", {"loss": "hinge", "sft_weight": 0.5}, {"loss_type": "hinge", "cpo_alpha": 0.5}),
    ("cpo", {"loss": "ipo", "sft_weight": 0.0}, {"loss_type": "ipo", "cpo_alpha": 0.0}),
    ("cpo", {"loss": "ipo", "alpha": 0.25}, {"loss_type": "ipo", "alpha": 0.25}),
    ("cpo", {"alpha": -0.01}, {"alpha": -0.01}),
    ("simpo", {}, SIMPO),
    ("simpo", {"beta": 2.5, "gamma": 0.3}, {**SIMPO, "beta": 2.5, "simpo_gamma": 0.3}),
    ("simpo", {"label_smoothing": 0.2}, {**SIMPO, "label_smoothing": 0.2}),
    ("simpo", {"sft_weight": 0.7}, {**SIMPO, "cpo_alpha": 0.7}),
    ("simpo", {"alpha": 0.25}, {**SIMPO, "alpha": 0.25}),
    (
        "simpo",
        {"alpha": 0.25, "beta": 2.5, "gamma": 0.5},
        {"loss_type": "alphapo", "alpha": 0.25, "beta": 2.5, "simpo_gamma": 0.5},
    ),
]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Theirs]:
    folder = tmp_path_factory.mktemp("trl")
    made = {name: Theirs(name, folder) for name in ("orpo", "cpo")}
    return lambda plugin: made["orpo" if plugin == "orpo" else "cpo"]


@pytest.mark.parametrize("spread", [0.5, 2.0])
@pytest.mark.parametrize(("plugin", "settings", "of_trl"), CASES)
def test_loss_figures_and_the_gradient_of_each_logit_equal_trls(
    plugin: str, settings: dict[str, Any], of_trl: dict[str, Any], spread: float, theirs: Callable[[str], Theirs]
) -> None:
    """With prompts of one token: the likelihood of TRL's ORPO is of the prompt too, whose first token has none."""
    pairs = random_pairs(5, prompt=1)
    logits_BTV = logits_of(pairs, spread)
    expected = theirs(plugin)(pairs, logits_BTV, **of_trl)
    made = ours(loss_of(plugin, settings), pairs, logits_BTV)
    assert_equal(made, expected)
    assert made.gradient_BTV.abs().max() > 1e-3
    unasked = {"logits/chosen", "logits/rejected"} | ({"nll_loss"} - made.figures.keys())
    assert expected.figures.keys() - made.figures.keys() == unasked
    assert made.figures.keys() - expected.figures.keys() == {"odds_ratio" if plugin == "orpo" else plugin}


def test_figures_of_orpo_with_long_prompts_equal_trls(theirs: Callable[[str], Theirs]) -> None:
    """The likelihood aside, which is that of the answer given the prompt, as in the paper."""
    pairs = random_pairs(5, seed=1)
    logits_BTV = logits_of(pairs, 1.0)
    made, expected = ours(loss_of("orpo"), pairs, logits_BTV), theirs("orpo")(pairs, logits_BTV)
    for name in made.figures.keys() & expected.figures.keys() - {"nll_loss"}:
        torch.testing.assert_close(made.figures[name], expected.figures[name], rtol=1e-5, atol=1e-6, msg=name)
    likelihood = cross_entropy(logits_BTV[::2].flatten(0, 1), padded(pairs).targets_BT[::2].flatten())
    assert made.figures["nll_loss"] == pytest.approx(likelihood.item(), rel=1e-5)
    assert made.figures["nll_loss"] != pytest.approx(expected.figures["nll_loss"], rel=1e-3)


def test_the_bent_reward_of_an_unlikely_answer_is_that_of_float64(theirs: Callable[[str], Theirs]) -> None:
    """Of more than 104 nats, whose probability is 0 in float32: TRL takes a power of that, we of its logarithm."""
    pairs = random_pairs(5, prompt=1)
    logits_BTV = logits_of(pairs, 40.0)
    assert theirs("cpo")(pairs, logits_BTV, alpha=-0.01).gradient_BTV.isnan().any()
    made = ours(loss_of("cpo", {"alpha": -0.01}), pairs, logits_BTV)

    leaf_BTV, targets_BT = logits_BTV.double().requires_grad_(), padded(pairs).targets_BT
    logps_BT = -cross_entropy(leaf_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none").view_as(targets_BT)
    rewards_B = (1 - (0.01 * logps_BT.sum(1)).exp()) / -0.01
    exact = -torch.nn.functional.logsigmoid(0.1 * (rewards_B[::2] - rewards_B[1::2])).mean()
    exact = exact - logps_BT[::2].sum() / (targets_BT[::2] >= 0).sum()
    exact.backward()
    assert made.loss == pytest.approx(exact.item(), rel=1e-5)
    torch.testing.assert_close(made.gradient_BTV.double(), leaf_BTV.grad, rtol=1e-5, atol=1e-6)


def test_defaults_of_orpo_and_cpo_are_those_of_trl() -> None:
    from pegbox_reference_free.config import CpoConfig, OrpoConfig
    from trl.experimental.cpo import CPOConfig
    from trl.experimental.orpo import ORPOConfig

    theirs, ours = CPOConfig.__dataclass_fields__, CpoConfig()
    assert ours.loss == theirs["loss_type"].default
    assert (ours.label_smoothing, ours.alpha) == (0.0, 0.0)
    assert (ours.beta, ours.sft_weight) == (theirs["beta"].default, theirs["cpo_alpha"].default)
    assert OrpoConfig().alpha == ORPOConfig.__dataclass_fields__["beta"].default
