"""What is done about completions that another distribution than the policy's was sampled from, as pure functions.

The engine that samples and the model that learns give a token different probabilities, because their kernels differ or
because the weights moved. Ratios between the two weigh tokens (truncated: Yao et al. 2025, "Your efficient RL framework
secretly brings you off-policy RL training"; masked: Liu et al. 2025, "When speed kills stability").

    N  trained tokens    D  completions
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch

from pegbox_grpo.documents import means, sums
from pegbox_grpo.objectives import HIGHEST_LOG_WEIGHT, LOWEST_LOG_WEIGHT

if TYPE_CHECKING:
    from torch import Tensor

SLOPPIEST_LOG_RATIO = 20.0


def sampler_ratio(old_N: Tensor, sampler_N: Tensor, document_N: Tensor | None, documents: int) -> Tensor:
    """Probability under the trainer over that under the sampler, without gradient.

    Args:
        old_N: log-probabilities by the trainer, with the weights that sampled.
        sampler_N: those that the sampler reported; NaN where it has none: the ratio of that token is 1.
        document_N: which completion a token is in: the ratio of whole completions, of length D; None: of tokens.
    """
    difference_N = (old_N - sampler_N).detach().nan_to_num(nan=0.0)
    return difference_N.exp() if document_N is None else sums(difference_N, document_N, documents).exp()


def bounded(ratio: Tensor, low: float | None, high: float | None, how: Literal["truncate", "mask"]) -> Tensor:
    """Ratios cut to their bounds, or 0 where they lie outside."""
    if how == "truncate":
        return ratio.clamp(min=low, max=high)
    outside = (ratio < (-math.inf if low is None else low)) | (ratio > (math.inf if high is None else high))
    return ratio.masked_fill(outside, 0.0)


def log_weight(
    log_ratio_N: Tensor, correction: Tensor | None, document_N: Tensor, documents: int, *, of_tokens: bool
) -> Tensor:
    """The logarithm of a completion's weight in VESPO, of length D: policy over sampler, by way of the old policy."""
    own_D = sums(log_ratio_N.detach().clamp(-SLOPPIEST_LOG_RATIO, SLOPPIEST_LOG_RATIO), document_N, documents)
    if correction is None:
        return own_D
    log_correction = correction.log().clamp(LOWEST_LOG_WEIGHT, HIGHEST_LOG_WEIGHT)
    return own_D + (sums(log_correction, document_N, documents) if of_tokens else log_correction)


def on_policy(logps_N: Tensor, sampler_N: Tensor, advantages_D: Tensor, document_N: Tensor, threshold: float) -> Tensor:
    """Which completions are kept, of length D, as 0 and 1 (DeepSeek-V3.2, arXiv:2512.02556, eq. 9).

    Those with a negative advantage go where the mean of log(sampler / policy) over their tokens exceeds `threshold`.
    """
    gap_N = (sampler_N - logps_N.detach()).nan_to_num(nan=0.0)
    near_D = means(gap_N, document_N, len(advantages_D)) <= threshold
    return ((advantages_D >= 0) | near_D).to(logps_N.dtype)


def highest_entropy(entropies: Tensor, share: float) -> Tensor:
    """Which tokens are in the `share` of highest entropy (Wang et al. 2025, arXiv:2506.01939)."""
    if entropies.numel() == 0 or share >= 1:
        return torch.ones_like(entropies, dtype=torch.bool)
    import numpy

    # numpy's quantile has no limit of length, torch's has one.
    return entropies >= float(numpy.quantile(entropies.double().numpy(), 1 - share))
