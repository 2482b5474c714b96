"""What the operation computes, in plain PyTorch: log-probability, entropy and logsumexp of each row.

With z = logits / temperature and p = softmax(z), for the target t of a row:

    logp = z_t - lse(z)          lse(z) = log sum_j exp z_j          H = -sum_j p_j log p_j

    d logp / d z_j = [j = t] - p_j     d lse / d z_j = p_j     d H / d z_j = -p_j (log p_j + H)

The last one: dp_i / dz_j = p_i ([i = j] - p_j), and dH = -sum_i (log p_i + 1) dp_i, whose constant part
vanishes because sum_i dp_i = 0, which leaves -p_j log p_j + p_j sum_i p_i log p_i. A logit of -inf has p = 0
and p log p = 0.

Shapes: `...` rows, V vocabulary. fp64 logits are computed in fp64, all others in fp32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(..., V) logits, (...) targets -> (...) logps, entropy or None, logsumexp; zero where ignored."""
    ignored = targets == ignore_index
    z = _scaled(logits, temperature).masked_fill(ignored.unsqueeze(-1), 0.0)
    log_p = z.log_softmax(-1)
    logps = log_p.gather(-1, targets.masked_fill(ignored, 0).long().unsqueeze(-1)).squeeze(-1)
    logsumexp = z.logsumexp(-1).masked_fill(ignored, 0.0)
    if not entropy:
        return logps.masked_fill(ignored, 0.0), None, logsumexp
    plogp = log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)
    return logps.masked_fill(ignored, 0.0), -plogp.sum(-1).masked_fill(ignored, 0.0), logsumexp


def token_logprobs_backward(
    logits: Tensor,
    targets: Tensor,
    parts: Tensor,
    entropy: Tensor | None,
    grads: tuple[Tensor, Tensor | None, Tensor],
    temperature: float,
    ignore_index: int,
) -> Tensor:
    """The gradient of (logps, entropy, logsumexp) by the formulas above, in the dtype of the logits.

    `parts` (2, ...): the largest logit of each row, and ln sum_j exp((logit_j - largest) / temperature).
    Together they are the logsumexp; apart they do not lose the small differences between large logits.
    """
    grad_logps, grad_entropy, grad_logsumexp = grads
    ignored = targets == ignore_index
    largest, log_total = parts.unsqueeze(-1)
    log_p = _scaled(logits, 1.0).sub(largest).div(temperature) - log_total
    factor = (grad_logsumexp - grad_logps).unsqueeze(-1)
    if entropy is not None and grad_entropy is not None:
        finite = log_p.masked_fill(log_p == -math.inf, 0.0)
        factor = factor - grad_entropy.unsqueeze(-1) * (finite + entropy.unsqueeze(-1))
    grad = log_p.exp() * factor
    grad.scatter_add_(-1, targets.masked_fill(ignored, 0).long().unsqueeze(-1), grad_logps.unsqueeze(-1))
    return (grad / temperature).masked_fill(ignored.unsqueeze(-1), 0.0).to(logits.dtype)


def softmax_parts(logits: Tensor, temperature: float) -> Tensor:
    """The `parts` that the gradient needs: (2, ...)."""
    largest = logits.amax(-1, keepdim=True)
    log_total = _scaled(logits, 1.0).sub(largest).div(temperature).logsumexp(-1)
    return torch.stack((largest.squeeze(-1).to(log_total.dtype), log_total))


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return (logits if logits.dtype == torch.float64 else logits.float()) / temperature
