"""The loss of Dynamic Fine-Tuning (arXiv:2508.05629, eq. 7-9):

    total = -sum over trained positions n of sg(p_n) log p_n        count = N        sg: no gradient

The gradient of plain maximum likelihood is a policy gradient whose reward is divided by the probability of the token,
so that unlikely tokens dominate it. Weighing each token by its probability takes the division back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pegbox.rows import Batch
from pegbox.types import LossOutput, Need, Outputs, Term

if TYPE_CHECKING:
    from torch import Tensor

TERM, LIKELIHOOD = "dft", "nll"


def weighed_likelihood(logps_N: Tensor) -> Tensor:
    """Minus the sum of log-probabilities weighed by their probabilities, in float32; zero for no token."""
    logps_N = logps_N.float()
    return -(logps_N.detach().exp() * logps_N).sum()


class DftLoss:
    """One term, `dft`, over the trained tokens; `nll` is logged beside it, to compare with other losses."""

    needs: frozenset[Need] = frozenset({"logps"})
    scope: Literal["token", "batch"] = "token"

    def counts(self, batch: Batch) -> Mapping[str, float]:
        """The number of trained tokens."""
        return {TERM: float(batch.trained_tokens)}

    def __call__(self, batch: Batch, outputs: Outputs) -> LossOutput:
        """The term of one micro-batch; `outputs.logps_N` follows `batch.trained_N`."""
        assert outputs.logps_N is not None, "the loop provides every need"
        count = float(batch.trained_tokens)
        likelihood = -outputs.logps_N.detach().float().sum()
        return LossOutput(
            terms=(Term(name=TERM, total=weighed_likelihood(outputs.logps_N), count=count),),
            metrics=(Term(name=LIKELIHOOD, total=likelihood, count=count),),
        )
