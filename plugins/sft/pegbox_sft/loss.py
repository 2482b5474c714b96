"""The loss of supervised fine-tuning: the negative log-likelihood of the trained tokens.

    total = -sum over trained positions n of log p(target_n | tokens up to n)        count = N

The loop divides the sum of totals by the sum of counts over all micro-batches and ranks of a step, so that
every trained token of the step weighs the same however the step was split. This is what transformers' Trainer
computes with `num_items_in_batch`; a mean of per-micro-batch means would weigh a token by how few others
share its micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pegbox.types import Batch, LossOutput, Need, Outputs, Term

if TYPE_CHECKING:
    from torch import Tensor

TERM = "sft"


def negative_log_likelihood(logps_N: Tensor) -> Tensor:
    """Minus the sum of the log-probabilities, in float32; zero, and differentiable, for no token."""
    return -logps_N.float().sum()


class SftLoss:
    """One term, `sft`, over the trained tokens."""

    needs: frozenset[Need] = frozenset({"logps"})
    scope: Literal["token", "batch"] = "token"
    uniform = True

    def counts(self, batch: Batch) -> Mapping[str, float]:
        """The number of trained tokens."""
        return {TERM: float(batch.trained_tokens)}

    def __call__(self, batch: Batch, outputs: Outputs) -> LossOutput:
        """The term of one micro-batch; `outputs.logps_N` follows `batch.trained_N`."""
        assert outputs.logps_N is not None, "the loop provides every need"
        total = negative_log_likelihood(outputs.logps_N)
        return LossOutput(terms=(Term(name=TERM, total=total, count=float(batch.trained_tokens)),))
