"""Sums over the rows of an expert, cut into shares that are written apart and added in one order: no atomics.

Here is what all of them need: how many shares, their addition, and router weights in the order of the sorted rows.

Shapes: S shares, N sorted rows, T tokens, K choices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pegbox_kernels.dispatch import on_device_of
from pegbox_kernels.experts.routing import Routing
from pegbox_kernels.experts.tiles import rounded

BLOCK = 1024


def shares(experts: int) -> int:
    """In how many parts the rows of an expert are summed: many programs with few experts, few sums with many."""
    return max(1, min(4, 64 // experts))


@triton.jit
def add_shares_kernel(partial, out, count, SHARES: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    total = tl.load(partial + i, mask=mask, other=0.0)
    for share in tl.static_range(1, SHARES):
        total += tl.load(partial + share * tl.cast(count, tl.int64) + i, mask=mask, other=0.0)
    tl.store(out + i, rounded(total, out.dtype.element_ty), mask=mask)


def added(partial: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The sum of the shares (S, ...), contiguous, fp32, always in the same order, rounded to `dtype` once."""
    if partial is None:
        return None
    if partial.shape[0] == 1 and dtype == torch.float32:
        return partial[0]
    out = torch.empty(partial.shape[1:], dtype=dtype, device=partial.device)
    if out.numel():
        with on_device_of(out):
            add_shares_kernel[(triton.cdiv(out.numel(), BLOCK),)](
                partial, out, out.numel(), SHARES=partial.shape[0], BLOCK=BLOCK
            )
    return out


@triton.jit
def sort_weights_kernel(weights, order, offsets, out, rows, experts, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < tl.load(offsets + experts - 1)
    choice = tl.load(order + row, mask=inside, other=0)
    weight = tl.load(weights + choice, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row, weight, mask=row < rows)


def sorted_weights(weights: Tensor, routing: Routing) -> Tensor:
    """Router weights (T, K), contiguous -> (N,) fp32 of the sorted rows; 0 for rows of no expert."""
    rows = routing.order_N.numel()
    out = torch.empty(rows, dtype=torch.float32, device=weights.device)
    if rows:
        with on_device_of(out):
            sort_weights_kernel[(triton.cdiv(rows, BLOCK),)](
                weights, routing.order_N, routing.offsets_E, out, rows, routing.offsets_E.numel(), BLOCK=BLOCK
            )
    return out
