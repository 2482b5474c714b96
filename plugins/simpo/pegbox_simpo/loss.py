"""The loss of SimPO (Meng et al. 2024, arXiv:2405.14734, eq. 6):

    L = -sum over pairs of log sigmoid(beta (log p(chosen) - log p(rejected)) - gamma) / number of pairs
    log p: the mean log-probability of an answer's trained tokens

The reward is what generation ranks answers by, so that no reference model is needed and length brings nothing; the
wanted answer has to win by the margin gamma. Two additions of others, both off: the likelihood of wanted answers beside
it (CPO-SimPO), and AlphaPO (arXiv:2501.03884), which bends the reward from log p to (1 - p^-alpha) / alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from pegbox.types import LossOutput, Need, Outputs, Term
from torch.nn.functional import logsigmoid

from pegbox_simpo.config import SimpoConfig
from pegbox_simpo.pairs import (
    count_pairs,
    figures,
    lengths_by_document,
    split_pairs,
    sums_by_document,
)

if TYPE_CHECKING:
    from pegbox.rows import Batch
    from torch import Tensor

PREFERENCE, LIKELIHOOD = "simpo", "nll_loss"


def shaped(logps: Tensor, alpha: float) -> Tensor:
    """(1 - p^-alpha) / alpha of log-probabilities (nats) of any shape; its limit for alpha = 0 is log p (AlphaPO)."""
    return logps if alpha == 0 else -torch.expm1(-alpha * logps) / alpha


def simpo_losses(
    chosen_P: Tensor, rejected_P: Tensor, beta: float, gamma: float, label_smoothing: float = 0.0
) -> Tensor:
    """-log sigmoid(beta (chosen - rejected) - gamma) of P pairs (eq. 6); a share is taken the other way round.

    Args:
        chosen_P, rejected_P: mean log-probabilities per token (nats), or what `shaped` makes of them.
    """
    margin_P = beta * (chosen_P - rejected_P) - gamma
    return -(1 - label_smoothing) * logsigmoid(margin_P) - label_smoothing * logsigmoid(-margin_P)


class SimpoLoss:
    """The term `simpo` over pairs, and `nll_loss` over the tokens of wanted answers if it has a weight."""

    needs: frozenset[Need] = frozenset({"logps"})
    scope: Literal["token", "batch"] = "token"

    def __init__(self, config: SimpoConfig) -> None:
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
        logps_D = sums_D / lengths_D.clamp(min=1)
        rewards_D = shaped(logps_D, config.alpha)
        losses_P = simpo_losses(*split_pairs(rewards_D), config.beta, config.gamma, config.label_smoothing)
        terms = [Term(name=PREFERENCE, total=losses_P.sum(), count=float(len(losses_P)))]
        if config.sft_weight:
            likelihood, tokens = -split_pairs(sums_D)[0].sum(), split_pairs(lengths_D)[0].sum()
            terms.append(Term(name=LIKELIHOOD, total=likelihood, count=tokens, weight=config.sft_weight))
        return LossOutput(terms=tuple(terms), metrics=figures(config.beta * rewards_D, logps_D))
