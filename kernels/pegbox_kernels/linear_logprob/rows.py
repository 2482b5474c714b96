"""What belongs to a row: how logits are made of the projection, what is wanted of them, and what is kept.

N  rows (tokens)
"""

from __future__ import annotations

from math import log
from typing import NamedTuple

import torch
from torch import Tensor


class Rule(NamedTuple):
    """logit = softcap * tanh(scale * x / softcap) / temperature, for x of the projection; softcap 0: none."""

    scale: float
    softcap: float
    temperature: float
    ignore_index: int

    @property
    def scales(self) -> tuple[float, float, float, float]:
        """k, inner, cap and share of the kernels (`triton.py`)."""
        share = self.scale / self.temperature
        if self.softcap > 0:
            return 1 / (self.temperature * log(2)), self.scale / self.softcap, self.softcap, share
        return share / log(2), 1.0, 1.0, share


class Objective(NamedTuple):
    """The loss of a row whose gradient the forward makes: factor * token weight * (label-smoothed nll + z-loss)."""

    factor: float = 1.0
    token_weights_N: Tensor | None = None
    smoothing: float = 0.0
    z_loss: float = 0.0


class Rows(NamedTuple):
    """What the forward finds, fp32; tensors without elements were not asked for.

    `largest_N` is the largest logit before the temperature, `log_total_N` the logsumexp of what logits lie below it:
    together they are the logsumexp, apart they do not lose small differences. `mean_logp_N` is the mean of log p over
    the vocabulary; `hits_N` is 1 where no logit is above the target's. `factors_N` are for rows of a gradient that was
    written before they were known; without elements, the gradient is whole.
    """

    logps_N: Tensor
    entropy_N: Tensor
    logsumexp_N: Tensor
    largest_N: Tensor
    log_total_N: Tensor
    mean_logp_N: Tensor
    hits_N: Tensor
    factors_N: Tensor

    @classmethod
    def new(cls, rows: int, device: torch.device, *, entropy: bool, mean: bool, hits: bool, factors: bool) -> Rows:
        def made(wanted: bool) -> Tensor:
            return torch.empty(rows if wanted else 0, dtype=torch.float32, device=device)

        return cls(made(True), made(entropy), made(True), made(True), made(True), made(mean), made(hits), made(factors))


class Coefficients(NamedTuple):
    """The gradient of logit j of a row: p_j (constant + slope ln p_j) + at_target [j = target]."""

    largest_N: Tensor
    log_total_N: Tensor
    constant_N: Tensor
    slope_N: Tensor
    at_target_N: Tensor


def part(tensors: Rows | Coefficients, rows: slice) -> list[Tensor]:
    """The same, for some rows."""
    return [tensor[rows] for tensor in tensors]
