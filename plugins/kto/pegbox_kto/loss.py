"""Kahneman-Tversky optimization as a term with a count (Ethayarajh et al. 2024, arXiv:2402.01306).

    total = sum over documents of weight(sign) * loss(log-ratio, sign, kl)        count = number of documents

What belongs to the whole step comes with each batch (`batches.py`): the divergence, without a gradient, and how many
answers are wanted and unwanted. So the loss itself looks at one document at a time, and no split changes it.
A preference is two documents, each with its sign: it counts as two answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from pegbox.errors import DataError, PluginError
from pegbox.types import LossOutput, Need, Outputs, Term

from pegbox_kto.batches import ANSWERS, KL
from pegbox_kto.config import REFERENCE, KtoConfig
from pegbox_kto.losses import apo_zero_losses, kto_losses

if TYPE_CHECKING:
    from pegbox.rows import Batch
    from torch import Tensor

TERM = "kto"
NAMED_ROWS = 8


class KtoLoss:
    """One term, `kto`, over documents."""

    needs: frozenset[Need] = frozenset({"logps"})
    scope: Literal["token", "batch"] = "token"

    def __init__(self, config: KtoConfig) -> None:
        self.config = config
        self.extras = frozenset({REFERENCE, KL} if config.loss == "kto" else {REFERENCE})

    def counts(self, batch: Batch) -> Mapping[str, float]:
        """The number of documents.

        Raises:
            DataError: a document is neither wanted nor unwanted, or has no trained token.
        """
        return {TERM: float(_count_answers(batch))}

    def __call__(self, batch: Batch, outputs: Outputs) -> LossOutput:
        """The term of one micro-batch; `outputs.logps_N` follows `batch.trained_N`."""
        assert outputs.logps_N is not None, "the loop provides every need"
        config, logps_D = self.config, _sums_by_document(outputs.logps_N, batch)
        ratios_D = logps_D - _sums_by_document(self._extra(batch, REFERENCE), batch)
        signs_D = ratios_D.new_zeros(0) if batch.sign_D is None else batch.sign_D.float()
        if config.loss == "kto":
            losses_D = kto_losses(ratios_D, signs_D, self._extra(batch, KL), config.beta)
        else:
            losses_D = apo_zero_losses(ratios_D, signs_D, config.beta)
        weights_D = torch.where(signs_D > 0, config.desirable_weight, config.undesirable_weight)
        term = Term(name=TERM, total=(weights_D * losses_D).sum(), count=float(len(losses_D)))
        return LossOutput(terms=(term,), metrics=self._figures(batch, ratios_D.detach(), logps_D.detach(), signs_D))

    def _extra(self, batch: Batch, name: str) -> Tensor:
        if name not in batch.extra:
            raise PluginError(
                f"a batch came without {name}",
                "A plugin that is listed after those that attach it made batches of its own.",
                "List the plugins in the order trainer, reference, kto.",
            )
        return batch.extra[name].value

    def _figures(self, batch: Batch, ratios_D: Tensor, logps_D: Tensor, signs_D: Tensor) -> tuple[Term, ...]:
        """What is logged, under the names of the field."""
        rewards_D, documents = self.config.beta * ratios_D, float(len(ratios_D))
        figures = []
        for side, of_D in (("chosen", (signs_D > 0).float()), ("rejected", (signs_D < 0).float())):
            figures.append(Term(name=f"rewards/{side}", total=(of_D * rewards_D).sum(), count=of_D.sum()))
            figures.append(Term(name=f"logps/{side}", total=(of_D * logps_D).sum(), count=of_D.sum()))
        figures.append(Term(name="share/chosen", total=(signs_D > 0).float().sum(), count=documents))
        if ANSWERS in batch.extra:
            wanted, unwanted = batch.extra[ANSWERS].value.float()
            share = documents / (wanted + unwanted) * (wanted * unwanted > 0)
            each_D = torch.where(signs_D > 0, 1 / wanted.clamp(min=1), -1 / unwanted.clamp(min=1))
            figures.append(Term(name="rewards/margins", total=(each_D * rewards_D).sum() * (share > 0), count=share))
        if self.config.loss == "kto":
            figures.append(Term(name="kl", total=documents * self._extra(batch, KL), count=documents))
        return tuple(figures)


def _sums_by_document(values_N: Tensor, batch: Batch) -> Tensor:
    """The sum over the trained tokens of each document, float32 of length D; it hangs on the graph of `values_N`."""
    assert batch.document_N is not None, "batches name the documents of their tokens"
    assert batch.last_D is not None, "batches name the ends of their documents"
    if batch.sign_D is None and len(batch.last_D):
        raise _unsigned(batch, "do not say which answers are wanted")
    values_N = values_N.float()
    return values_N.new_zeros(len(batch.last_D)).index_add(0, batch.document_N, values_N)


def _count_answers(batch: Batch) -> int:
    """D, of a batch on the host."""
    assert batch.document_N is not None, "batches name the documents of their tokens"
    assert batch.last_D is not None, "batches name the ends of their documents"
    documents = len(batch.last_D)
    if documents == 0:
        return 0
    if batch.sign_D is None:
        raise _unsigned(batch, "do not say which answers are wanted")
    if bool((batch.sign_D == 0).any()):
        raise _unsigned(batch, f"have documents with the signs {batch.sign_D.tolist()[:NAMED_ROWS]}")
    empty = set(range(documents)) - set(batch.document_N.tolist())
    if empty:
        where = f"row {batch.rows[min(empty)]}" if len(batch.rows) == documents else f"one of {_named(batch)}"
        raise DataError(
            f"an answer of {where} of the data has no trained token",
            "An answer without tokens is as likely under any model: there is nothing to learn from it.",
            "Remove the row, or let the data section drop rows that are too long instead of cutting them.",
        )
    return documents


def _unsigned(batch: Batch, seen: str) -> DataError:
    return DataError(
        f"{_named(batch)} of the data {seen}",
        "This loss learns from answers that are wanted (+1) or unwanted (-1).",
        "Name a format of unpaired answers, or of preferences, in the data section.",
    )


def _named(batch: Batch) -> str:
    more = len(batch.rows) - NAMED_ROWS
    return f"rows {', '.join(map(str, batch.rows[:NAMED_ROWS]))}" + (f" and {more} more" if more > 0 else "")
