"""Direct preference optimisation as terms with counts.

Each loss of the config is one term: its total is a sum over pairs and its count the number of pairs, so that no split
of a step changes it; of `sft` both are over the trained tokens of chosen answers. The functions of the losses are in
`differences.py`, `rewards.py` and `transport.py`; what they look at comes from `pairs.py` and `divergences.py`.

    N  trained tokens    P  pairs
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from pegbox.rows import Batch
from pegbox.types import LossOutput, Need, Outputs, Term
from torch import Tensor

from pegbox_dpo import differences, rewards, transport
from pegbox_dpo.config import REFERENCE, SORTED
from pegbox_dpo.divergences import scores
from pegbox_dpo.pairs import (
    Answers,
    answers,
    on_policy_weights,
    require_pairs,
    require_signs,
    token_counts,
    verbosity_weights,
)

if TYPE_CHECKING:
    from pegbox_dpo.config import DpoConfig


@dataclass(frozen=True)
class Compared:
    """What the losses of pairs are functions of.

    Attributes:
        policy, reference: log-probabilities of the answers, sums over their tokens in nats.
        ratios: policy minus reference.
        scores: the divergence's scores of the ratios.
        means: the scores divided by the number of trained tokens.
    """

    policy: Answers
    reference: Answers
    ratios: Answers
    scores: Answers
    means: Answers


def _of_margin(name: str) -> Callable[[Compared, DpoConfig], Tensor]:
    of = {
        "sigmoid": lambda m, c: differences.sigmoid(m, c.beta, c.label_smoothing),
        "hinge": lambda m, c: differences.hinge(m, c.beta),
        "exo_pair": lambda m, c: differences.exo_pair(m, c.beta, c.label_smoothing),
        "robust": lambda m, c: differences.robust(m, c.beta, c.label_smoothing),
        "discopop": lambda m, c: differences.discopop(m, c.beta, c.discopop_tau),
    }[name]
    return lambda given, config: of(given.scores.margin, config)


def _of_rewards(of: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[[Compared, DpoConfig], Tensor]:
    return lambda given, config: of(given.ratios.chosen_P, given.ratios.rejected_P, config.beta)


PAIR_LOSSES: Mapping[str, Callable[[Compared, DpoConfig], Tensor]] = {
    **{name: _of_margin(name) for name in ("sigmoid", "hinge", "exo_pair", "robust", "discopop")},
    "ipo": lambda given, config: differences.ipo(given.means.margin, config.beta),
    "sigmoid_norm": lambda given, config: differences.sigmoid(given.means.margin, config.beta),
    "nca_pair": _of_rewards(rewards.nca_pair),
    "bco_pair": _of_rewards(rewards.bco_pair),
    "sppo_hard": _of_rewards(rewards.sppo_hard),
    "apo_zero": _of_rewards(rewards.apo_zero),
    "apo_down": _of_rewards(rewards.apo_down),
    "aot": lambda given, config: transport.aot(
        given.policy.margin, given.reference.margin, config.beta, config.label_smoothing
    ),
    "aot_unpaired": lambda given, config: transport.aot_unpaired(
        given.ratios.chosen_P, given.ratios.rejected_P, config.beta, config.label_smoothing
    ),
}
"""Every loss but `sft`: the loss of each pair, (P,)."""


class DpoLoss:
    """One term for each loss of the config, and the rewards of the answers beside them."""

    def __init__(self, config: DpoConfig) -> None:
        self._config = config
        whole: set[Need] = {"logits"} if config.use_weighting or config.token_metrics else set()
        entropy: set[Need] = {"entropy"} if config.token_metrics else set()
        self.needs: frozenset[Need] = frozenset({"logps", *whole, *entropy})
        self.scope: Literal["token", "batch"] = "batch" if config.weights.keys() & SORTED else "token"
        self.extras = frozenset({REFERENCE}) if config.needs_reference else frozenset()

    def counts(self, batch: Batch) -> Mapping[str, float]:
        """Pairs, and for `sft` the trained tokens of chosen answers.

        Raises:
            DataError: a row is not a pair of a chosen and a rejected answer.
        """
        pairs = float(require_pairs(batch))
        tokens = float(_chosen(batch).sum()) if "sft" in self._config.weights else 0.0
        return {name: tokens if name == "sft" else pairs for name in self._config.weights}

    def __call__(self, batch: Batch, outputs: Outputs) -> LossOutput:
        """The terms of one micro-batch; `outputs.logps_N` follows `batch.trained_N`."""
        assert outputs.logps_N is not None, "the loop provides every need"
        require_signs(batch)
        config, logps_N = self._config, outputs.logps_N
        weights_N = None if config.ld_alpha is None else verbosity_weights(batch, config.ld_alpha)
        policy = _answers(logps_N, weights_N, batch)
        terms, metrics = [], _log_probabilities(policy)
        given = None
        if config.needs_reference:
            reference = _answers(batch.extra[REFERENCE].value, weights_N, batch)
            given = self._compare(policy, reference, batch)
            metrics = _rewards(given.ratios, config.beta) + metrics
        factor_P = None
        if config.use_weighting:
            assert outputs.logits_NV is not None, "the loop provides every need"
            factor_P = on_policy_weights(logps_N, outputs.logits_NV, batch)
        for name, weight in config.weights.items():
            if name == "sft":
                chosen_N = _chosen(batch)
                total, count = -logps_N.float().where(chosen_N, 0.0).sum(), chosen_N.sum()
                terms.append(Term(name=name, total=total, count=count, weight=weight))
                continue
            assert given is not None, "every loss of pairs needs the reference"
            losses_P = PAIR_LOSSES[name](given, config)
            losses_P = losses_P if factor_P is None else losses_P * factor_P
            terms.append(Term(name=name, total=losses_P.sum(), count=float(len(losses_P)), weight=weight))
        if config.token_metrics:
            metrics += _tokens(batch, outputs)
        return LossOutput(terms=tuple(terms), metrics=tuple(metrics))

    def _compare(self, policy: Answers, reference: Answers, batch: Batch) -> Compared:
        ratios, tokens = policy - reference, token_counts(batch)
        scored = scores(ratios, self._config.f_divergence, self._config.f_alpha)
        means = Answers(scored.chosen_P / tokens.chosen_P, scored.rejected_P / tokens.rejected_P)
        return Compared(policy, reference, ratios, scored, means)


def _answers(logps_N: Tensor, weights_N: Tensor | None, batch: Batch) -> Answers:
    return answers(logps_N if weights_N is None else logps_N.float() * weights_N, batch)


def _chosen(batch: Batch) -> Tensor:
    """Which trained tokens are of chosen answers: (N,)."""
    assert batch.document_N is not None, "counts of the batch were asked for first"
    return batch.document_N % 2 == 0


def _log_probabilities(policy: Answers) -> list[Term]:
    values = {"logps/chosen": policy.chosen_P, "logps/rejected": policy.rejected_P}
    return [_mean(name, values_P) for name, values_P in values.items()]


def _rewards(ratios: Answers, beta: float) -> list[Term]:
    """The implicit rewards, beta times the log-ratios, of both answers of each pair, and how they compare."""
    chosen_P, rejected_P = beta * ratios.chosen_P.detach(), beta * ratios.rejected_P.detach()
    values = {
        "rewards/chosen": chosen_P,
        "rewards/rejected": rejected_P,
        "rewards/margins": chosen_P - rejected_P,
        "rewards/accuracies": (chosen_P > rejected_P).float(),
    }
    return [_mean(name, values_P) for name, values_P in values.items()]


def _mean(name: str, values_P: Tensor) -> Term:
    return Term(name=name, total=values_P.detach().sum(), count=float(len(values_P)))


@torch.no_grad()
def _tokens(batch: Batch, outputs: Outputs) -> list[Term]:
    """Entropy; how often the target of a chosen answer is the likeliest token; the mean logit of each side."""
    assert outputs.logits_NV is not None, "the loop provides every need"
    assert outputs.entropy_N is not None, "the loop provides every need"
    chosen_N, targets_N = _chosen(batch), batch.targets_BT.flatten()[batch.trained_N]
    right_N = (outputs.logits_NV.argmax(-1) == targets_N) & chosen_N
    logits_N = outputs.logits_NV.float().mean(-1)
    entropy = Term(name="entropy", total=outputs.entropy_N.float().sum(), count=float(batch.trained_tokens))
    return [
        entropy,
        Term(name="mean_token_accuracy", total=right_N.sum().float(), count=chosen_N.sum()),
        Term(name="logits/chosen", total=logits_N.where(chosen_N, 0.0).sum(), count=chosen_N.sum()),
        Term(name="logits/rejected", total=logits_N.where(~chosen_N, 0.0).sum(), count=(~chosen_N).sum()),
    ]
