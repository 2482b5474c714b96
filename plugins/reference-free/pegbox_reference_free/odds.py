"""The loss of ORPO (Hong et al. 2024, arXiv:2403.07691, eq. 3-7):

    L = L_SFT + alpha L_OR
    L_SFT = -sum over trained tokens of wanted answers of log p / their number
    L_OR  = -sum over pairs of log sigmoid(log odds(chosen) - log odds(rejected)) / number of pairs
    odds  = p / (1 - p),   log p: the mean log-probability of an answer's trained tokens

Each term keeps its own count, so that a step is the same however it is split: a mean over micro-batches of their mean
token losses would weigh a token by how few others share its micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from pegbox.types import LossOutput, Need, Outputs, Term

from pegbox_reference_free.config import OrpoConfig
from pegbox_reference_free.pairs import (
    count_pairs,
    figures,
    lengths_by_document,
    split_pairs,
    sums_by_document,
)

if TYPE_CHECKING:
    from pegbox.rows import Batch
    from torch import Tensor

LIKELIHOOD, ODDS = "nll_loss", "odds_ratio"


def log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 - p)) of log-probabilities (nats) of any shape.

    A probability that rounds to 1 in float32 has infinite odds; here it is taken to be the largest one below.
    """
    logps = logps.clamp(max=-torch.finfo(torch.float32).eps)
    return logps - (-torch.expm1(logps)).log()


def log_odds_ratio(chosen_logps_P: Tensor, rejected_logps_P: Tensor) -> Tensor:
    """log(odds(chosen) / odds(rejected)) of mean log-probabilities per token (nats) of P pairs; eq. 4."""
    return log_odds(chosen_logps_P) - log_odds(rejected_logps_P)


def odds_ratio_losses(ratio_P: Tensor) -> Tensor:
    """-log sigmoid of the log odds ratio of each pair (nats); eq. 7."""
    return -torch.nn.functional.logsigmoid(ratio_P)


class OrpoLoss:
    """Two terms: `nll_loss` over the tokens of wanted answers, `odds_ratio` over pairs."""

    needs: frozenset[Need] = frozenset({"logps"})
    scope: Literal["token", "batch"] = "token"

    def __init__(self, config: OrpoConfig) -> None:
        self.config = config

    def counts(self, batch: Batch) -> Mapping[str, float]:
        """Trained tokens of wanted answers, and pairs.

        Raises:
            DataError: a row is no preference, or an answer has no trained token.
        """
        pairs = count_pairs(batch)
        return {LIKELIHOOD: float(split_pairs(lengths_by_document(batch))[0].sum()), ODDS: float(pairs)}

    def __call__(self, batch: Batch, outputs: Outputs) -> LossOutput:
        """The terms of one micro-batch; `outputs.logps_N` follows `batch.trained_N`."""
        assert outputs.logps_N is not None, "the loop provides every need"
        sums_D, lengths_D = sums_by_document(outputs.logps_N, batch), lengths_by_document(batch)
        means_D = sums_D / lengths_D.clamp(min=1)
        ratio_P = log_odds_ratio(*split_pairs(means_D))
        losses_P = odds_ratio_losses(ratio_P)
        pairs = float(len(losses_P))
        likelihood = Term(name=LIKELIHOOD, total=-split_pairs(sums_D)[0].sum(), count=split_pairs(lengths_D)[0].sum())
        return LossOutput(
            terms=(likelihood, Term(name=ODDS, total=losses_P.sum(), count=pairs, weight=self.config.alpha)),
            metrics=(
                *figures(self.config.alpha * means_D, means_D),
                Term(name="log_odds_ratio", total=-losses_P.detach().sum(), count=pairs),
                Term(name="log_odds_chosen", total=ratio_P.detach().sum(), count=pairs),
            ),
        )
