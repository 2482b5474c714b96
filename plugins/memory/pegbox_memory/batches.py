"""Micro-batches without data, as a loss takes them: plain rows, answers with signs, or pairs of answers.

B  rows    T  tokens of a row    N  trained tokens    S  document borders    D  documents
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pegbox.errors import PegboxError, RunError
from pegbox.rows import Batch, Extra
from pegbox.types import Loss

REFERENCE, ADVANTAGES = "reference_logps", "advantages"
MADE = frozenset({REFERENCE, ADVANTAGES})
"""What a loss may need beside tokens: a number for each trained token, and one for each document."""
Kind = Literal["plain", "signed", "pairs"]


def batch_for(
    loss: Loss, kind: Kind, rows: int, tokens: int, device: torch.device, *, packed: bool, prompt: int = 0
) -> Batch:
    """Rows of one length for a loss; a row of pairs is two answers of that length, or one bin of both if `packed`.

    Args:
        prompt: tokens at the beginning of a row that are not trained; of plain rows that are not packed.

    Raises:
        RunError: the loss needs a tensor that nothing here makes.
    """
    count = 2 * rows if kind == "pairs" and not packed else rows
    batch = batch_of(count, tokens, device, packed=packed, prompt=prompt)
    unknown = sorted(frozenset(getattr(loss, "extras", ())) - MADE)
    if unknown:
        raise RunError(
            f"the memory of this run cannot be estimated: its loss needs {', '.join(unknown)}",
            "A plugin makes these while it trains.",
            "Estimate the run with the plugin sft in its place: the model and its optimizer are the same.",
        )
    return with_extras(loss, batch if kind == "plain" else signed(batch))


def with_extras(loss: Loss, batch: Batch) -> Batch:
    """The batch with what a loss needs beside tokens."""
    assert batch.last_D is not None, "it was made here"
    device, needed = batch.trained_N.device, frozenset(getattr(loss, "extras", ()))
    values = {
        REFERENCE: Extra(value=torch.zeros(batch.trained_tokens, device=device), layout="trained"),
        ADVANTAGES: Extra(value=torch.zeros(len(batch.last_D), device=device), layout="document"),
    }
    return replace(batch, extra={name: value for name, value in values.items() if name in needed})


def kind_of(loss: Loss) -> Kind:
    """What rows a loss takes, found by asking for its counts of small batches; not for a mode without values.

    Raises:
        PegboxError: it takes none of them; the error of the last.
    """
    cpu = torch.device("cpu")
    one, two = (with_extras(loss, batch_of(rows, 4, cpu, packed=False)) for rows in (1, 2))
    for kind, batch in (("plain", two), ("signed", signed(one)), ("pairs", signed(two))):
        try:
            loss.counts(batch)
        except PegboxError as error:
            last = error
        else:
            return kind  # type: ignore[return-value]
    raise last


def signed(batch: Batch) -> Batch:
    """The same batch, whose documents are wanted and unwanted answers by turns."""
    assert batch.last_D is not None, "it was made here"
    even_D = torch.arange(batch.last_D.shape[0], device=batch.last_D.device) % 2 == 0
    return replace(batch, sign_D=torch.where(even_D, 1, -1).to(torch.int8))


def batch_of(rows: int, tokens: int, device: torch.device, *, packed: bool, prompt: int = 0) -> Batch:
    """Rows of one length, every token trained but a prompt and the last of each; if `packed`, two documents in each."""
    trained_N = torch.arange(rows * tokens, device=device).view(rows, tokens)[:, max(0, prompt - 1) : -1].flatten()
    row_N, last_B = trained_N // tokens, torch.arange(1, rows + 1, device=device) * tokens - 1
    plain = Batch(
        input_ids_BT=torch.zeros(rows, tokens, dtype=torch.long, device=device),
        targets_BT=torch.zeros(rows, tokens, dtype=torch.long, device=device),
        trained_N=trained_N,
        document_N=row_N,
        last_D=last_B,
        rows=tuple(range(rows)),
    )
    if not packed or tokens < 2:
        return plain
    first = tokens // 2
    positions_T = torch.cat([torch.arange(first, device=device), torch.arange(tokens - first, device=device)])
    borders = [0, *(row * tokens + end for row in range(rows) for end in (first, tokens))]
    second_N = (trained_N % tokens >= first).long()
    return replace(
        plain,
        position_ids_BT=positions_T.repeat(rows, 1),
        cu_seqlens_S=torch.tensor(borders, dtype=torch.int32, device=device),
        max_seqlen=tokens - first,
        document_N=2 * row_N + second_N,
        last_D=torch.stack((last_B - (tokens - first), last_B), -1).flatten(),
    )
