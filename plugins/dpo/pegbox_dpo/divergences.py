"""From a log-ratio of policy and reference to the score of an answer: f-DPO (Wang et al. 2023, arXiv:2309.16240).

A divergence D_f(policy, reference) with generator f leads to the implicit reward beta * f'(t) + a normaliser of the
prompt, t = policy / reference; a loss of the difference of two rewards does not see the normaliser. The
scores below are f'(t) of u = log t, in float32; (P,) -> (P,).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pegbox_dpo.config import Divergence
from pegbox_dpo.differences import LARGEST_EXPONENT
from pegbox_dpo.pairs import Answers

NEAR_ONE = 1e-6


def reverse_kl(ratio_P: Tensor) -> Tensor:
    """f(t) = t log t: the score is u, up to a constant (plain DPO)."""
    return ratio_P


def forward_kl(ratio_P: Tensor) -> Tensor:
    """f(t) = -log t + t - 1: the score is 1 - exp(-u)."""
    return 1 - torch.exp((-ratio_P).clamp(max=LARGEST_EXPONENT))


def js_divergence(ratio_P: Tensor) -> Tensor:
    """f(t) = t log t - (t + 1) log((t + 1) / 2): the score is log(2 t / (t + 1)) = log 2 + log sigmoid(u)."""
    return math.log(2) + logsigmoid(ratio_P)


def alpha_divergence(ratio_P: Tensor, alpha: float) -> Tensor:
    """f'(t) = (t^(alpha - 1) - 1) / (alpha - 1); its limit at alpha = 1 is u."""
    if abs(alpha - 1) < NEAR_ONE:
        return ratio_P
    return torch.expm1(((alpha - 1) * ratio_P).clamp(max=LARGEST_EXPONENT)) / (alpha - 1)


def scores(ratios: Answers, divergence: Divergence, alpha: float) -> Answers:
    """The scores of both answers of each pair."""
    if divergence == "alpha_divergence":
        return Answers(alpha_divergence(ratios.chosen_P, alpha), alpha_divergence(ratios.rejected_P, alpha))
    score = {"reverse_kl": reverse_kl, "forward_kl": forward_kl, "js_divergence": js_divergence}[divergence]
    return Answers(score(ratios.chosen_P), score(ratios.rejected_P))
