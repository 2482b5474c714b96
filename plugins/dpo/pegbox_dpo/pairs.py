"""Log-probabilities of tokens as those of answers, two answers a pair.

    N  trained tokens    D  documents, chosen and rejected in turn    P  pairs: D / 2

Nothing here waits for the device: how many pairs there are is the length of `Batch.last_D`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from pegbox.errors import DataError
from torch import Tensor

if TYPE_CHECKING:
    from pegbox.rows import Batch

NAMED_ROWS = 4
"""Rows of a batch that a message names."""


@dataclass(frozen=True)
class Answers:
    """One figure of both answers of each pair.

    Attributes:
        chosen_P: of the answer that is wanted.
        rejected_P: of the other one.
    """

    chosen_P: Tensor
    rejected_P: Tensor

    def __sub__(self, other: Answers) -> Answers:
        return Answers(self.chosen_P - other.chosen_P, self.rejected_P - other.rejected_P)

    @property
    def margin(self) -> Tensor:
        """Chosen minus rejected: (P,)."""
        return self.chosen_P - self.rejected_P


def require_signs(batch: Batch) -> None:
    """Raise unless the rows of a batch, wherever it lies, say which of their answers are wanted.

    Raises:
        DataError: they do not.
    """
    if batch.rows and (batch.sign_D is None or batch.document_N is None or batch.last_D is None):
        raise DataError(
            f"the {_named(batch)} of the data do not say which answer is wanted",
            "This loss compares two answers: each row is a pair of a chosen and a rejected one.",
            "Use a data format of preferences, or another loss.",
        )


def require_pairs(batch: Batch) -> int:
    """How many pairs a batch on the host holds.

    Raises:
        DataError: its rows are not pairs, or an answer has no trained token.
    """
    require_signs(batch)
    if batch.sign_D is None or batch.document_N is None:
        return 0
    signs = batch.sign_D.tolist()
    if signs != [1, -1] * (len(signs) // 2):
        raise DataError(
            f"the {_named(batch)} of the data have answers with the signs {signs[:8]}, not pairs of 1 and -1",
            "This loss compares two answers: each row is a pair of a chosen and a rejected one.",
            "Use a data format of preferences, or a loss for answers that stand alone (kto).",
        )
    lengths = torch.bincount(batch.document_N, minlength=len(signs))
    if batch.trained_tokens and not bool(lengths.all()):
        at = int((lengths == 0).nonzero()[0, 0])
        row = f"row {batch.rows[at // 2]}" if 2 * len(batch.rows) == len(signs) else f"one of the {_named(batch)}"
        raise DataError(
            f"{row} of the data has {'a rejected' if at % 2 else 'a chosen'} answer without a trained token",
            "An empty answer is certain, whatever the model: there is nothing to compare.",
            "Remove the row, or let the data section drop rows that are too long instead of cutting them.",
        )
    return len(signs) // 2


def _named(batch: Batch) -> str:
    more = " ..." if len(batch.rows) > NAMED_ROWS else ""
    return f"rows {', '.join(map(str, batch.rows[:NAMED_ROWS]))}{more}"


def answers(values_N: Tensor, batch: Batch) -> Answers:
    """Sums over the trained tokens of each answer, in float32, differentiable; also of no token and of no answer."""
    assert batch.document_N is not None, "counts of the batch were asked for first"
    assert batch.last_D is not None, "counts of the batch were asked for first"
    zeros_D = values_N.new_zeros(len(batch.last_D), dtype=torch.float32)
    sums_PA = zeros_D.index_add(0, batch.document_N, values_N.float()).view(-1, 2)
    return Answers(*sums_PA.unbind(1))


def token_counts(batch: Batch) -> Answers:
    """Trained tokens of each answer, at least 1, in float32."""
    counted = answers(torch.ones_like(batch.trained_N, dtype=torch.float32), batch)
    return Answers(counted.chosen_P.clamp(min=1), counted.rejected_P.clamp(min=1))


def verbosity_weights(batch: Batch, alpha: float) -> Tensor:
    """Length desensitisation (LD-DPO, Liu et al. 2024, arXiv:2409.06411): float32, (N,).

    Tokens of an answer up to the length of the shorter one of its pair weigh 1, those beyond it `alpha`.
    """
    assert batch.document_N is not None, "counts of the batch were asked for first"
    assert batch.last_D is not None, "counts of the batch were asked for first"
    ones_N = torch.ones_like(batch.trained_N)
    lengths_D = ones_N.new_zeros(len(batch.last_D)).index_add(0, batch.document_N, ones_N)
    # Documents stand in the order of trained positions: what came before one is the sum of those before it.
    starts_D = lengths_D.cumsum(0) - lengths_D
    place_N = torch.arange(len(ones_N), device=ones_N.device) - starts_D[batch.document_N]
    shared_D = lengths_D.view(-1, 2).amin(1).repeat_interleave(2, output_size=len(lengths_D))
    return torch.where(place_N < shared_D[batch.document_N], 1.0, alpha)


def on_policy_weights(logps_N: Tensor, logits_NV: Tensor, batch: Batch) -> Tensor:
    """How likely the policy itself finds both answers (WPO, Zhou et al. 2024, arXiv:2406.11827, eq. 2): (P,), no
    gradient.

    Each token's log-probability is taken relative to log sum over v of p(v)^2, its expectation under the policy's own
    sampling, and averaged over the answer; the weight of a pair is the product of its answers' weights.
    """
    with torch.no_grad():
        squares_N = torch.logsumexp(2 * logits_NV.float(), -1) - 2 * torch.logsumexp(logits_NV.float(), -1)
        aligned, tokens = answers(logps_N.detach().float() - squares_N, batch), token_counts(batch)
        return torch.exp(aligned.chosen_P / tokens.chosen_P + aligned.rejected_P / tokens.rejected_P)
