"""What lies between the grouped products: gather and project, add a rank, combine, sums over the rows of an expert.

All are bound by memory; README.md counts their bytes.

Shapes: T tokens, K choices, N = T K sorted rows, E experts, R rank. A row block is ROWS rows of one expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pegbox_kernels.dispatch import on_device_of
from pegbox_kernels.experts.routing import Routing
from pegbox_kernels.experts.sums import added, shares
from pegbox_kernels.experts.tiles import (
    blocks_at_most,
    bounds,
    locate,
    padded_experts,
    padded_rank,
    precision,
    product,
    rounded,
)


class Launch(NamedTuple):
    """Rows and columns of a tile, warps, stages of the pipeline; registers of a thread at most (0: as it takes)."""

    rows: int
    columns: int
    warps: int = 4
    stages: int = 3
    registers: int = 0

    @property
    def options(self) -> dict[str, int]:
        """What Triton is told of it; AMD's compiler knows no bound of registers."""
        bound = {"maxnreg": self.registers} if self.registers else {}
        return {"num_warps": self.warps, "num_stages": self.stages, **bound}


LAUNCHES = {
    "project": Launch(32, 128, warps=4, stages=3),
    "add": Launch(64, 128, warps=4, stages=1),
    "combine": Launch(1, 1024, warps=4),
    "gram": Launch(64, 128, warps=4, stages=3),
    "activate": Launch(64, 32, warps=4, stages=3),
    "activate_backward": Launch(32, 64, warps=4, stages=3),
}
"""By kernel, for ranks up to 32; `launch_for` fits them."""


def launch_for(kernel: str, rank: int = 16, itemsize: int = 2) -> Launch:
    """The default of a kernel; smaller tiles for large ranks and for fp32, whose sums stay in registers."""
    launch = LAUNCHES[kernel]
    padded = padded_rank(rank)
    if padded > 32:
        launch = launch._replace(columns=max(16, launch.columns * 32 // padded))
    if kernel == "activate_backward" and (padded > 32 or itemsize == 4):
        launch = launch._replace(rows=16, columns=min(launch.columns, 32))
    return launch


@triton.jit
def project_kernel(
    x,
    order,
    factor,
    bias,
    offsets,
    projected,
    gathered,
    dots,
    experts,
    size,
    rank,
    top_k,
    x_stride,
    factor_expert,
    factor_rank,
    factor_column,
    scale,
    GATHER: tl.constexpr,
    PROJECT: tl.constexpr,
    WRITE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    expert, first, end = locate(offsets, tl.program_id(0), experts, ROWS, EXPERTS)
    if expert >= experts:
        return
    row = first + tl.arange(0, ROWS)
    inside = row < end
    source = tl.load(order + row, mask=inside, other=0) // top_k if GATHER else row
    source = source.to(tl.int64) * x_stride
    r = tl.arange(0, RANK)
    acc = tl.zeros([ROWS, RANK], tl.float32)
    # Eight columns lie in one thread: only the last sum passes between threads.
    dot = tl.zeros([ROWS, COLUMNS // 8], tl.float32)
    for begin in range(0, size, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (column < size)[None, :]
        tile = tl.load(x + source[:, None] + column[None, :], mask=mask, other=0.0)
        if WRITE:
            tl.store(gathered + row.to(tl.int64)[:, None] * size + column[None, :], tile, mask=mask)
        if PROJECT:
            at = factor + expert.to(tl.int64) * factor_expert
            at += column[:, None] * factor_column + r[None, :] * factor_rank
            f = tl.load(at, mask=(column < size)[:, None] & (r < rank)[None, :], other=0.0)
            acc = product(tile, f, acc, PRECISION)
        if DOT:
            b = tl.load(bias + expert.to(tl.int64) * size + column, mask=column < size, other=0.0)
            part = tile.to(tl.float32) * b.to(tl.float32)[None, :]
            dot += tl.sum(tl.reshape(part, [ROWS, COLUMNS // 8, 8]), 2)
    if PROJECT:
        place = projected + row.to(tl.int64)[:, None] * rank + r[None, :]
        value = rounded(acc * scale, projected.dtype.element_ty)
        tl.store(place, value, mask=inside[:, None] & (r < rank)[None, :])
    if DOT:
        tl.store(dots + row, tl.sum(dot, 1), mask=inside)


def project(
    x: Tensor,
    routing: Routing,
    *,
    top_k: int | None = None,
    factor: Tensor | None = None,
    scale: float = 1.0,
    write: bool = False,
    bias: Tensor | None = None,
    launch: Launch | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Rows of `x`, gathered, times a factor of their expert.

    Args:
        x: (T, C) if `top_k` (rows are gathered), else (N, C) sorted; rows may be strided.
        factor: (E, R, C), any strides; the product is scaled by `scale` before it is rounded.
        write: also give the gathered rows.
        bias: (E, C), contiguous; also give the product of each row with that of its expert.

    Returns:
        (N, R) or None, gathered (N, C) or None, (N,) fp32 or None.
    """
    rows, experts = routing.order_N.numel(), routing.offsets_E.numel()
    size, rank = x.shape[1], 1 if factor is None else factor.shape[1]
    projected = None if factor is None else x.new_empty((rows, rank))
    gathered = x.new_empty((rows, size)) if write else None
    dots = None if bias is None else x.new_empty(rows, dtype=torch.float32)
    launch = launch or launch_for("project", rank)
    blocks = blocks_at_most(rows, experts, launch.rows)
    if blocks:
        with on_device_of(x):
            project_kernel[(blocks,)](
                x,
                routing.order_N,
                factor,
                bias,
                routing.offsets_E,
                projected,
                gathered,
                dots,
                experts,
                size,
                rank,
                top_k or 1,
                x.stride(0),
                *((0, 0, 0) if factor is None else factor.stride()),
                scale,
                GATHER=top_k is not None,
                PROJECT=factor is not None,
                WRITE=write,
                DOT=bias is not None,
                PRECISION=precision(x),
                EXPERTS=padded_experts(experts),
                RANK=padded_rank(rank),
                ROWS=launch.rows,
                COLUMNS=launch.columns,
                **launch.options,
            )
    return projected, gathered, dots


@triton.jit
def add_kernel(
    y,
    projected,
    factor,
    offsets,
    experts,
    size,
    rank,
    factor_expert,
    factor_column,
    factor_rank,
    PRECISION: tl.constexpr,
    EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    expert, first, end = locate(offsets, tl.program_id(0), experts, ROWS, EXPERTS)
    if expert >= experts:
        return
    row = first + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, RANK)
    inside = row < end
    left = projected + row.to(tl.int64)[:, None] * rank + r[None, :]
    p = tl.load(left, mask=inside[:, None] & (r < rank)[None, :], other=0.0)
    right = factor + expert.to(tl.int64) * factor_expert + column[None, :] * factor_column + r[:, None] * factor_rank
    f = tl.load(right, mask=(column < size)[None, :] & (r < rank)[:, None], other=0.0)
    mask = inside[:, None] & (column < size)[None, :]
    place = y + row.to(tl.int64)[:, None] * size + column[None, :]
    total = product(p, f, tl.load(place, mask=mask, other=0.0).to(tl.float32), PRECISION)
    tl.store(place, rounded(total, y.dtype.element_ty), mask=mask)


def add_rank(y: Tensor, projected: Tensor, factor: Tensor, routing: Routing, launch: Launch | None = None) -> None:
    """y (N, C) += projected (N, R) times factor (E, C, R) transposed, each row with its expert's; in place."""
    experts = routing.offsets_E.numel()
    launch = launch or launch_for("add", factor.shape[2])
    blocks = blocks_at_most(y.shape[0], experts, launch.rows)
    if blocks:
        with on_device_of(y):
            add_kernel[(blocks, triton.cdiv(y.shape[1], launch.columns))](
                y,
                projected,
                factor,
                routing.offsets_E,
                experts,
                y.shape[1],
                factor.shape[2],
                *factor.stride(),
                PRECISION=precision(y),
                EXPERTS=padded_experts(experts),
                RANK=padded_rank(factor.shape[2]),
                ROWS=launch.rows,
                COLUMNS=launch.columns,
                **launch.options,
            )


@triton.jit
def combine_kernel(
    y,
    inverse,
    weights,
    bias,
    chosen,
    out,
    size,
    WEIGHTED: tl.constexpr,
    BIAS: tl.constexpr,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < size
    acc = tl.zeros([COLUMNS], tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(inverse + token * TOP_K + k).to(tl.int64)
        known = column < tl.where(row >= 0, size, 0)
        value = tl.load(y + row * size + column, mask=known, other=0.0).to(tl.float32)
        if BIAS:
            expert = tl.load(chosen + token * TOP_K + k).to(tl.int64)
            value += tl.load(bias + expert * size + column, mask=known, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + token * TOP_K + k).to(tl.float32)
        acc += value
    tl.store(out + token * size + column, rounded(acc, out.dtype.element_ty), mask=mask)


def combine(
    y: Tensor,
    routing: Routing,
    top_k: int,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
    chosen: Tensor | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """(N, C) sorted rows -> (T, C): the sum of a token's rows, each plus its expert's bias, times its weight."""
    tokens, size = routing.inverse_N.numel() // top_k, y.shape[1]
    out = y.new_empty((tokens, size))
    launch = launch or launch_for("combine")
    if tokens:
        with on_device_of(y):
            combine_kernel[(tokens, triton.cdiv(size, launch.columns))](
                y,
                routing.inverse_N,
                weights,
                bias,
                chosen,
                out,
                size,
                WEIGHTED=weights is not None,
                BIAS=bias is not None,
                TOP_K=top_k,
                COLUMNS=launch.columns,
                num_warps=launch.warps,
            )
    return out


@triton.jit
def gram_kernel(
    x,
    projected,
    weights,
    order,
    offsets,
    grams,
    sums,
    experts,
    size,
    rank,
    top_k,
    x_stride,
    gram_rank,
    gram_column,
    GATHER: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PROJECTED: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Share s of expert e: rows [s, s + 1) of the expert's, cut evenly; grams (S, E, R, C) or (S, E, C, R)."""
    expert = tl.program_id(1).to(tl.int64)
    share = tl.program_id(2)
    begin, end = bounds(offsets, expert)
    part = tl.cdiv(tl.cdiv(end - begin, tl.num_programs(2)), ROWS) * ROWS
    begin += share * part
    end = tl.minimum(end, begin + part)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, RANK)
    acc = tl.zeros([RANK, COLUMNS], tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for first in tl.range(begin, end, ROWS, num_stages=STAGES):
        inside = first + tl.arange(0, ROWS) < end
        # Rows past the end read its last one, times zero.
        row = tl.minimum(first + tl.arange(0, ROWS), end - 1)
        source = (tl.load(order + row) // top_k if GATHER else row).to(tl.int64) * x_stride
        at = x + source[:, None] + column[None, :]
        tile = tl.load(at) if EVEN else tl.load(at, mask=(column < size)[None, :], other=0.0)
        weight = tl.where(inside, tl.load(weights + row) if WEIGHTED else 1.0, 0.0)
        if PROJECTED:
            at = projected + row.to(tl.int64)[None, :] * rank + r[:, None]
            p = tl.load(at, mask=(r < rank)[:, None], other=0.0)
            p = rounded(p.to(tl.float32) * weight[None, :], p.dtype)
            acc = product(p, tile, acc, PRECISION)
        if SUM:
            total += tl.sum(tile.to(tl.float32) * weight[:, None], 0)
    place = (share.to(tl.int64) * experts + expert) * size
    if PROJECTED:
        inside = (r < rank)[:, None] & (column < size)[None, :]
        at = grams + place * rank + r.to(tl.int64)[:, None] * gram_rank + column.to(tl.int64)[None, :] * gram_column
        tl.store(at, acc, mask=inside)
    if SUM:
        tl.store(sums + place + column, total, mask=column < size)


def gram(
    x: Tensor,
    routing: Routing,
    *,
    top_k: int | None = None,
    projected: Tensor | None = None,
    weights: Tensor | None = None,
    summed: bool = False,
    transposed: bool = False,
    launch: Launch | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Sums over the rows of each expert: of projected (N, R), transposed, times x, and of x itself.

    Args:
        x: (T, C) if `top_k` (rows are gathered), else (N, C) sorted.
        weights: (N,) sorted router weights, fp32, which multiply the rows.
        summed: also sum the rows of x.
        transposed: (E, C, R) for (E, R, C).

    Returns:
        (E, R, C) in the dtype of x and (E, C) in fp32, or None; zero for an expert without rows.
    """
    experts, size = routing.offsets_E.numel(), x.shape[1]
    rank, parts = 1 if projected is None else projected.shape[1], shares(experts)
    shape = (parts, experts, size, rank) if transposed else (parts, experts, rank, size)
    grams = None if projected is None else x.new_empty(shape, dtype=torch.float32)
    sums = x.new_empty((parts, experts, size), dtype=torch.float32) if summed else None
    launch = launch or launch_for("gram", rank)
    with on_device_of(x):
        gram_kernel[(triton.cdiv(size, launch.columns), experts, parts)](
            x,
            projected,
            weights,
            routing.order_N,
            routing.offsets_E,
            grams,
            sums,
            experts,
            size,
            rank,
            top_k or 1,
            x.stride(0),
            *((1, rank) if transposed else (size, 1)),
            GATHER=top_k is not None,
            WEIGHTED=weights is not None,
            PROJECTED=projected is not None,
            SUM=summed,
            PRECISION=precision(x),
            EVEN=size % launch.columns == 0,
            RANK=padded_rank(rank),
            ROWS=launch.rows,
            COLUMNS=launch.columns,
            STAGES=launch.stages,
            **launch.options,
        )
    return added(grams, x.dtype), added(sums, torch.float32)
