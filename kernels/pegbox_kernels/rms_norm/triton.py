"""The Triton kernels: each row is read once and held in registers; several short rows share a program.

Forward reads x (and residual, gate) and writes y (and the sum). Backward reads the gradient and the normalized rows'
input again and writes one gradient per input; n is made anew from the saved reciprocal root, 4 bytes per row.

The gradient of the weight is a sum over all rows. Each program keeps one in registers for the rows it takes (every
P-th block of rows, P programs in all) and writes it once; P partial sums of H numbers are added at the end. The order
is fixed by P, so the result is the same every time, and no atomic is needed. A frozen weight costs none of it: each
block of rows then has a program of its own.

A tile is (ROWS, BLOCK): BLOCK is the power of two that holds a row, and lanes beyond the row load nothing. Rows of x
need two strides at most (heads of a packed projection); the others are read by one, or copied. Addresses are 64-bit.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pegbox_kernels.dispatch import on_device_of, power_of_two, quotient
from pegbox_kernels.launching import repeatable
from pegbox_kernels.logprob.triton import INTERPRETED, rows_of

LARGEST = 16384
"""Largest row: what 32 warps hold in registers."""


class Launch(NamedTuple):
    """How a kernel is launched: rows of a tile, warps, and programs per multiprocessor where they are counted."""

    rows: int
    warps: int
    per_multiprocessor: int


FORWARD = {256: (2, 8), 1024: (4, 8), 2048: (4, 8), 4096: (8, 4), 8192: (16, 2), 16384: (16, 2)}
BACKWARD = {256: (4, 8), 1024: (4, 6), 2048: (4, 6), 4096: (8, 3), 8192: (16, 1), 16384: (32, 1)}
"""Warps and programs per multiprocessor, by the largest BLOCK that they are for."""
TILE = 2048
"""Numbers of a tile of short rows: two 16-byte loads for each thread of four warps in half precision."""


def default_launch(hidden: int, *, backward: bool = False) -> Launch:
    """Around sixteen numbers of each row in a thread's registers; short rows share a tile."""
    block = power_of_two(hidden)
    table = BACKWARD if backward else FORWARD
    warps, programs = table[min(size for size in table if size >= block)]
    return Launch(max(1, TILE // block), warps, programs)


@triton.jit
def _as(value, DTYPE: tl.constexpr):
    """In another dtype, to nearest even, as a GPU does by itself; the interpreter truncates bf16."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        value = tl.where(value != value, value, rounded)
    return value.to(DTYPE)


@triton.jit
def _starts(rows, inner, outer_stride, inner_stride, FLAT: tl.constexpr):
    """Where rows begin, in elements."""
    if FLAT:
        return rows * inner_stride
    return (rows // inner) * outer_stride + (rows % inner) * inner_stride


@triton.jit
def _factor(weight, cols, inside, OFFSET: tl.constexpr):
    return tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)[None, :] + OFFSET


@repeatable
@triton.jit(do_not_specialize=["count", "inner"])
def forward_kernel(
    x,
    weight,
    gate,
    residual,
    y,
    total,
    rstd,
    count,
    inner,
    outer_stride,
    inner_stride,
    gate_stride,
    residual_stride,
    eps,
    OFFSET: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    FLAT: tl.constexpr,
    WEIGHT: tl.constexpr,
    GATE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GEMMA: tl.constexpr,
    ROUND: tl.constexpr,
):
    """ROUND: the product with the weight is rounded to the dtype of x before the gate multiplies it."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    inside = (rows < count)[:, None] & (cols < HIDDEN)[None, :]
    place = rows[:, None] * HIDDEN + cols[None, :]
    starts = _starts(rows, inner, outer_stride, inner_stride, FLAT)
    h = tl.load(x + starts[:, None] + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        from_residual = residual + rows[:, None] * residual_stride + cols[None, :]
        h_rounded = _as(h + tl.load(from_residual, mask=inside, other=0.0).to(tl.float32), DTYPE)
        tl.store(total + place, h_rounded, mask=inside)
        h = h_rounded.to(tl.float32)
    r = 1.0 / tl.sqrt_rn(tl.sum(h * h, 1) / HIDDEN + eps)
    tl.store(rstd + rows, r, mask=rows < count)
    out = h * r[:, None]
    if not GEMMA:
        out = _as(out, DTYPE).to(tl.float32)
    if WEIGHT:
        out *= _factor(weight, cols, cols < HIDDEN, OFFSET)
    if GATE:
        if ROUND:
            out = _as(out, DTYPE).to(tl.float32)
        g = tl.load(gate + rows[:, None] * gate_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        out *= g * tl.sigmoid(g)
    tl.store(y + place, _as(out, y.dtype.element_ty), mask=inside)


@repeatable
@triton.jit(do_not_specialize=["count", "inner"])
def backward_kernel(
    grad_y,
    grad_total,
    h,
    weight,
    gate,
    rstd,
    grad_h,
    grad_gate,
    partials,
    count,
    inner,
    outer_stride,
    inner_stride,
    gate_stride,
    grad_stride,
    grad_total_stride,
    OFFSET: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    FLAT: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRAD_WEIGHT: tl.constexpr,
    GATE: tl.constexpr,
    GRAD_TOTAL: tl.constexpr,
    GEMMA: tl.constexpr,
):
    DTYPE: tl.constexpr = h.dtype.element_ty
    cols = tl.arange(0, BLOCK)
    if WEIGHT:
        factor = _factor(weight, cols, cols < HIDDEN, OFFSET)
    if GRAD_WEIGHT:
        summed = tl.zeros([ROWS, BLOCK], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(count, ROWS), tl.num_programs(0)):
        rows = tl.arange(0, ROWS).to(tl.int64) + block * ROWS
        inside = (rows < count)[:, None] & (cols < HIDDEN)[None, :]
        place = rows[:, None] * HIDDEN + cols[None, :]
        starts = _starts(rows, inner, outer_stride, inner_stride, FLAT)
        dz = tl.load(grad_y + rows[:, None] * grad_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        n = tl.load(h + starts[:, None] + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        r = tl.load(rstd + rows, mask=rows < count, other=0.0)
        n *= r[:, None]
        if GATE:
            g = tl.load(gate + rows[:, None] * gate_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
            s = tl.sigmoid(g)
            slope = s * (1.0 + g * (1.0 - s)) * dz
            slope *= n if GEMMA else _as(n, DTYPE).to(tl.float32)
            if WEIGHT:
                slope *= factor
            tl.store(grad_gate + place, _as(slope, grad_gate.dtype.element_ty), mask=inside)
            dz *= g * s
        if GRAD_WEIGHT:
            summed += dz * (n if GEMMA else _as(n, DTYPE).to(tl.float32))
        if WEIGHT:
            dz *= factor
        dh = (dz - n * (tl.sum(dz * n, 1) / HIDDEN)[:, None]) * r[:, None]
        if GRAD_TOTAL:
            from_total = grad_total + rows[:, None] * grad_total_stride + cols[None, :]
            dh += tl.load(from_total, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_h + place, _as(dh, DTYPE), mask=inside)
    if GRAD_WEIGHT:
        tl.store(partials + tl.program_id(0) * HIDDEN + cols, tl.sum(summed, 0), mask=cols < HIDDEN)


def forward(
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    eps: float,
    offset: float,
    gemma: bool,
    out_dtype: torch.dtype,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the sum (no elements without a residual), and the reciprocal roots (...), fp32."""
    hidden = x.shape[-1]
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    total = torch.empty(x.shape if residual is not None else 0, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    x, geometry, flat = _two_strides(x)
    gate, gate_stride = _one_stride(gate)
    residual, residual_stride = _one_stride(residual)
    count = rstd.numel()
    launch = launch or default_launch(hidden)
    if count:
        with on_device_of(x):
            forward_kernel[(quotient(count, launch.rows),)](
                x,
                weight.contiguous() if weight is not None else x,
                gate if gate is not None else x,
                residual if residual is not None else x,
                y,
                total,
                rstd,
                count,
                *geometry,
                gate_stride,
                residual_stride,
                eps,
                OFFSET=offset,
                HIDDEN=hidden,
                BLOCK=power_of_two(hidden),
                ROWS=launch.rows,
                FLAT=flat,
                WEIGHT=weight is not None,
                GATE=gate is not None,
                RESIDUAL=residual is not None,
                GEMMA=gemma,
                ROUND=not gemma and weight is not None and weight.dtype == x.dtype,
                num_warps=launch.warps,
                enable_fp_fusion=True,
            )
    return y, total, rstd


def backward(
    grad_y: Tensor,
    grad_total: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    rstd: Tensor,
    offset: float,
    gemma: bool,
    grad_weight: bool,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of h, of the weight and of the gate (no elements where there is none or none is wanted)."""
    hidden, count = h.shape[-1], rstd.numel()
    grad_h = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    grad_gate = h.new_empty(0) if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    grad_weight = grad_weight and weight is not None
    launch = launch or default_launch(hidden, backward=True)
    blocks = quotient(count, launch.rows)
    programs = min(blocks, launch.per_multiprocessor * multiprocessors(h.device)) if grad_weight else blocks
    partials = torch.empty((programs, hidden) if grad_weight else 0, dtype=torch.float32, device=h.device)
    h, geometry, flat = _two_strides(h)
    gate, gate_stride = _one_stride(gate)
    grad_y, grad_stride = _one_stride(grad_y)
    grad_total, grad_total_stride = _one_stride(grad_total)
    if count:
        with on_device_of(h):
            backward_kernel[(programs,)](
                grad_y,
                grad_total if grad_total is not None else h,
                h,
                weight.contiguous() if weight is not None else h,
                gate if gate is not None else h,
                rstd,
                grad_h,
                grad_gate,
                partials,
                count,
                *geometry,
                gate_stride,
                grad_stride,
                grad_total_stride,
                OFFSET=offset,
                HIDDEN=hidden,
                BLOCK=power_of_two(hidden),
                ROWS=launch.rows,
                FLAT=flat,
                WEIGHT=weight is not None,
                GRAD_WEIGHT=grad_weight,
                GATE=gate is not None,
                GRAD_TOTAL=grad_total is not None,
                GEMMA=gemma,
                num_warps=launch.warps,
                enable_fp_fusion=True,
            )
    summed = partials.sum(0).to(weight.dtype) if grad_weight and weight is not None else partials
    return grad_h, summed, grad_gate


def _two_strides(tensor: Tensor) -> tuple[Tensor, tuple[int, int, int], bool]:
    """The tensor, or a copy if two strides do not describe its rows; (inner, outer, inner stride); whether one does."""
    rows = rows_of(tensor)
    if rows is None or (rows.column_stride != 1 and tensor.shape[-1] > 1):
        tensor = tensor.contiguous()
        rows = rows_of(tensor)
    assert rows is not None, "adjacent rows have one stride"
    return tensor, (rows.inner, rows.outer_stride, rows.inner_stride), rows.inner == rows.count


def _one_stride(tensor: Tensor | None) -> tuple[Tensor | None, int]:
    if tensor is None:
        return None, 0
    found, (_, _, stride), flat = _two_strides(tensor)
    return (found, stride) if flat else (tensor.contiguous(), tensor.shape[-1])


@cache
def multiprocessors(device: torch.device) -> int:
    """How many there are; three where there is no GPU, so that tests see partial sums."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
