"""The activation between the two products of an expert, forward and backward, with all that needs a row of it.

Forward, a program owns a block of rows and runs over the columns: z = product + bias + rank product, then
h = activation(z), and the projection h A of the next LoRA. Backward, a program owns columns of one expert and a share
of its rows, so that what sums over rows stays in registers: it reads the product again, the gradient u of h before the
router weight w, and makes

    dz = w u act'(z)     dw = sum_i u_i h_i     dA = sum_rows (w v) h^T     dB = dz^T (x A)     dbias = sum_rows dz

where v = s dy B is the rank projection of the incoming gradient, and u = dy W^T + v A. That dw is a sum over u h needs
no second look at the layer's output: dy . (h W) = (dy W^T) . h (as SonicMoE, arXiv:2512.14080).

Shapes: N sorted rows, I intermediate, J = 2 I, R rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pegbox_kernels.experts.glue import Launch, added, launch_for, shares
from pegbox_kernels.experts.grouped import Gate
from pegbox_kernels.experts.routing import Routing
from pegbox_kernels.experts.tiles import (
    blocks_at_most,
    bounds,
    gated,
    gated_gradient,
    load_pair,
    locate,
    padded_experts,
    padded_rank,
    precision,
    product,
    rounded,
    store_pair,
)


@triton.jit
def _pair_columns(column, size, INTERLEAVED: tl.constexpr):
    """Where gate and up of a column lie in a row of J."""
    return (2 * column, 2 * column + 1) if INTERLEAVED else (column, column + size)


@triton.jit
def _factor(factor, column, r, inside, rank, factor_column, factor_rank):
    """(RANK, COLUMNS) of a factor whose expert `factor` points at."""
    place = factor + r[:, None] * factor_rank + column[None, :] * factor_column
    return tl.load(place, mask=inside[None, :] & (r < rank)[:, None], other=0.0)


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
    RANK_OUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    expert, first, end = locate(offsets, tl.program_id(0), experts, ROWS, EXPERTS)
    if expert >= experts:
        return
    expert = expert.to(tl.int64)
    row = first + tl.arange(0, ROWS)
    inside = row < end
    row = row.to(tl.int64)
    r_in, r_out = tl.arange(0, RANK_IN), tl.arange(0, RANK_OUT)
    if LORA_IN:
        known = inside[:, None] & (r_in < rank_in)[None, :]
        p = tl.load(projected + row[:, None] * rank_in + r_in[None, :], mask=known, other=0.0)
    acc = tl.zeros([ROWS, RANK_OUT], tl.float32)
    for begin in range(0, size, COLUMNS):
        gate, up = load_pair(z + row * (2 * size), begin, size, inside, INTERLEAVED, COLUMNS)
        column = begin + tl.arange(0, COLUMNS)
        mask = column < size
        at_gate, at_up = _pair_columns(column, size, INTERLEAVED)
        if BIAS:
            b = bias + expert * (2 * size)
            gate += tl.load(b + at_gate, mask=mask, other=0.0).to(tl.float32)[None, :]
            up += tl.load(b + at_up, mask=mask, other=0.0).to(tl.float32)[None, :]
        if LORA_IN:
            f = factor_in + expert * in_expert
            gate = product(p, _factor(f, at_gate, r_in, mask, rank_in, in_column, in_rank), gate, PRECISION)
            up = product(p, _factor(f, at_up, r_in, mask, rank_in, in_column, in_rank), up, PRECISION)
        out = rounded(gated(gate, up, alpha, limit, GPT_OSS), h.dtype.element_ty)
        out = tl.where(inside[:, None] & mask[None, :], out, 0.0).to(h.dtype.element_ty)
        tl.store(h + row[:, None] * size + column[None, :], out, mask=inside[:, None] & mask[None, :])
        if LORA_OUT:
            at = factor_out + expert * out_expert + column[:, None] * out_column + r_out[None, :] * out_rank
            down = tl.load(at, mask=mask[:, None] & (r_out < rank_out)[None, :], other=0.0)
            acc = product(out, down, acc, PRECISION)
    if LORA_OUT:
        place = projected_h + row[:, None] * rank_out + r_out[None, :]
        value = rounded(acc * scale, h.dtype.element_ty)
        tl.store(place, value, mask=inside[:, None] & (r_out < rank_out)[None, :])


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
    rank_in = 1 if lora_in is None else lora_in[1].shape[2]
    rank_out = 1 if a_out is None else a_out.shape[1]
    projected_h = None if a_out is None else z.new_empty((rows, rank_out))
    launch = launch or launch_for("activate", max(rank_in, rank_out), z.element_size())
    blocks = blocks_at_most(rows, experts, launch.rows)
    if blocks:
        with torch.cuda.device_of(z):
            forward_kernel[(blocks,)](
                z,
                bias,
                None if lora_in is None else lora_in[0],
                None if lora_in is None else lora_in[1],
                a_out,
                routing.offsets_E,
                h,
                projected_h,
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
                ROWS=launch.rows,
                COLUMNS=launch.columns,
                num_warps=launch.warps,
                num_stages=launch.stages,
            )
    return h, projected_h


@triton.jit
def _pair_bias(bias, at_gate, at_up, mask):
    gate = tl.load(bias + at_gate, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(bias + at_up, mask=mask, other=0.0).to(tl.float32)
    return gate[None, :], up[None, :]


@triton.jit
def _pair_factor(factor, at_gate, at_up, r, mask, rank, column_stride, rank_stride):
    gate = _factor(factor, at_gate, r, mask, rank, column_stride, rank_stride)
    return gate, _factor(factor, at_up, r, mask, rank, column_stride, rank_stride)


@triton.jit
def _ranks(values, row, inside, r, rank):
    """(ROWS, R) of values (N, rank)."""
    at = values + row[:, None] * rank + r[None, :]
    return tl.load(at, mask=inside[:, None] & (r < rank)[None, :], other=0.0)


@triton.jit
def backward_kernel(
    z,
    u,
    bias,
    projected,
    factor_in,
    v,
    factor_out,
    weights,
    order,
    offsets,
    dz,
    weighted_h,
    dots,
    grams_in,
    grams_out,
    sums,
    rows_in_all,
    size,
    rank_in,
    rank_out,
    in_expert,
    in_column,
    in_rank,
    out_expert,
    out_rank,
    out_column,
    alpha,
    limit,
    GPT_OSS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BIAS: tl.constexpr,
    LORA_IN: tl.constexpr,
    ADD_IN: tl.constexpr,
    LORA_OUT: tl.constexpr,
    ADD_OUT: tl.constexpr,
    WRITE_H: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    RANK_IN: tl.constexpr,
    RANK_OUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """grams_in (S, E, J, R) of dB, grams_out (S, E, R, I) of dA, sums (S, E, J) of dbias; dots (blocks, N) of dw.

    ADD_IN, ADD_OUT: the rank products are not in z and u yet.
    """
    expert = tl.program_id(1).to(tl.int64)
    begin, end = bounds(offsets, expert)
    part = tl.cdiv(tl.cdiv(end - begin, tl.num_programs(2)), ROWS) * ROWS
    begin += tl.program_id(2) * part
    end = tl.minimum(end, begin + part)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < size
    at_gate, at_up = _pair_columns(column, size, INTERLEAVED)
    r_in, r_out = tl.arange(0, RANK_IN), tl.arange(0, RANK_OUT)
    dtype: tl.constexpr = z.dtype.element_ty
    if BIAS:
        gate_bias, up_bias = _pair_bias(bias + expert * (2 * size), at_gate, at_up, mask)
    if ADD_IN:
        f = factor_in + expert * in_expert
        gate_factor, up_factor = _pair_factor(f, at_gate, at_up, r_in, mask, rank_in, in_column, in_rank)
    if ADD_OUT:
        h_factor = _factor(factor_out + expert * out_expert, column, r_out, mask, rank_out, out_column, out_rank)
    gate_gram = tl.zeros([RANK_IN, COLUMNS], tl.float32)
    up_gram = tl.zeros([RANK_IN, COLUMNS], tl.float32)
    h_gram = tl.zeros([RANK_OUT, COLUMNS], tl.float32)
    gate_sum = tl.zeros([COLUMNS], tl.float32)
    up_sum = tl.zeros([COLUMNS], tl.float32)
    for first in tl.range(begin, end, ROWS, num_stages=STAGES):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = row < end
        weight = tl.load(weights + tl.load(order + row, mask=inside, other=0), mask=inside, other=0.0).to(tl.float32)
        both = inside[:, None] & mask[None, :]
        gate, up = load_pair(z + row * (2 * size), tl.program_id(0) * COLUMNS, size, inside, INTERLEAVED, COLUMNS)
        grad = tl.load(u + row[:, None] * size + column[None, :], mask=both, other=0.0).to(tl.float32)
        if LORA_IN:
            p = _ranks(projected, row, inside, r_in, rank_in)
        if LORA_OUT:
            q = _ranks(v, row, inside, r_out, rank_out)
        if BIAS:
            gate += gate_bias
            up += up_bias
        if ADD_IN:
            gate = product(p, gate_factor, gate, PRECISION)
            up = product(p, up_factor, up, PRECISION)
        if ADD_OUT:
            grad = product(q, h_factor, grad, PRECISION)
        h, d_gate, d_up = gated_gradient(gate, up, alpha, limit, GPT_OSS)
        h = tl.where(both, h, 0.0)
        tl.store(dots + tl.program_id(0).to(tl.int64) * rows_in_all + row, tl.sum(grad * h, 1), mask=inside)
        grad *= weight[:, None]
        d_gate = tl.where(both, d_gate * grad, 0.0)
        d_up = tl.where(both, d_up * grad, 0.0)
        store_pair(dz + row * (2 * size), d_gate, d_up, tl.program_id(0) * COLUMNS, size, inside, INTERLEAVED, COLUMNS)
        if WRITE_H:
            tl.store(weighted_h + row[:, None] * size + column[None, :], rounded(h * weight[:, None], dtype), mask=both)
        if LORA_IN:
            gate_gram = product(tl.trans(p), rounded(d_gate, dtype), gate_gram, PRECISION)
            up_gram = product(tl.trans(p), rounded(d_up, dtype), up_gram, PRECISION)
        if LORA_OUT:
            q = rounded(q.to(tl.float32) * weight[:, None], dtype)
            h_gram = product(tl.trans(q), rounded(h, dtype), h_gram, PRECISION)
        if SUM:
            gate_sum += tl.sum(d_gate, 0)
            up_sum += tl.sum(d_up, 0)
    place = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + expert) * size
    if LORA_IN:
        known = mask[None, :] & (r_in < rank_in)[:, None]
        grams = grams_in + 2 * place * rank_in + r_in[:, None]
        tl.store(grams + at_gate[None, :] * rank_in, gate_gram, mask=known)
        tl.store(grams + at_up[None, :] * rank_in, up_gram, mask=known)
    if LORA_OUT:
        known = mask[None, :] & (r_out < rank_out)[:, None]
        tl.store(grams_out + place * rank_out + r_out[:, None] * size + column[None, :], h_gram, mask=known)
    if SUM:
        tl.store(sums + 2 * place + at_gate, gate_sum, mask=mask)
        tl.store(sums + 2 * place + at_up, up_sum, mask=mask)


class Gradients(NamedTuple):
    """dz (N, J); w h (N, I) or None; dw's parts (column blocks, N); dB (E, J, R), dA (E, R, I), dbias (E, J), fp32."""

    dz: Tensor
    weighted_h: Tensor | None
    dots: Tensor
    db_in: Tensor | None
    da_out: Tensor | None
    dbias: Tensor | None


class Given(NamedTuple):
    """What a backward has and gives; see `backward`."""

    bias: bool
    lora_in: bool
    lora_out: bool
    added_already: bool
    write_h: bool
    summed: bool


def _backward_constants(gate: Gate, given: Given, launch: Launch) -> dict[str, int]:
    return {
        "GPT_OSS": gate.activation == "gpt_oss",
        "INTERLEAVED": gate.interleaved,
        "BIAS": given.bias,
        "LORA_IN": given.lora_in,
        "ADD_IN": given.lora_in and not given.added_already,
        "LORA_OUT": given.lora_out,
        "ADD_OUT": given.lora_out and not given.added_already,
        "WRITE_H": given.write_h,
        "SUM": given.summed,
        "ROWS": launch.rows,
        "COLUMNS": launch.columns,
        "STAGES": launch.stages,
        "num_warps": launch.warps,
        "num_stages": launch.stages,
    }


def backward(
    z: Tensor,
    u: Tensor,
    weights: Tensor,
    routing: Routing,
    gate: Gate,
    *,
    bias: Tensor | None,
    lora_in: tuple[Tensor, Tensor] | None,
    lora_out: tuple[Tensor, Tensor] | None,
    added_already: bool,
    write_h: bool,
    summed: bool,
    launch: Launch | None = None,
) -> Gradients:
    """All gradients that pass the activation.

    Args:
        z: (N, J) products; u: (N, I), the gradient of h, not yet times the router weights (T, K).
        lora_in: projection (N, R) of the input and B (E, J, R); lora_out: v (N, R) and A (E, R, I).
        added_already: the rank products are in z and u.
        write_h: also give w h, for the gradient of the weights of the second product.
        summed: also give dbias.
    """
    rows, size, experts = z.shape[0], z.shape[1] // 2, routing.offsets_E.numel()
    rank_in = 1 if lora_in is None else lora_in[1].shape[2]
    rank_out = 1 if lora_out is None else lora_out[1].shape[1]
    launch = launch or launch_for("activate_backward", max(rank_in, rank_out), z.element_size())
    parts, columns = shares(experts), triton.cdiv(size, launch.columns)

    def partial(*shape: int) -> Tensor:
        return z.new_empty((parts, experts, *shape), dtype=torch.float32)

    dz, weighted_h = torch.empty_like(z), torch.empty_like(u) if write_h else None
    dots = z.new_empty((columns, rows), dtype=torch.float32)
    grams_in = None if lora_in is None else partial(2 * size, rank_in)
    grams_out = None if lora_out is None else partial(rank_out, size)
    sums = partial(2 * size) if summed else None
    given = Given(bias is not None, lora_in is not None, lora_out is not None, added_already, write_h, summed)
    with torch.cuda.device_of(z):
        backward_kernel[(columns, experts, parts)](
            *(z, u, bias, *(lora_in or (None, None)), *(lora_out or (None, None)), weights),
            *(routing.order_N, routing.offsets_E, dz, weighted_h, dots, grams_in, grams_out, sums),
            *(rows, size, rank_in, rank_out),
            *((0, 0, 0) if lora_in is None else lora_in[1].stride()),
            *((0, 0, 0) if lora_out is None else lora_out[1].stride()),
            gate.alpha,
            gate.limit,
            **_backward_constants(gate, given, launch),
            PRECISION=precision(z),
            RANK_IN=padded_rank(rank_in),
            RANK_OUT=padded_rank(rank_out),
        )
    return Gradients(dz, weighted_h, dots, added(grams_in), added(grams_out), added(sums))


@triton.jit
def weigh_kernel(dots, more, order, offsets, out, rows, columns, experts, MORE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < tl.load(offsets + experts - 1)
    acc = tl.zeros([BLOCK], tl.float32)
    place = dots + row
    for _ in range(columns):
        acc += tl.load(place, mask=inside, other=0.0)
        place += rows
    if MORE:
        acc += tl.load(more + row, mask=inside, other=0.0)
    choice = tl.load(order + row, mask=inside, other=0)
    tl.store(out + choice, rounded(acc, out.dtype.element_ty), mask=inside)


def weight_gradient(dots: Tensor, more: Tensor | None, routing: Routing, like: Tensor) -> Tensor:
    """The gradient of the router weights `like` (T, K): the sum of its parts (blocks, N), and of `more` (N,)."""
    columns, rows = dots.shape
    out = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    if rows:
        with torch.cuda.device_of(dots):
            weigh_kernel[(triton.cdiv(rows, 256),)](
                dots,
                more,
                routing.order_N,
                routing.offsets_E,
                out,
                rows,
                columns,
                routing.offsets_E.numel(),
                MORE=more is not None,
                BLOCK=256,
            )
    return out
