"""The rows of each expert brought together by a counting sort, in three launches, without asking the device anything.

One: each block of choices counts its experts. Two: one program turns the counts into where each block's rows of each
expert begin. Three: each choice goes to the beginning of its block and expert, plus the number of equal experts before
it in the block. Nothing races, so the order is stable and the same each time.

Bytes: an index is read twice and two int32 written, N (16 + 8) in all, 0.8 MB at 32,768 rows: launches cost more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pegbox_kernels.dispatch import on_device_of
from pegbox_kernels.experts.tiles import padded_experts


class Launch(NamedTuple):
    """Choices of one block, counts that the scan holds at once (a power of two), warps of either."""

    choices: int = 128
    counts: int = 4096
    warps: int = 4
    scan_warps: int = 16


@triton.jit
def count_kernel(chosen, counts, rows, experts, CHOICES: tl.constexpr, EXPERTS: tl.constexpr):
    block = tl.program_id(0)
    i = block * CHOICES + tl.arange(0, CHOICES)
    expert = tl.load(chosen + i, mask=i < rows, other=-1).to(tl.int32)
    e = tl.arange(0, EXPERTS)
    found = tl.sum((expert[:, None] == e[None, :]).to(tl.int32), 0)
    tl.store(counts + block * experts + e, found, mask=e < experts)


@triton.jit
def scan_kernel(counts, offsets, blocks, experts, BLOCKS: tl.constexpr, EXPERTS: tl.constexpr):
    """Counts (blocks, experts) become beginnings, in place; `offsets` (experts,) the ends of each expert's rows."""
    e = tl.arange(0, EXPERTS)
    b = tl.arange(0, BLOCKS)
    total = tl.zeros([EXPERTS], tl.int32)
    for first in range(0, blocks, BLOCKS):
        mask = (first + b < blocks)[:, None] & (e < experts)[None, :]
        total += tl.sum(tl.load(counts + (first + b)[:, None] * experts + e[None, :], mask=mask, other=0), 0)
    end = tl.cumsum(total, 0)
    tl.store(offsets + e, end, mask=e < experts)
    begin = end - total
    for first in range(0, blocks, BLOCKS):
        mask = (first + b < blocks)[:, None] & (e < experts)[None, :]
        place = counts + (first + b)[:, None] * experts + e[None, :]
        found = tl.load(place, mask=mask, other=0)
        tl.store(place, begin[None, :] + tl.cumsum(found, 0) - found, mask=mask)
        begin += tl.sum(found, 0)


@triton.jit
def place_kernel(chosen, begins, order, inverse, rows, experts, CHOICES: tl.constexpr, EXPERTS: tl.constexpr):
    block = tl.program_id(0)
    i = block * CHOICES + tl.arange(0, CHOICES)
    expert = tl.load(chosen + i, mask=i < rows, other=-1).to(tl.int32)
    e = tl.arange(0, EXPERTS)
    mine = (expert[:, None] == e[None, :]).to(tl.int32)
    before = tl.sum((tl.cumsum(mine, 0) - mine) * mine, 1)
    known = (expert >= 0) & (expert < experts)
    begin = tl.load(begins + block * experts + expert, mask=known, other=0)
    tl.store(inverse + i, tl.where(known, begin + before, -1), mask=i < rows)
    tl.store(order + begin + before, i, mask=known)


def sort_by_expert(chosen: Tensor, experts: int, launch: Launch | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """order, inverse (N,) and offsets (experts,), int32, of the flattened choices; N below 2^31."""
    launch = launch or Launch()
    chosen = chosen.contiguous()
    rows, padded = chosen.numel(), padded_experts(experts)
    blocks = triton.cdiv(rows, launch.choices)
    order, inverse = (torch.empty(rows, dtype=torch.int32, device=chosen.device) for _ in range(2))
    offsets = torch.empty(experts, dtype=torch.int32, device=chosen.device)
    counts = torch.empty((blocks, experts), dtype=torch.int32, device=chosen.device)
    with on_device_of(chosen):
        tile = {"CHOICES": launch.choices, "EXPERTS": padded, "num_warps": launch.warps}
        if blocks:
            count_kernel[(blocks,)](chosen, counts, rows, experts, **tile)
        scanned = max(1, min(launch.counts // padded, triton.next_power_of_2(max(1, blocks))))
        scan_kernel[(1,)](counts, offsets, blocks, experts, BLOCKS=scanned, EXPERTS=padded, num_warps=launch.scan_warps)
        if blocks:
            place_kernel[(blocks,)](chosen, counts, order, inverse, rows, experts, **tile)
    return order, inverse, offsets
