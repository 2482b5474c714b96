"""Sums and means over the tokens of each completion.

    N  trained tokens of a micro-batch    D  its completions, one document each

A completion without a trained token has the sum 0 and the mean 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def sums(values_N: Tensor, document_N: Tensor, documents: int) -> Tensor:
    """The sum over the tokens of each of `documents` completions, of length D."""
    return values_N.new_zeros(documents).index_add(0, document_N, values_N)


def lengths(like_N: Tensor, document_N: Tensor, documents: int) -> Tensor:
    """Trained tokens of each completion, in the data type of `like_N`; at least 1, to divide by."""
    return sums(like_N.detach().new_ones(like_N.shape), document_N, documents).clamp(min=1.0)


def means(values_N: Tensor, document_N: Tensor, documents: int) -> Tensor:
    """The mean over the tokens of each completion, of length D."""
    return sums(values_N, document_N, documents) / lengths(values_N, document_N, documents)
