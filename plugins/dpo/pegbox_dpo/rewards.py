"""Losses of a pair that look at the implicit reward of each answer for itself.

`chosen_P` and `rejected_P` are log-ratios log policy(y) - log reference(y), sums over the tokens of an answer, in nats;
beta times them are the rewards r. Every function returns the loss of each pair, (P,) -> (P,), in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def nca_pair(chosen_P: Tensor, rejected_P: Tensor, beta: float) -> Tensor:
    """NCA for pairs (Chen et al. 2024, arXiv:2402.05369, with two answers):
    -log sigmoid(r_c) - 1/2 (log sigmoid(-r_c) + log sigmoid(-r_r)).
    """
    chosen_P, rejected_P = beta * chosen_P, beta * rejected_P
    return -logsigmoid(chosen_P) - 0.5 * (logsigmoid(-chosen_P) + logsigmoid(-rejected_P))


def bco_pair(chosen_P: Tensor, rejected_P: Tensor, beta: float) -> Tensor:
    """Binary classifier optimisation (Jung et al. 2024, arXiv:2404.04656) of a pair, without the reward shift:
    -log sigmoid(r_c) - log sigmoid(-r_r).

    The shift of the paper is a running mean of rewards of answers that stand alone; in a pair TRL leaves it out too.
    """
    return -logsigmoid(beta * chosen_P) - logsigmoid(-beta * rejected_P)


def sppo_hard(chosen_P: Tensor, rejected_P: Tensor, beta: float) -> Tensor:
    """SPPO with hard labels (Wu et al. 2024, arXiv:2405.00675, eq. 4.7 with a win probability of 1 and 0):
    (u_c - 1 / (2 beta))^2 + (u_r + 1 / (2 beta))^2.
    """
    return (chosen_P - 0.5 / beta) ** 2 + (rejected_P + 0.5 / beta) ** 2


def apo_zero(chosen_P: Tensor, rejected_P: Tensor, beta: float) -> Tensor:
    """APO-zero (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7): 1 - sigmoid(r_c) + sigmoid(r_r).

    For answers better than the model's own: chosen ones become likelier, rejected ones less likely.
    """
    return torch.sigmoid(-beta * chosen_P) + torch.sigmoid(beta * rejected_P)


def apo_down(chosen_P: Tensor, rejected_P: Tensor, beta: float) -> Tensor:
    """APO-down (same paper, eq. 8): sigmoid(r_c) + 1 - sigmoid(r_c - r_r).

    For answers worse than the model's own: both become less likely, the rejected one more so.
    """
    return torch.sigmoid(beta * chosen_P) + torch.sigmoid(-beta * (chosen_P - rejected_P))
