"""Losses over a whole batch: alignment by optimal transport (Melnyk et al. 2024, arXiv:2406.05882).

Not each pair but the distribution of rewards is to be better: the sorted log-ratios of one side are to lie above those
of the other at every quantile (stochastic dominance of first order; in one dimension sorting is the optimal transport).
The k-th smallest depends on all pairs of the batch, so these losses have the scope `batch`.

Arguments are sums of log-probabilities over the tokens of an answer, in nats; (P,) -> (P,), in float32.
"""

from __future__ import annotations

from torch import Tensor

from pegbox_dpo.differences import sigmoid


def aot(policy_P: Tensor, reference_P: Tensor, beta: float, smoothing: float = 0.0) -> Tensor:
    """For pairs: the policy's differences of chosen and rejected are to dominate the reference's.

    Args:
        policy_P: log-probability of the chosen minus that of the rejected answer under the policy.
        reference_P: the same under the reference.
        beta: scale of the sorted differences.
        smoothing: probability of a flipped label.
    """
    return sigmoid(policy_P.sort().values - reference_P.sort().values, beta, smoothing)


def aot_unpaired(chosen_P: Tensor, rejected_P: Tensor, beta: float, smoothing: float = 0.0) -> Tensor:
    """For answers that need not be pairs: log-ratios of chosen answers are to dominate those of rejected ones."""
    return sigmoid(chosen_P.sort().values - rejected_P.sort().values, beta, smoothing)
