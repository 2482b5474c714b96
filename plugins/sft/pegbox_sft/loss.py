"""The loss of supervised fine-tuning: the negative log-likelihood of the trained tokens.

    total = -sum over trained positions n of log p(target_n | tokens up to n)        count = N

The loop divides the sum of totals by the sum of counts over all micro-batches and ranks of a step, so that
every trained token of the step weighs the same however the step was split. This is what transformers' Trainer
computes with `num_items_in_batch`; a mean of per-micro-batch means would weigh a token by how few others
share its micro-batch.

Of rows that say which answer is wanted (`Batch.sign_D`), such as preferences, only wanted answers are trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pegbox.rows import Batch
from pegbox.types import LossOutput, Need, Outputs, Term

if TYPE_CHECKING:
    from torch import Tensor

TERM = "sft"


def negative_log_likelihood(logps_N: Tensor) -> Tensor:
    """Minus the sum of the log-probabilities, in float32; zero, and differentiable, for no token."""
    return -logps_N.float().sum()


def wanted(batch: Batch) -> Tensor | None:
    """Which trained tokens belong to an answer that is wanted; None: all do."""
    if batch.sign_D is None or batch.document_N is None:
        return None
    return (batch.sign_D > 0)[batch.document_N]


def count_of(batch: Batch, wanted_N: Tensor | None) -> float | Tensor:
    """How many tokens are trained; the device is not waited for."""
    return float(batch.trained_tokens) if wanted_N is None else wanted_N.sum()


class SftLoss:
    """One term, `sft`, over the trained tokens."""

    needs: frozenset[Need] = frozenset({"logps"})
    scope: Literal["token", "batch"] = "token"
    uniform = True

    def counts(self, batch: Batch) -> Mapping[str, float]:
        """The number of trained tokens."""
        return {TERM: float(count_of(batch, wanted(batch)))}

    def __call__(self, batch: Batch, outputs: Outputs) -> LossOutput:
        """The term of one micro-batch; `outputs.logps_N` follows `batch.trained_N`."""
        assert outputs.logps_N is not None, "the loop provides every need"
        wanted_N = wanted(batch)
        logps_N = outputs.logps_N if wanted_N is None else outputs.logps_N.where(wanted_N, 0.0)
        total, count = negative_log_likelihood(logps_N), count_of(batch, wanted_N)
        return LossOutput(terms=(Term(name=TERM, total=total, count=count),))
