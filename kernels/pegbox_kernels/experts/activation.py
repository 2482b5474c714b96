"""The activation between the two products of an expert, forward, with all that needs a row of it.

A program owns a block of rows and a part of the columns, over which it runs: z = product + bias + rank product, then
h = activation(z), and its part of the projection h A of the next LoRA.

Shapes: N sorted rows, I intermediate, J = 2 I, R rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pegbox_kernels.dispatch import on_device_of
from pegbox_kernels.experts.glue import Launch, launch_for
from pegbox_kernels.experts.grouped import Gate
from pegbox_kernels.experts.routing import Routing
from pegbox_kernels.experts.sums import added
from pegbox_kernels.experts.tiles import (
    blocks_at_most,
    gated,
    load_pair,
    locate,
    padded_experts,
    padded_rank,
    precision,
    product,
    rounded,
)

COLUMN_PARTS = 4
"""In how many the columns of the forward are cut, where there are many."""


@triton.jit
def columns_from(column, size, FOURS: tl.constexpr, COLUMNS: tl.constexpr):
    """COLUMNS columns; FOURS: a thread takes four beside each other, as it has of gate and up that alternate.

    It would take eight, and the compiler compute the activation twice, once in the order of gate and up and once in
    that of what else is loaded or stored. So all it shall know is that the first column is a multiple of 4.
    """
    if FOURS:
        column = tl.multiple_of(column + tl.where(size < 0, 1, 0), 4)
    return column + tl.arange(0, COLUMNS)


@triton.jit
def pair_columns(column, size, INTERLEAVED: tl.constexpr):
    """Where gate and up of a column lie in a row of J."""
    return (2 * column, 2 * column + 1) if INTERLEAVED else (column, column + size)


@triton.jit
def factor_tile(factor, column, r, inside, rank, factor_column, factor_rank):
    """(RANK, COLUMNS) of a factor whose expert `factor` points at."""
    place = factor + r[:, None] * factor_rank + column[None, :] * factor_column
    return tl.load(place, mask=inside[None, :] & (r < rank)[:, None], other=0.0)


@triton.jit
def pair_bias(bias, column, size, INTERLEAVED: tl.constexpr, COLUMNS: tl.constexpr):
    """Gate's and up's of COLUMNS columns from `column` on, fp32."""
    if INTERLEAVED:
        j = 2 * column + tl.arange(0, 2 * COLUMNS)
        both = tl.load(bias + j, mask=j < 2 * size, other=0.0).to(tl.float32)
        gate, up = tl.split(tl.reshape(both, [COLUMNS, 2]))
    else:
        i = column + tl.arange(0, COLUMNS)
        gate = tl.load(bias + i, mask=i < size, other=0.0).to(tl.float32)
        up = tl.load(bias + size + i, mask=i < size, other=0.0).to(tl.float32)
    return gate, up


@triton.jit
def ranks(values, row, r, rank):
    """(ROWS, R) of values (N, rank)."""
    return tl.load(values + row[:, None] * rank + r[None, :], mask=(r < rank)[None, :], other=0.0)


@triton.jit
def forward_kernel(
    z,
    bias,
    projected,
    factor_in,
    factor_out,
    offsets,
    h,
    projected_h,
    rows_in_all,
    experts,
    size,
    rank_in,
    rank_out,
    in_expert,
    in_column,
    in_rank,
    out_expert,
    out_rank,
    out_column,
    scale,
    alpha,
    limit,
    GPT_OSS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BIAS: tl.constexpr,
    LORA_IN: tl.constexpr,
    LORA_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    EXPERTS: tl.constexpr,
    RANK_IN: tl.constexpr,
    EVEN: tl.constexpr,
    RANK_OUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    expert, first, end = locate(offsets, tl.program_id(0), experts, ROWS, EXPERTS)
    if expert >= experts:
        return
    expert = expert.to(tl.int64)
    inside = first + tl.arange(0, ROWS) < end
    # Rows past the end read its last one, which needs no mask, and are not written.
    row = tl.minimum(tl.arange(0, ROWS), end - 1 - first)
    above = first.to(tl.int64)
    z += above * (2 * size)
    h += above * size
    r_in, r_out = tl.arange(0, RANK_IN), tl.arange(0, RANK_OUT)
    if LORA_IN:
        p = ranks(projected + above * rank_in, row, r_in, rank_in)
    part = tl.cdiv(tl.cdiv(size, COLUMNS), tl.num_programs(1)) * COLUMNS
    last = tl.minimum(size, (tl.program_id(1) + 1) * part)
    acc = tl.zeros([ROWS, RANK_OUT], tl.float32)
    for begin in tl.range(tl.program_id(1) * part, last, COLUMNS, num_stages=STAGES):
        gate, up = load_pair(z + row * (2 * size), begin, size, INTERLEAVED, EVEN, COLUMNS)
        column = begin + tl.arange(0, COLUMNS)
        mask = column < size
        at_gate, at_up = pair_columns(column, size, INTERLEAVED)
        if BIAS:
            gate_bias, up_bias = pair_bias(bias + expert * (2 * size), begin, size, INTERLEAVED, COLUMNS)
            gate += gate_bias[None, :]
            up += up_bias[None, :]
        if LORA_IN:
            f = factor_in + expert * in_expert
            gate = product(p, factor_tile(f, at_gate, r_in, mask, rank_in, in_column, in_rank), gate, PRECISION)
            up = product(p, factor_tile(f, at_up, r_in, mask, rank_in, in_column, in_rank), up, PRECISION)
        out = rounded(gated(gate, up, alpha, limit, GPT_OSS), h.dtype.element_ty)
        at_h = h + (row[:, None] * size + columns_from(begin, size, INTERLEAVED and not LORA_IN, COLUMNS)[None, :])
        tl.store(at_h, out, mask=inside[:, None] & mask[None, :])
        if LORA_OUT:
            at = factor_out + expert * out_expert + column[:, None] * out_column + r_out[None, :] * out_rank
            down = tl.load(at, mask=mask[:, None] & (r_out < rank_out)[None, :], other=0.0)
            acc = product(out, down, acc, PRECISION)
    if LORA_OUT:
        place = projected_h + (tl.program_id(1).to(tl.int64) * rows_in_all + above) * rank_out
        place += row[:, None] * rank_out + r_out[None, :]
        tl.store(place, acc * scale, mask=inside[:, None] & (r_out < rank_out)[None, :])


def forward(
    z: Tensor,
    routing: Routing,
    gate: Gate,
    *,
    bias: Tensor | None,
    lora_in: tuple[Tensor, Tensor] | None,
    a_out: Tensor | None,
    scale_out: float,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(N, J) products -> h (N, I) and its projection (N, R) on `a_out` (E, R, I), scaled, or None.

    `lora_in`: the projection (N, R) of the layer's input and B (E, J, R), to be added; None if the products hold it.
    """
    rows, size, experts = z.shape[0], z.shape[1] // 2, routing.offsets_E.numel()
    h = z.new_empty((rows, size))
    rank_in, rank_out = 1 if lora_in is None else lora_in[1].shape[2], 1 if a_out is None else a_out.shape[1]
    launch = launch or launch_for("activate", max(rank_in, rank_out), z.element_size())
    # A program of few columns: as many as fill a GPU evenly, however many rows there are.
    parts = max(1, min(COLUMN_PARTS, size // (4 * launch.columns)))
    projected_h = None if a_out is None else z.new_empty((parts, rows, rank_out), dtype=torch.float32)
    blocks = blocks_at_most(rows, experts, launch.rows)
    if blocks:
        with on_device_of(z):
            forward_kernel[(blocks, parts)](
                z,
                bias,
                None if lora_in is None else lora_in[0],
                None if lora_in is None else lora_in[1],
                a_out,
                routing.offsets_E,
                h,
                projected_h,
                rows,
                experts,
                size,
                rank_in,
                rank_out,
                *((0, 0, 0) if lora_in is None else lora_in[1].stride()),
                *((0, 0, 0) if a_out is None else a_out.stride()),
                scale_out,
                gate.alpha,
                gate.limit,
                GPT_OSS=gate.activation == "gpt_oss",
                INTERLEAVED=gate.interleaved,
                BIAS=bias is not None,
                LORA_IN=lora_in is not None,
                LORA_OUT=a_out is not None,
                PRECISION=precision(z),
                EXPERTS=padded_experts(experts),
                RANK_IN=padded_rank(rank_in),
                RANK_OUT=padded_rank(rank_out),
                EVEN=size % launch.columns == 0,
                ROWS=launch.rows,
                COLUMNS=launch.columns,
                STAGES=launch.stages,
                **launch.options,
            )
    return h, added(projected_h, z.dtype)
