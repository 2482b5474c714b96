"""What the operations compute, in plain PyTorch, with all logits in memory.

    x = hidden weight^T + bias    z = softcap tanh(scale x / softcap) / temperature; scale x / temperature without a cap
    logp = z_t - lse(z)           lse(z) = log sum_j exp z_j           H = -sum_j p_j log p_j

and the loss of row n with token weight w, label smoothing e and z-loss l (PaLM, arXiv:2204.02311, section 5):

    w ( -(1 - e) logp_t - e mean_j logp_j + l lse^2 )

N  rows    H  hidden size    V  vocabulary. fp64 is computed in fp64; else logits are rounded to the dtype of their
operands, as a linear layer does, and all that follows is fp32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(N, H), (V, H), (N) -> (N) logps, entropy or None, logsumexp; zero where ignored."""
    ignored = targets == ignore_index
    log_p, lse = _log_softmax(hidden, weight, bias, scale, softcap, temperature)
    logps = log_p.gather(-1, targets.masked_fill(ignored, 0).long().unsqueeze(-1)).squeeze(-1)
    found = [logps, lse]
    if entropy:
        found.append(-(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(-1))
    logps, lse, *entropies = (tensor.masked_fill(ignored, 0.0) for tensor in found)
    return logps, entropies[0] if entropies else None, lse


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> the sum of the loss, the sum of token weights, the z-loss in it, the token weight predicted right."""
    kept = targets != ignore_index
    index = targets.masked_fill(~kept, 0).long().unsqueeze(-1)
    log_p, lse = _log_softmax(hidden, weight, bias, scale, softcap, temperature)
    logps = log_p.gather(-1, index).squeeze(-1)
    given = torch.ones_like(logps) if token_weights is None else token_weights.to(logps.dtype)
    weights = given.masked_fill(~kept, 0.0)
    nll = -(1 - label_smoothing) * logps
    if label_smoothing:
        nll = nll - label_smoothing * log_p.mean(-1)
    z_sum = (weights * z_loss * lse.square()).sum()
    correct = (weights * (logps >= log_p.amax(-1))).sum()
    return (weights * nll).sum() + z_sum, weights.sum(), z_sum.detach(), correct.detach()


def _log_softmax(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None, temperature: float
) -> tuple[Tensor, Tensor]:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    z = (logits if logits.dtype == torch.float64 else logits.float()) * scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    return z.log_softmax(-1), z.logsumexp(-1)
