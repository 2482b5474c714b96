"""Batches of documents, padded or packed, and what a model makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pegbox.context import Context
from pegbox.patches import PatchLog
from pegbox.rows import Batch
from pegbox.types import Model


@dataclass
class Run:
    """A run that is composed, its model, and the patches on it."""

    ctx: Context
    model: Model
    log: PatchLog


def batch_of(rows: Sequence[Sequence[int]], seed: int = 3) -> Batch:
    """Rows of documents of these lengths, packed if a row has several; padded with zeros on the right otherwise."""
    random = torch.Generator().manual_seed(seed)
    documents = [[torch.randint(3, 250, (length,), generator=random) for length in row] for row in rows]
    packed = any(len(row) > 1 for row in rows)
    width = max(sum(row) for row in rows)
    ids_BT, targets_BT = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    positions_BT, mask_BT = torch.zeros_like(ids_BT), torch.zeros_like(ids_BT)
    for index, row in enumerate(documents):
        at = 0
        for ids in row:
            place = slice(at, at + len(ids))
            ids_BT[index, place], positions_BT[index, place] = ids, torch.arange(len(ids))
            targets_BT[index, at : at + len(ids) - 1] = ids[1:]
            mask_BT[index, place] = 1
            at += len(ids)
    lengths = [length for row in rows for length in row]
    return Batch(
        input_ids_BT=ids_BT,
        targets_BT=targets_BT,
        trained_N=(targets_BT.flatten() != -100).nonzero().flatten(),
        attention_mask_BT=None if packed else mask_BT,
        position_ids_BT=positions_BT if packed else None,
        cu_seqlens_S=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) if packed else None,
        max_seqlen=max(lengths) if packed else None,
    )


def outcome(model: Model, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probabilities, and the gradients of a weighted sum of them by parameter."""
    model.module.zero_grad()
    logps_N = model.compute(model.module, batch, frozenset({"logps"})).logps_N
    assert logps_N is not None
    (logps_N * torch.linspace(0.5, 1.5, len(logps_N), device=logps_N.device)).sum().backward()
    named = model.module.named_parameters()
    return logps_N.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}
