"""The losses of answers as functions of log-probabilities.

    D  documents: answers to prompts, each wanted or unwanted

`ratios_D` is log p(answer) under the policy minus that under the reference, summed over its tokens (nats). A loss lies
between 0 and 1, whatever the ratio: one answer cannot outweigh the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def kto_losses(ratios_D: Tensor, signs_D: Tensor, kl: Tensor, beta: float) -> Tensor:
    """1 - sigmoid(sign beta (ratio - kl)) of each answer (arXiv:2402.01306, eq. 7 and 8).

    Args:
        ratios_D: log-ratios (nats), see above.
        signs_D: +1 for wanted answers, -1 for unwanted ones.
        kl: the reference point: an estimate of the policy's divergence from the reference (nats), scalar, no gradient.
        beta: how strongly the policy is held to the reference.
    """
    return (-signs_D * beta * (ratios_D - kl)).sigmoid()


def apo_zero_losses(ratios_D: Tensor, signs_D: Tensor, beta: float) -> Tensor:
    """1 - sigmoid(beta ratio) of wanted answers, sigmoid(beta ratio) of unwanted ones.

    APO-zero (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7) is the sum of both over a pair; taken apart, answers
    need no partner. Arguments as above.
    """
    return (-signs_D * beta * ratios_D).sigmoid()


def kl_estimate(total: Tensor, documents: int) -> Tensor:
    """The mean log-ratio of mismatched answers, at least 0 as a divergence is (arXiv:2402.01306, section 4.1).

    Args:
        total: sum of the log-ratios (nats) of mismatched documents, scalar.
        documents: how many they are, at least one.
    """
    return (total / documents).clamp(min=0)
