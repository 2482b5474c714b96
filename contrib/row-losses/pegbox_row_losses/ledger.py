"""Sums per row, kept on the device: adding to them never waits for it.

    B  rows of a micro-batch      T  tokens of a row (padded)      N  trained tokens of a micro-batch
    R  rows recorded so far (as many as the largest index seen asks for)

`trained_N` holds flat indices b * T + t, so `trained_N // T` is the row of each trained token. Sums are float32: a row
has a few thousand tokens at most, and counts are exact up to 2^24.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pegbox.rows import Batch
    from torch import Tensor

SUMS = ("loss", "tokens", "last_loss", "last_tokens")
COUNTS = ("visits", "last_call")


@dataclass(frozen=True)
class RowLoss:
    """What is known of one row; losses are means over its trained tokens, in nats."""

    row: int
    loss: float
    last_loss: float
    tokens: int
    visits: int


class Ledger:
    """The losses of rows, by dataset index."""

    def __init__(self) -> None:
        self._sums_R4 = torch.zeros(0, len(SUMS))
        self._counts_R2 = torch.zeros(0, len(COUNTS), dtype=torch.int64)
        self._calls = 0

    @torch.no_grad()
    def add(self, batch: Batch, logps_N: Tensor) -> None:
        """Add what one micro-batch says about its rows; a row without a trained token is not visited."""
        self._calls += 1
        if not batch.rows or batch.trained_tokens == 0:
            return
        self._make_room(max(batch.rows) + 1, logps_N.device)
        row_N = batch.trained_N // batch.input_ids_BT.shape[1]
        seen_N2 = torch.stack((-logps_N.float(), torch.ones_like(logps_N, dtype=torch.float32)), -1)
        seen_B2 = seen_N2.new_zeros(len(batch.rows), 2).index_add_(0, row_N, seen_N2)
        visited_B = seen_B2[:, 1] > 0

        index_B = torch.tensor(batch.rows).to(logps_N.device, non_blocking=True)
        self._sums_R4[:, :2].index_add_(0, index_B, seen_B2)
        self._counts_R2[:, 0].index_add_(0, index_B, visited_B.long())
        before_B2, call_B = self._sums_R4[index_B, 2:], self._counts_R2[index_B, 1]
        self._sums_R4[:, 2:].index_copy_(0, index_B, torch.where(visited_B[:, None], seen_B2, before_B2))
        self._counts_R2[:, 1].index_copy_(0, index_B, torch.where(visited_B, self._calls, call_B))

    def _make_room(self, rows: int, device: torch.device) -> None:
        missing = rows - self._sums_R4.shape[0]
        if missing > 0:
            # Half as much again, so that rows in random order make it grow a few times and not each time.
            missing = max(missing, self._sums_R4.shape[0] // 2)
        if missing > 0 or self._sums_R4.device != device:
            sums, counts = self._sums_R4.to(device), self._counts_R2.to(device)
            self._sums_R4 = torch.cat((sums, sums.new_zeros(max(missing, 0), len(SUMS))))
            self._counts_R2 = torch.cat((counts, counts.new_zeros(max(missing, 0), len(COUNTS))))

    def state_dict(self) -> dict[str, object]:
        """Plain tensors on the CPU; waits for the device."""
        return {"sums": self._sums_R4.cpu().clone(), "counts": self._counts_R2.cpu().clone(), "calls": self._calls}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._sums_R4, self._counts_R2 = state_dict["sums"].clone(), state_dict["counts"].clone()
        self._calls = state_dict["calls"]


def merge(states: Iterable[Mapping[str, Any]]) -> list[RowLoss]:
    """The rows of all ranks, in the order of the dataset. A row's last visit is the one with the highest call.

    Ranks make the same number of calls per step, so calls compare between them.
    """
    found: dict[int, tuple[list[float], list[int]]] = {}
    for state in states:
        visited = state["counts"][:, 0].nonzero().flatten()
        rows, sums, counts = visited.tolist(), state["sums"][visited].tolist(), state["counts"][visited].tolist()
        for row, of_sums, of_counts in zip(rows, sums, counts, strict=True):
            found[row] = _combined(found[row], (of_sums, of_counts)) if row in found else (of_sums, of_counts)
    return [
        RowLoss(
            row=row,
            loss=total / tokens,
            last_loss=last / last_tokens,
            tokens=int(last_tokens),
            visits=visits,
        )
        for row, ((total, tokens, last, last_tokens), (visits, _)) in sorted(found.items())
    ]


def _combined(
    one: tuple[list[float], list[int]], other: tuple[list[float], list[int]]
) -> tuple[list[float], list[int]]:
    """The sums of one row on two ranks."""
    (loss, tokens, *_), (visits, _) = one
    (more_loss, more_tokens, *_), (more_visits, _) = other
    (_, _, *last), (_, call) = max(one, other, key=lambda part: part[1][1])
    return [loss + more_loss, tokens + more_tokens, *last], [visits + more_visits, call]
