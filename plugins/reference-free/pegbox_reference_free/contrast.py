"""Losses of the difference of two rewards, the policy's own log-probabilities: CPO and SimPO.

    L = L_prefer + sft_weight L_NLL
    L_prefer = -sum over pairs of log sigmoid(beta (r(chosen) - r(rejected)) - gamma) / number of pairs
    L_NLL    = -sum over trained tokens of wanted answers of log p / their number

CPO (Xu et al. 2024, arXiv:2401.08417, eq. 4-6): r = log p, the sum over an answer's trained tokens, and gamma = 0. It
is DPO with a uniform reference, whose log-probabilities cancel: no second model is needed. Its variants compare the
same rewards in other ways: hinge (SLiC, arXiv:2305.10425), ipo (arXiv:2310.12036, eq. 17) on means per token.

SimPO (Meng et al. 2024, arXiv:2405.14734, eq. 6): r is the mean of log p per token, which is what generation ranks
answers by, so that length brings nothing; the wanted answer has to win by the margin gamma. L_NLL beside it makes it
CPO-SimPO.

AlphaPO (arXiv:2501.03884) bends the reward of either from log p to (1 - p^-alpha) / alpha.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from pegbox.types import LossOutput, Need, Outputs, Term
from torch.nn.functional import logsigmoid

from pegbox_reference_free.pairs import count_pairs, figures, lengths_by_document, split_pairs, sums_by_document

if TYPE_CHECKING:
    from pegbox.rows import Batch
    from torch import Tensor

    from pegbox_reference_free.config import CpoConfig, SimpoConfig

LIKELIHOOD = "nll_loss"


def shaped(logps: Tensor, alpha: float) -> Tensor:
    """(1 - p^-alpha) / alpha of log-probabilities (nats) of any shape; its limit for alpha = 0 is log p (AlphaPO)."""
    return logps if alpha == 0 else -torch.expm1(-alpha * logps) / alpha


def sigmoid_losses(margin_P: Tensor, beta: float, gamma: float = 0.0, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta margin - gamma) of P pairs (SimPO, eq. 6; CPO, eq. 5, without gamma).

    Args:
        margin_P: reward of the wanted answer minus that of the other (nats), or what `shaped` makes of them.
        beta: how sharply answers are told apart.
        gamma: by how much the wanted answer has to win.
        label_smoothing: share of the pairs that is taken the other way round.
    """
    scaled_P = beta * margin_P - gamma
    return -(1 - label_smoothing) * logsigmoid(scaled_P) - label_smoothing * logsigmoid(-scaled_P)


def hinge_losses(margin_P: Tensor, beta: float) -> Tensor:
    """max(0, 1 - beta margin) of each pair (SLiC)."""
    return (1 - beta * margin_P).relu()


def ipo_losses(margin_P: Tensor, tau: float) -> Tensor:
    """(margin - 1 / (2 tau))^2 of each pair; the margin is one of mean log-probabilities (IPO, eq. 17)."""
    return (margin_P - 1 / (2 * tau)).square()


@dataclass(frozen=True)
class ContrastLoss:
    """A term over pairs, and `nll_loss` over the tokens of wanted answers unless its weight is 0.

    Attributes:
        name: of the term over pairs.
        losses: the loss of each pair from the margins of their rewards, (P,) -> (P,).
        beta: scale of the rewards that are logged.
        alpha: shape of the rewards.
        sft_weight: of `nll_loss`.
        per_token: rewards are means over tokens, not sums.
    """

    name: str
    losses: Callable[[Tensor], Tensor]
    beta: float
    alpha: float
    sft_weight: float
    per_token: bool
    needs: frozenset[Need] = frozenset({"logps"})
    scope: Literal["token", "batch"] = "token"

    def counts(self, batch: Batch) -> Mapping[str, float]:
        """Pairs, and trained tokens of wanted answers.

        Raises:
            DataError: a row is no preference, or an answer has no trained token.
        """
        counts = {self.name: float(count_pairs(batch))}
        if self.sft_weight:
            counts[LIKELIHOOD] = float(split_pairs(lengths_by_document(batch))[0].sum())
        return counts

    def __call__(self, batch: Batch, outputs: Outputs) -> LossOutput:
        """The terms of one micro-batch; `outputs.logps_N` follows `batch.trained_N`."""
        assert outputs.logps_N is not None, "the loop provides every need"
        sums_D, lengths_D = sums_by_document(outputs.logps_N, batch), lengths_by_document(batch)
        logps_D = sums_D / lengths_D.clamp(min=1) if self.per_token else sums_D
        rewards_D = shaped(logps_D, self.alpha)
        losses_P = self.losses(torch.sub(*split_pairs(rewards_D)))
        terms = [Term(name=self.name, total=losses_P.sum(), count=float(len(losses_P)))]
        if self.sft_weight:
            likelihood, tokens = -split_pairs(sums_D)[0].sum(), split_pairs(lengths_D)[0].sum()
            terms.append(Term(name=LIKELIHOOD, total=likelihood, count=tokens, weight=self.sft_weight))
        return LossOutput(terms=tuple(terms), metrics=figures(self.beta * rewards_D, logps_D))


def cpo_loss(config: CpoConfig) -> ContrastLoss:
    """Contrastive preference optimization: sums of log-probabilities, but means for ipo."""
    losses: Mapping[str, Callable[[Tensor], Tensor]] = {
        "sigmoid": partial(sigmoid_losses, beta=config.beta, label_smoothing=config.label_smoothing),
        "hinge": partial(hinge_losses, beta=config.beta),
        "ipo": partial(ipo_losses, tau=config.beta),
    }
    return ContrastLoss(
        "cpo", losses[config.loss], config.beta, config.alpha, config.sft_weight, per_token=config.loss == "ipo"
    )


def simpo_loss(config: SimpoConfig) -> ContrastLoss:
    """Simple preference optimization: means of log-probabilities, and a margin to win by."""
    losses = partial(sigmoid_losses, beta=config.beta, gamma=config.gamma, label_smoothing=config.label_smoothing)
    return ContrastLoss("simpo", losses, config.beta, config.alpha, config.sft_weight, per_token=True)
