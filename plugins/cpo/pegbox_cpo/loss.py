"""The loss of contrastive preference optimization (Xu et al. 2024, arXiv:2401.08417, eq. 4-6):

    L = L_prefer + sft_weight L_NLL
    L_prefer = -sum over pairs of log sigmoid(beta (log p(chosen) - log p(rejected))) / number of pairs
    L_NLL    = -sum over trained tokens of wanted answers of log p / their number

It is DPO with a uniform reference, whose log-probabilities cancel: no second model is needed. The variants compare the
same two rewards in other ways: hinge (SLiC, arXiv:2305.10425), ipo (arXiv:2310.12036, eq. 17). AlphaPO
(arXiv:2501.03884) bends the reward from log p to (1 - p^-alpha) / alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from pegbox.types import LossOutput, Need, Outputs, Term
from torch.nn.functional import logsigmoid

from pegbox_cpo.config import CpoConfig
from pegbox_cpo.pairs import (
    count_pairs,
    figures,
    lengths_by_document,
    split_pairs,
    sums_by_document,
)

if TYPE_CHECKING:
    from pegbox.rows import Batch
    from torch import Tensor

PREFERENCE, LIKELIHOOD = "cpo", "nll_loss"


def shaped(logps: Tensor, alpha: float) -> Tensor:
    """(1 - p^-alpha) / alpha of log-probabilities (nats) of any shape; its limit for alpha = 0 is log p (AlphaPO)."""
    return logps if alpha == 0 else -torch.expm1(-alpha * logps) / alpha


def sigmoid_losses(margin_P: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta margin) of each pair (eq. 5); a share of them is taken the other way round."""
    scaled_P = beta * margin_P
    return -(1 - label_smoothing) * logsigmoid(scaled_P) - label_smoothing * logsigmoid(-scaled_P)


def hinge_losses(margin_P: Tensor, beta: float) -> Tensor:
    """max(0, 1 - beta margin) of each pair (SLiC)."""
    return (1 - beta * margin_P).relu()


def ipo_losses(margin_P: Tensor, tau: float) -> Tensor:
    """(margin - 1 / (2 tau))^2 of each pair; the margin is one of mean log-probabilities (IPO, eq. 17)."""
    return (margin_P - 1 / (2 * tau)).square()


class CpoLoss:
    """Two terms: `cpo` over pairs, and `nll_loss` over the tokens of wanted answers unless its weight is 0."""

    needs: frozenset[Need] = frozenset({"logps"})
    scope: Literal["token", "batch"] = "token"

    def __init__(self, config: CpoConfig) -> None:
        self.config = config

    def counts(self, batch: Batch) -> Mapping[str, float]:
        """Pairs, and trained tokens of wanted answers.

        Raises:
            DataError: a row is no preference, or an answer has no trained token.
        """
        counts = {PREFERENCE: float(count_pairs(batch))}
        if self.config.sft_weight:
            counts[LIKELIHOOD] = float(split_pairs(lengths_by_document(batch))[0].sum())
        return counts

    def __call__(self, batch: Batch, outputs: Outputs) -> LossOutput:
        """The terms of one micro-batch; `outputs.logps_N` follows `batch.trained_N`."""
        assert outputs.logps_N is not None, "the loop provides every need"
        config = self.config
        sums_D, lengths_D = sums_by_document(outputs.logps_N, batch), lengths_by_document(batch)
        logps_D = sums_D / lengths_D.clamp(min=1) if config.loss == "ipo" else sums_D
        rewards_D = shaped(logps_D, config.alpha)
        losses_P = self._losses(rewards_D)
        terms = [Term(name=PREFERENCE, total=losses_P.sum(), count=float(len(losses_P)))]
        if config.sft_weight:
            likelihood, tokens = -split_pairs(sums_D)[0].sum(), split_pairs(lengths_D)[0].sum()
            terms.append(Term(name=LIKELIHOOD, total=likelihood, count=tokens, weight=config.sft_weight))
        return LossOutput(terms=tuple(terms), metrics=figures(config.beta * rewards_D, logps_D))

    def _losses(self, rewards_D: Tensor) -> Tensor:
        chosen_P, rejected_P = split_pairs(rewards_D)
        margin_P, config = chosen_P - rejected_P, self.config
        if config.loss == "sigmoid":
            return sigmoid_losses(margin_P, config.beta, config.label_smoothing)
        return hinge_losses(margin_P, config.beta) if config.loss == "hinge" else ipo_losses(margin_P, config.beta)
