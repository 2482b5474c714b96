"""Sampling that does not depend on who shares the batch.

A draw from a softmax is the largest of its logits after independent Gumbel noise was added (Gumbel 1954; the "Gumbel-
max trick"). The noise of a row's t-th token comes from (seed, row, t) alone, so a row gets the same answer whatever
the size of the batch, the order of the rows, or where a run was interrupted. Temperature, top-k and top-p are
transformers' own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """How tokens are chosen; temperature 0 takes the likeliest each time."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


def processors(choice: Choice, rows: Sequence[int], prompt_tokens: int) -> list[Callable[[Tensor, Tensor], Tensor]]:
    """What turns logits into scores whose largest is the chosen token.

    Args:
        choice: temperature and what is cut off.
        rows: places of the batch's rows in the file.
        prompt_tokens: length of the padded prompts.
    """
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    if choice.temperature == 0:
        return []
    chain: list[Callable[[Tensor, Tensor], Tensor]] = [TemperatureLogitsWarper(choice.temperature)]
    if choice.top_k > 0:
        chain.append(TopKLogitsWarper(choice.top_k))
    if choice.top_p < 1:
        chain.append(TopPLogitsWarper(choice.top_p))
    return [*chain, GumbelNoise(choice.seed, rows, prompt_tokens)]


class GumbelNoise:
    """Adds to each row's scores the noise of (seed, row, token)."""

    def __init__(self, seed: int, rows: Sequence[int], prompt_tokens: int) -> None:
        self.seed, self.rows, self.prompt_tokens = seed, rows, prompt_tokens

    def __call__(self, ids_BT: Tensor, scores_BV: Tensor) -> Tensor:
        import torch

        step = ids_BT.shape[1] - self.prompt_tokens
        noise = torch.stack([self._noise(row, step, scores_BV.shape[1]) for row in self.rows])
        return scores_BV.float() + noise.to(scores_BV.device)

    def _noise(self, row: int, step: int, vocabulary: int) -> Tensor:
        import torch

        digest = hashlib.blake2b(f"{self.seed}/{row}/{step}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        return -torch.empty(vocabulary).exponential_(generator=generator).log()
