"""Choosing the next token of each row, and its log-probability.

    p = softmax(logits / temperature), then what top-k, top-p, min-p and the repetition penalty leave of it
    token = the first v with  p_0 + ... + p_v > u        u uniform in [0, 1): inversion of the distribution function

Each completion has its own sequence of u, a function of the seed, its prompt's place in the request and its number
among the samples of that prompt: what is sampled does not depend on which completions are computed together, on how
many processes share the work, or on the run's other randomness. The filters are transformers' own.

The log-probability is that of softmax(logits / temperature) before filters and penalty: what the learner computes of
the same token, so that their ratio is 1 while the weights are the same. At temperature 0 it is that of softmax(logits).

    R  completions    S  most new tokens    V  vocabulary    T  tokens so far, with padding
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

if TYPE_CHECKING:
    from pegbox.rollouts import Sampling
    from torch import Tensor


class Chooser:
    """Chooses tokens as a `Sampling` says."""

    def __init__(self, sampling: Sampling) -> None:
        self.temperature = sampling.temperature
        self.greedy = sampling.temperature == 0
        self.penalty = sampling.repetition_penalty
        self._before = LogitsProcessorList()
        self._after = LogitsProcessorList()
        if self.penalty != 1:
            self._before.append(RepetitionPenaltyLogitsProcessor(self.penalty))
        if not self.greedy:
            if sampling.top_k:
                self._after.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self._after.append(TopPLogitsWarper(sampling.top_p))
            if sampling.min_p > 0:
                self._after.append(MinPLogitsWarper(sampling.min_p))

    @property
    def plain(self) -> bool:
        """Temperature is all there is."""
        return not self._before and not self._after

    def __call__(self, ids_RT: Tensor, logits_RV: Tensor, uniform_R: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and their log-probabilities. `logits_RV` are float32 and may be overwritten.

        Args:
            ids_RT: the tokens so far, which the repetition penalty looks at.
        """
        if self.greedy:
            scores_RV = self._before(ids_RT, logits_RV.clone()) if self._before else logits_RV
            token_R = scores_RV.argmax(-1)
            return token_R, _at(logits_RV, token_R) - logits_RV.logsumexp(-1)
        if self.plain:
            probability_RV = (logits_RV.div_(self.temperature) if self.temperature != 1 else logits_RV).softmax(-1)
            token_R = invert(probability_RV, uniform_R)
            return token_R, _at(probability_RV, token_R).log()
        logp_RV = (logits_RV / self.temperature).log_softmax(-1)
        # The penalty acts on logits before the temperature, as in transformers and vLLM.
        scores_RV = self._before(ids_RT, logits_RV).div_(self.temperature)
        token_R = invert(self._after(ids_RT, scores_RV).softmax(-1), uniform_R)
        return token_R, _at(logp_RV, token_R)


def invert(probability_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """The token of each row at which the distribution function passes u; one of probability 0 is never chosen."""
    passed_RV = probability_RV.cumsum(-1)
    total_R1 = passed_RV[:, -1:]
    below_total_R1 = torch.nextafter(total_R1, torch.zeros_like(total_R1))
    threshold_R1 = torch.minimum(uniform_R[:, None] * total_R1, below_total_R1)
    return torch.searchsorted(passed_RV, threshold_R1, right=True)[:, 0]


def uniforms(seed: int, places: Sequence[tuple[int, int]], count: int) -> Tensor:
    """`count` numbers in [0, 1) for each (prompt, sample), float32 `_RS` on the CPU."""
    drawn_RS = torch.empty(len(places), count)
    source = torch.Generator()
    for row_S, (prompt, sample) in zip(drawn_RS, places, strict=True):
        digest = hashlib.blake2b(f"{seed}/{prompt}/{sample}".encode(), digest_size=8).digest()
        source.manual_seed(int.from_bytes(digest, "big") >> 1)
        torch.rand(count, generator=source, out=row_S)
    return drawn_RS


def _at(values_RV: Tensor, token_R: Tensor) -> Tensor:
    return values_RV.gather(1, token_R[:, None])[:, 0]
