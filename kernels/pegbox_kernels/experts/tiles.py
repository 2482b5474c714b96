"""What the kernels of this operation share: which rows a program works on, products, rounding, the activation.

Sorted rows of an expert are cut into blocks of ROWS, the last of them short. A program finds its block from the offsets
on the device, so that the host launches an upper bound of programs (`blocks_at_most`) and never asks how tokens fell.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import is_cuda

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def blocks_at_most(rows: int, experts: int, block: int) -> int:
    """Blocks of `block` rows that `rows` rows of `experts` experts can need: each expert's last may be short."""
    return min(rows, rows // block + experts)


def padded_rank(rank: int) -> int:
    """Columns of a tile that holds a rank: tensor cores take no fewer than 16."""
    return max(16, triton.next_power_of_2(rank))


def padded_experts(experts: int) -> int:
    return max(2, triton.next_power_of_2(experts))


def precision(tensor: Tensor) -> str:
    """How products are taken: tensor cores round fp32 inputs unless told not to."""
    return "ieee" if tensor.dtype == torch.float32 else "tf32"


@triton.jit
def bounds(offsets, expert):
    """First row of an expert and the one after its last."""
    first = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    return first, tl.load(offsets + expert)


@triton.jit
def locate(offsets, block, experts, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """Of a block of rows: its expert (`experts` or more: there is no such block), first row, end of the expert."""
    e = tl.arange(0, EXPERTS)
    inside = e < experts
    end = tl.load(offsets + e, mask=inside, other=0)
    start = tl.load(offsets + e - 1, mask=inside & (e > 0), other=0)
    blocks = tl.where(inside, (end - start + ROWS - 1) // ROWS, 0)
    last = tl.cumsum(blocks, 0)
    expert = tl.sum((last <= block).to(tl.int32), 0)
    mine = e == expert
    within = block - tl.sum(tl.where(mine, last - blocks, 0), 0)
    first = tl.sum(tl.where(mine, start, 0), 0) + within * ROWS
    return expert, first, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit
def total_blocks(offsets, experts, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """How many blocks of rows there are."""
    e = tl.arange(0, EXPERTS)
    inside = e < experts
    end = tl.load(offsets + e, mask=inside, other=0)
    start = tl.load(offsets + e - 1, mask=inside & (e > 0), other=0)
    return tl.sum(tl.where(inside, (end - start + ROWS - 1) // ROWS, 0), 0)


@triton.jit
def product(a, b, c, PRECISION: tl.constexpr):
    """c + a b, summed in fp32; the interpreter would multiply the bits of bf16."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), c, input_precision="ieee")
    return tl.dot(a, b, c, input_precision=PRECISION)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """fp32 in another dtype, to nearest even, as a GPU does by itself; the interpreter truncates."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        near = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        value = tl.where(value == value, near, value)
    return value.to(dtype)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) in two instructions of the special function unit; plain division guards numbers near 2^126."""
    if INTERPRETED:
        return tl.sigmoid(x)
    if is_cuda():
        return tl.inline_asm_elementwise(
            """{
                .reg .f32 t;
                mul.f32 t, $1, 0fBFB8AA3B;
                ex2.approx.ftz.f32 t, t;
                add.f32 t, t, 0f3F800000;
                rcp.approx.ftz.f32 $0, t;
                }""",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return tl.sigmoid(x)


@triton.jit
def _at_most(x, limit):
    """The smaller one; NaN stays."""
    return tl.minimum(x, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _between(x, limit):
    return tl.maximum(_at_most(x, limit), -limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def gated(gate, up, alpha, limit, GPT_OSS: tl.constexpr):
    """h of the equations in reference.py."""
    if GPT_OSS:
        g = _at_most(gate, limit)
        return (_between(up, limit) + 1) * g * sigmoid(alpha * g)
    return gate * sigmoid(gate) * up


@triton.jit
def gated_gradient(gate, up, alpha, limit, GPT_OSS: tl.constexpr):
    """h, dh / dgate, dh / dup."""
    if GPT_OSS:
        g = _at_most(gate, limit)
        u = _between(up, limit) + 1
        sigma = sigmoid(alpha * g)
        glu = g * sigma
        d_gate = tl.where(gate > limit, 0.0, u * (sigma + alpha * glu * (1 - sigma)))
        d_up = tl.where(tl.abs(up) > limit, 0.0, glu)
        return u * glu, d_gate, d_up
    sigma = sigmoid(gate)
    silu = gate * sigma
    return silu * up, up * (sigma + silu * (1 - sigma)), silu


@triton.jit
def load_pair(row_pointer, column, size, INTERLEAVED: tl.constexpr, EVEN: tl.constexpr, COLUMNS: tl.constexpr):
    """Gate and up of COLUMNS columns from `column` on, fp32, from rows of 2 size numbers.

    `row_pointer` (ROWS,) points at their beginnings, all of which may be read. EVEN: no column is past the end.
    """
    if INTERLEAVED:
        j = 2 * column + tl.arange(0, 2 * COLUMNS)
        place = row_pointer[:, None] + j[None, :]
        both = tl.load(place) if EVEN else tl.load(place, mask=(j < 2 * size)[None, :], other=0.0)
        gate, up = tl.split(tl.reshape(both.to(tl.float32), [both.shape[0], COLUMNS, 2]))
    else:
        i = column + tl.arange(0, COLUMNS)
        place = row_pointer[:, None] + i[None, :]
        mask = (i < size)[None, :]
        gate = (tl.load(place) if EVEN else tl.load(place, mask=mask, other=0.0)).to(tl.float32)
        up = (tl.load(place + size) if EVEN else tl.load(place + size, mask=mask, other=0.0)).to(tl.float32)
    return gate, up


@triton.jit
def store_pair(
    row_pointer,
    gate,
    up,
    column,
    size,
    inside,
    INTERLEAVED: tl.constexpr,
    EVEN: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """What `load_pair` reads, of rows that are `inside` (ROWS,)."""
    dtype: tl.constexpr = row_pointer.dtype.element_ty
    gate = rounded(gate, dtype)
    up = rounded(up, dtype)
    if INTERLEAVED:
        j = 2 * column + tl.arange(0, 2 * COLUMNS)
        mask = inside[:, None] if EVEN else inside[:, None] & (j < 2 * size)[None, :]
        both = tl.reshape(tl.join(gate, up), [gate.shape[0], 2 * COLUMNS])
        tl.store(row_pointer[:, None] + j[None, :], both, mask=mask)
    else:
        i = column + tl.arange(0, COLUMNS)
        mask = inside[:, None] if EVEN else inside[:, None] & (i < size)[None, :]
        tl.store(row_pointer[:, None] + i[None, :], gate, mask=mask)
        tl.store(row_pointer[:, None] + size + i[None, :], up, mask=mask)
