"""Losses of a pair that look at one number: how much higher the chosen answer scores than the rejected one.

`margin_P` is the score of the chosen answer minus that of the rejected one: for plain DPO the difference of the
log-ratios log policy(y) - log reference(y) of the two answers, sums over their tokens, in nats. Every function returns
the loss of each pair, (P,) -> (P,), in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

LARGEST_EXPONENT = 80.0
"""exp of more than 88 is infinite in float32, and infinity times a gradient of zero is no number."""


def sigmoid(margin_P: Tensor, beta: float, smoothing: float = 0.0) -> Tensor:
    """DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7): -log sigmoid(beta m).

    With smoothing conservative DPO (Mitchell 2023): labels are flipped with that probability,
    -(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m).
    """
    rewards_P = beta * margin_P
    return -(1 - smoothing) * logsigmoid(rewards_P) - smoothing * logsigmoid(-rewards_P)


def hinge(margin_P: Tensor, beta: float) -> Tensor:
    """SLiC-HF's hinge (Zhao et al. 2023, arXiv:2305.10425) on rewards, as in RSO (Liu et al. 2023, arXiv:2309.06657):
    max(0, 1 - beta m).
    """
    return torch.relu(1 - beta * margin_P)


def ipo(mean_margin_P: Tensor, tau: float) -> Tensor:
    """IPO (Azar et al. 2023, arXiv:2310.12036, eq. 17): (m - 1 / (2 tau))^2.

    Args:
        mean_margin_P: difference of the answers' mean scores per token: a sum would grow with the answers' lengths.
        tau: strength of the regularisation (`beta` in a config).
    """
    return (mean_margin_P - 1 / (2 * tau)) ** 2


def exo_pair(margin_P: Tensor, beta: float, epsilon: float) -> Tensor:
    """EXO (Ji et al. 2024, arXiv:2402.00856, eq. 16): the reverse KL of the policy's preference q = sigmoid(beta m)
    from the label's, (1 - e, e).
    """
    log_chosen_P, log_rejected_P = logsigmoid(beta * margin_P), logsigmoid(-beta * margin_P)
    return log_chosen_P.exp() * (log_chosen_P - math.log1p(-epsilon)) + log_rejected_P.exp() * (
        log_rejected_P - math.log(epsilon)
    )


def robust(margin_P: Tensor, beta: float, flipped: float) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024, arXiv:2403.00409): unbiased when a share of the labels is flipped,
    (-(1 - e) log sigmoid(beta m) + e log sigmoid(-beta m)) / (1 - 2 e).
    """
    rewards_P = beta * margin_P
    return (flipped * logsigmoid(-rewards_P) - (1 - flipped) * logsigmoid(rewards_P)) / (1 - 2 * flipped)


def discopop(margin_P: Tensor, beta: float, tau: float) -> Tensor:
    """DiscoPOP (Lu et al. 2024, arXiv:2406.08414, eq. 5): a blend of the logistic and the exponential loss,
    (1 - s) (-log sigmoid(r)) + s exp(-r), r = beta m, s = sigmoid(r / tau).
    """
    rewards_P = beta * margin_P
    blend_P = torch.sigmoid(rewards_P / tau)
    # Far below zero the blend is zero, and zero times an infinite exponential would be no number.
    exponential_P = torch.exp((-rewards_P).clamp(max=LARGEST_EXPONENT))
    return (1 - blend_P) * -logsigmoid(rewards_P) + blend_P * exponential_P
