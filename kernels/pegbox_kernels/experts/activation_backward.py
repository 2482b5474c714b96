"""The activation between the two products of an expert, backward: one kernel for all that passes it.

A program owns columns of one expert and a share of its rows, so that what sums over rows stays in registers: it reads
the product z again, the gradient u of h before the router weight w, and makes

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

from pegbox_kernels.dispatch import on_device_of
from pegbox_kernels.experts.activation import columns_from, factor_tile, pair_bias, pair_columns, ranks
from pegbox_kernels.experts.glue import Launch, launch_for
from pegbox_kernels.experts.grouped import Gate
from pegbox_kernels.experts.routing import Routing
from pegbox_kernels.experts.sums import added, shares
from pegbox_kernels.experts.tiles import (
    bounds,
    gated_gradient,
    load_pair,
    padded_rank,
    precision,
    product,
    rounded,
    store_pair,
)


@triton.jit
def _ranks_first(values, row, r, rank):
    """(R, ROWS) of values (N, rank)."""
    return tl.load(values + row[None, :] * rank + r[:, None], mask=(r < rank)[:, None], other=0.0)


@triton.jit
def _pair_factor(factor, at_gate, at_up, r, mask, rank, column_stride, rank_stride):
    gate = factor_tile(factor, at_gate, r, mask, rank, column_stride, rank_stride)
    return gate, factor_tile(factor, at_up, r, mask, rank, column_stride, rank_stride)


@triton.jit
def _load_beside(row_pointer, column, size, FOURS: tl.constexpr, EVEN: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) of rows of `size` numbers, fp32."""
    i = columns_from(column, size, FOURS, COLUMNS)
    place = row_pointer[:, None] + i[None, :]
    return (tl.load(place) if EVEN else tl.load(place, mask=(i < size)[None, :], other=0.0)).to(tl.float32)


@triton.jit
def _store_gram(grams, gram, r, rank, rank_stride, column, column_stride, mask):
    """A tile (R, COLUMNS) of a gradient of a factor."""
    place = r[:, None] * rank_stride + column[None, :] * column_stride
    tl.store(grams + place, gram, mask=mask[None, :] & (r < rank)[:, None])


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
    EVEN: tl.constexpr,
    FOURS: tl.constexpr,
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
    first_column = tl.program_id(0) * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    mask = column < size
    at_gate, at_up = pair_columns(column, size, INTERLEAVED)
    r_in, r_out = tl.arange(0, RANK_IN), tl.arange(0, RANK_OUT)
    dtype: tl.constexpr = z.dtype.element_ty
    if BIAS:
        gate_bias, up_bias = pair_bias(bias + expert * (2 * size), first_column, size, INTERLEAVED, COLUMNS)
    if ADD_IN:
        f = factor_in + expert * in_expert
        gate_factor, up_factor = _pair_factor(f, at_gate, at_up, r_in, mask, rank_in, in_column, in_rank)
    if ADD_OUT:
        h_factor = factor_tile(factor_out + expert * out_expert, column, r_out, mask, rank_out, out_column, out_rank)
    gate_gram, up_gram = tl.zeros([RANK_IN, COLUMNS], tl.float32), tl.zeros([RANK_IN, COLUMNS], tl.float32)
    h_gram = tl.zeros([RANK_OUT, COLUMNS], tl.float32)
    gate_sum, up_sum = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    for first in tl.range(begin, end, ROWS, num_stages=STAGES):
        inside = first + tl.arange(0, ROWS) < end
        # Rows past the end read its last one, which needs no mask; they have no weight and are not written.
        row = tl.minimum(tl.arange(0, ROWS), end - 1 - first)
        above = tl.cast(first, tl.int64)
        weight = tl.load(weights + above + row)
        gate, up = load_pair(z + above * (2 * size) + row * (2 * size), first_column, size, INTERLEAVED, EVEN, COLUMNS)
        grad = _load_beside(u + above * size + row * size, first_column, size, FOURS, EVEN, COLUMNS)
        weight = tl.where(inside, weight, 0.0)
        if BIAS:
            gate += gate_bias[None, :]
            up += up_bias[None, :]
        if ADD_IN:
            p = ranks(projected + above * rank_in, row, r_in, rank_in)
            gate = product(p, gate_factor, gate, PRECISION)
            up = product(p, up_factor, up, PRECISION)
        if ADD_OUT:
            grad = product(ranks(v + above * rank_out, row, r_out, rank_out), h_factor, grad, PRECISION)
        h, d_gate, d_up = gated_gradient(gate, up, alpha, limit, GPT_OSS)
        tl.store(dots + (tl.program_id(0).to(tl.int64) * rows_in_all + above) + row, tl.sum(grad * h, 1), mask=inside)
        grad *= weight[:, None]
        d_gate *= grad
        d_up *= grad
        at_dz = dz + above * (2 * size) + row * (2 * size)
        store_pair(at_dz, d_gate, d_up, first_column, size, inside, INTERLEAVED, EVEN, COLUMNS)
        if WRITE_H:
            known = inside[:, None] & mask[None, :]
            place = weighted_h + above * size + (row[:, None] * size + column[None, :])
            tl.store(place, rounded(h * weight[:, None], dtype), mask=known)
        # Ranks are read again, the other way round: of a tile that serves both ways no loads are made ahead.
        if LORA_IN:
            p_first = _ranks_first(projected + above * rank_in, row, r_in, rank_in)
            gate_gram = product(p_first, rounded(d_gate, dtype), gate_gram, PRECISION)
            up_gram = product(p_first, rounded(d_up, dtype), up_gram, PRECISION)
        if LORA_OUT:
            q = _ranks_first(v + above * rank_out, row, r_out, rank_out).to(tl.float32) * weight[None, :]
            h_gram = product(rounded(q, dtype), rounded(h, dtype), h_gram, PRECISION)
        if SUM:
            gate_sum += tl.sum(d_gate, 0)
            up_sum += tl.sum(d_up, 0)
    place = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + expert) * size
    if LORA_IN:
        _store_gram(grams_in + 2 * place * rank_in, gate_gram, r_in, rank_in, 1, at_gate, rank_in, mask)
        _store_gram(grams_in + 2 * place * rank_in, up_gram, r_in, rank_in, 1, at_up, rank_in, mask)
    if LORA_OUT:
        _store_gram(grams_out + place * rank_out, h_gram, r_out, rank_out, size, column, 1, mask)
    if SUM:
        tl.store(sums + 2 * place + at_gate, gate_sum, mask=mask)
        tl.store(sums + 2 * place + at_up, up_sum, mask=mask)


class Gradients(NamedTuple):
    """dz (N, J); w h (N, I) or None; dw's parts (column blocks, N); dB (E, J, R), dA (E, R, I); dbias (E, J), fp32."""

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
        **launch.options,
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
        z: (N, J) products; u: (N, I), the gradient of h, not yet times the router weights (N,), which are sorted.
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
    with on_device_of(z):
        backward_kernel[(columns, experts, parts)](
            *(z, u, bias, *(lora_in or (None, None)), *(lora_out or (None, None)), weights),
            *(routing.offsets_E, dz, weighted_h, dots, grams_in, grams_out, sums),
            *(rows, size, rank_in, rank_out),
            *((0, 0, 0) if lora_in is None else lora_in[1].stride()),
            *((0, 0, 0) if lora_out is None else lora_out[1].stride()),
            gate.alpha,
            gate.limit,
            **_backward_constants(gate, given, launch),
            PRECISION=precision(z),
            EVEN=size % launch.columns == 0,
            FOURS=gate.interleaved and (added_already or (lora_in is None and lora_out is None)),
            RANK_IN=padded_rank(rank_in),
            RANK_OUT=padded_rank(rank_out),
        )
    found = (added(grams_in, z.dtype), added(grams_out, z.dtype), added(sums, torch.float32))
    return Gradients(dz, weighted_h, dots, *found)


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
        with on_device_of(dots):
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
