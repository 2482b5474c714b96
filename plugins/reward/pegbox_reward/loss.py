"""The loss of outcome reward models on preferences: r is the reward of an answer, read at its last token.

    reward = -sum over pairs of log sigmoid(r_chosen - r_rejected - margin)              count = pairs
    center =  sum over pairs of (r_chosen + r_rejected)^2                                count = pairs

The first is the likelihood of the choices under Bradley and Terry's model (Ouyang et al. 2022, arXiv:2203.02155,
eq. 1; with a margin, how much better the chosen answer was, Touvron et al. 2023, arXiv:2307.09288, eq. 2). It sees
differences alone, so rewards may drift together; the second holds them around zero (Eisenstein et al. 2023,
arXiv:2312.09244).

    B  rows    T  tokens    D  documents: chosen, rejected, chosen, rejected ...    P  pairs, D / 2
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from pegbox.errors import DataError
from pegbox.rows import Batch
from pegbox.types import LossOutput, Need, Outputs, Term
from torch.nn.functional import logsigmoid

if TYPE_CHECKING:
    from torch import Tensor

TERM, CENTER, MARGIN = "reward", "center", "margin"
ANSWERS = 2
"""Documents of a row: the answer that is wanted, and the one that is not."""


def bradley_terry(chosen_P: Tensor, rejected_P: Tensor, margin_P: Tensor | float = 0.0) -> Tensor:
    """Minus the sum of the log-likelihoods of the choices, in float32; zero, and differentiable, for no pair.

    Args:
        chosen_P: rewards of the answers that are wanted.
        rejected_P: rewards of the others, pair by pair.
        margin_P: by how much the first should be larger.
    """
    return -logsigmoid(chosen_P.float() - rejected_P.float() - margin_P).sum()


class RewardLoss:
    """The term `reward`, and `center` where it is weighed.

    Metrics have TRL's names. `min_reward` and `max_reward` are extremes of all that is logged at once.
    """

    needs: frozenset[Need] = frozenset({"values"})
    scope: Literal["token", "batch"] = "token"

    def __init__(self, *, margin: bool = False, center: float = 0.0, pad_id: int | None = None) -> None:
        self._margin, self._center, self._pad_id = margin, center, pad_id

    def counts(self, batch: Batch) -> Mapping[str, float]:
        """The number of pairs.

        Raises:
            DataError: a row is no pair, lacks its margin or has one that is not used, or ends in padding.
        """
        if batch.rows:
            _require_pairs(batch)
            self._require_margins(batch)
            self._require_ends(batch)
        pairs = float(_documents(batch) // ANSWERS)
        return {TERM: pairs, CENTER: pairs} if self._center else {TERM: pairs}

    def __call__(self, batch: Batch, outputs: Outputs) -> LossOutput:
        """The terms of one micro-batch; `outputs.values_BTC` has one label."""
        assert outputs.values_BTC is not None, "the loop provides every need"
        assert batch.last_D is not None, "who makes batches says where documents end"
        rewards_D = outputs.values_BTC.flatten()[batch.last_D].float()
        chosen_P, rejected_P = rewards_D.view(-1, ANSWERS).unbind(1)
        pairs, margin_P = float(_documents(batch) // ANSWERS), self._margins(batch)
        terms = [Term(name=TERM, total=bradley_terry(chosen_P, rejected_P, margin_P), count=pairs)]
        if self._center:
            squares = (chosen_P + rejected_P).square().sum()
            terms.append(Term(name=CENTER, total=squares, count=pairs, weight=self._center))
        return LossOutput(terms=tuple(terms), metrics=_metrics(rewards_D.detach()))

    def _margins(self, batch: Batch) -> Tensor | float:
        return batch.extra[MARGIN].value.view(-1, ANSWERS)[:, 0] if self._margin and MARGIN in batch.extra else 0.0

    def _require_margins(self, batch: Batch) -> None:
        if self._margin == (MARGIN in batch.extra):
            return
        if self._margin:
            raise DataError(
                f"reward.margin is true, and rows of {_named(batch)} have no number in a column '{MARGIN}'",
                "Each pair has a margin of its own.",
                f"Add to the config: data: {{columns: [{MARGIN}]}}, and give every row a number there.",
            )
        raise DataError(
            f"the rows keep a column '{MARGIN}', and reward.margin is false",
            "The margins would have no effect.",
            f"Set reward.margin=true, or take {MARGIN} out of data.columns.",
        )

    def _require_ends(self, batch: Batch) -> None:
        if self._pad_id is None or batch.last_D is None:
            return
        if bool((batch.input_ids_BT.flatten()[batch.last_D] == self._pad_id).any()):
            raise DataError(
                f"an answer of {_named(batch)} ends in the token {self._pad_id}, which also pads rows",
                "A sequence classifier of transformers takes the last token that is no padding: the exported model "
                "would score another token than the one that is trained.",
                "Give padding a token of its own: hf: {special_tokens: {pad_token: ...}} with a token that ends no "
                "answer, or hf: {new_tokens: [{text: <|pad|>, special: true}], special_tokens: {pad_token: <|pad|>}}.",
            )


def _documents(batch: Batch) -> int:
    return 0 if batch.last_D is None else int(batch.last_D.shape[0])


def _named(batch: Batch) -> str:
    return f"row {batch.rows[0]} and those with it"


def _require_pairs(batch: Batch) -> None:
    """Raise unless every row is a chosen and a rejected answer; the batch is on the host."""
    signs_D = batch.sign_D
    if signs_D is None or len(signs_D) % ANSWERS or not bool((signs_D[::2] == 1).all() & (signs_D[1::2] == -1).all()):
        seen = "no signs" if signs_D is None else f"signs {signs_D.tolist()[:8]}"
        raise DataError(
            f"reward needs pairs of a chosen and a rejected answer; {_named(batch)} have {seen}",
            "It learns from which of two answers was preferred.",
            "Use a format of preferences in data.train, such as format: preference.",
        )


def _metrics(rewards_D: Tensor) -> tuple[Term, ...]:
    """What is logged, under TRL's names; nothing for no pair."""
    documents = float(rewards_D.shape[0])
    if not documents:
        return ()
    difference_P = torch.sub(*rewards_D.view(-1, ANSWERS).unbind(1))
    return (
        Term(name="accuracy", total=(difference_P > 0).float().sum(), count=documents / ANSWERS),
        Term(name="margin", total=difference_P.sum(), count=documents / ANSWERS),
        Term(name="mean_reward", total=rewards_D.sum(), count=documents),
        Term(name="min_reward", total=rewards_D.min(), count=1.0),
        Term(name="max_reward", total=rewards_D.max(), count=1.0),
    )
