"""What each token contributes to the loss, as pure functions of tensors.

    N  trained tokens    r  probability of the token now / when it was sampled    A  advantage of its completion

All take float32 tensors of length N: `ratio_N` is r, of the token or of its completion; `advantages_N` repeats A for
each token of the completion. They return length N, to be minimised.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch

from pegbox_grpo.documents import lengths, sums

if TYPE_CHECKING:
    from torch import Tensor

LOWEST_LOG_WEIGHT, HIGHEST_LOG_WEIGHT = math.log(1e-8), 20.0
"""Bounds of the logarithm of a completion's weight in `vespo`; those of each token's ratio are +-20."""

KlEstimator = Literal["k1", "k2", "k3"]


def clipped_surrogate(
    ratio_N: Tensor, advantages_N: Tensor, low: float, high: float, delta: float | None = None
) -> Tensor:
    """The clipped objective of PPO, as GRPO uses it (Shao et al. 2024, arXiv:2402.03300, eq. 3).

        -min(r A, clip(r, 1 - low, 1 + high) A)

    Args:
        low, high: how far the ratio may leave 1 (two values: DAPO, arXiv:2503.14476, eq. 10).
        delta: r is at most `delta` where A < 0 too (two-sided: INTELLECT-2, arXiv:2505.07291).
    """
    clipped_N = ratio_N.clamp(1 - low, 1 + high)
    bounded_N = ratio_N if delta is None else ratio_N.clamp(max=delta)
    return -torch.minimum(bounded_N * advantages_N, clipped_N * advantages_N)


def clipped_weight(ratio_N: Tensor, advantages_N: Tensor, logps_N: Tensor, largest: float) -> Tensor:
    """CISPO (MiniMax-M1, arXiv:2506.13585, eq. 4): `-sg(min(r, largest)) A log p`; every token keeps a gradient."""
    return -ratio_N.clamp(max=largest).detach() * advantages_N * logps_N


def soft_gate(ratio_N: Tensor, advantages_N: Tensor, positive: float, negative: float) -> Tensor:
    """SAPO (arXiv:2511.20347): `-4 / tau sigmoid(tau (r - 1)) A`, tau by the sign of A."""
    tau_N = torch.where(advantages_N > 0, positive, negative)
    return -torch.sigmoid(tau_N * (ratio_N - 1)) * 4 / tau_N * advantages_N


def gamma_weight(
    log_ratio_D: Tensor, advantages_D: Tensor, positive: tuple[float, float], negative: tuple[float, float]
) -> Tensor:
    """The weight of a completion in VESPO (arXiv:2602.10693), without gradient, of length D.

        phi(w) = w^k exp(lambda (1 - w))        w = exp(log_ratio), k and lambda by the sign of A

    Args:
        log_ratio_D: sum over tokens of the log-ratio, each within +-20; the sampler's correction added.
        positive, negative: (k, lambda) where A >= 0, and where A < 0.
    """
    log_w_D = log_ratio_D.detach().clamp(LOWEST_LOG_WEIGHT, HIGHEST_LOG_WEIGHT)
    k_D = torch.where(advantages_D >= 0, positive[0], negative[0])
    decay_D = torch.where(advantages_D >= 0, positive[1], negative[1])
    return (decay_D + k_D * log_w_D - decay_D * log_w_D.exp()).exp().nan_to_num(nan=0.0, posinf=0.0)


def divergence(logps_N: Tensor, reference_N: Tensor, estimator: KlEstimator) -> Tensor:
    """Estimates of KL(policy || reference) from tokens of the policy (Schulman 2020, "Approximating KL Divergence").

    d = log p - log p_ref        k1 = d        k2 = d^2 / 2        k3 = exp(-d) + d - 1
    """
    difference_N = logps_N - reference_N
    if estimator == "k1":
        return difference_N
    if estimator == "k2":
        return difference_N.square() / 2
    return (-difference_N).exp() + difference_N - 1


def log_ratios(
    logps_N: Tensor, old_N: Tensor, document_N: Tensor, documents: int, level: Literal["token", "sequence", "sum"]
) -> Tensor:
    """log r of each token: its own, the mean over its completion (GSPO, arXiv:2507.18071, eq. 7), or the sum (RLOO)."""
    log_ratio_N = logps_N - old_N
    if level == "token":
        return log_ratio_N
    summed_D = sums(log_ratio_N, document_N, documents)
    if level == "sequence":
        summed_D = summed_D / lengths(log_ratio_N, document_N, documents)
    return summed_D[document_N]
