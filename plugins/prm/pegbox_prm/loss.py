"""The loss of process reward models: cross-entropy of the verdicts, read at the token behind each step.

    total = -sum over marked tokens n of log p(verdict_n | tokens up to and with n)         count = N

(Lightman et al. 2023, arXiv:2305.20050, section 2.6; Uesato et al. 2022, arXiv:2211.14275.) A step is judged when it
has ended, so the prediction stands at the marked token itself. `Batch.trained_N` holds the places before marked tokens,
from which a language model would predict them; the verdict is read one place further on.

    B  rows    T  tokens    N  marked tokens    C  labels: wrong, right
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pegbox.rows import Batch
from pegbox.types import LossOutput, Need, Outputs, Term
from torch.nn.functional import cross_entropy

from pegbox_prm import EXTRA

if TYPE_CHECKING:
    from torch import Tensor

TERM = "prm"


def verdict_loss(values_NC: Tensor, verdicts_N: Tensor) -> Tensor:
    """The sum of cross-entropies, in float32; zero, and differentiable, for no step.

    Args:
        values_NC: logits of wrong and right at the token behind each step.
        verdicts_N: 0 or 1, int64.
    """
    return cross_entropy(values_NC.float(), verdicts_N, reduction="sum")


class PrmLoss:
    """One term, `prm`, over the marked tokens; `accuracy` is the share of verdicts that are predicted."""

    needs: frozenset[Need] = frozenset({"values"})
    scope: Literal["token", "batch"] = "token"
    extras = frozenset({EXTRA})

    def counts(self, batch: Batch) -> Mapping[str, float]:
        """The number of marked tokens."""
        return {TERM: float(batch.trained_tokens)}

    def __call__(self, batch: Batch, outputs: Outputs) -> LossOutput:
        """The term of one micro-batch; `outputs.values_BTC` has two labels."""
        assert outputs.values_BTC is not None, "the loop provides every need"
        values_NC = outputs.values_BTC.flatten(0, 1)[batch.trained_N + 1]
        verdicts_N, count = batch.extra[EXTRA].value, float(batch.trained_tokens)
        right = (values_NC.detach().argmax(-1) == verdicts_N).float().sum()
        return LossOutput(
            terms=(Term(name=TERM, total=verdict_loss(values_NC, verdicts_N), count=count),),
            metrics=(Term(name="accuracy", total=right, count=count),),
        )
