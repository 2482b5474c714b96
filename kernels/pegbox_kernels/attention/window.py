"""Backward of attention with a short window, in one walk along the sequence: five products, no atomics, no second read.

A token sees at most the 128 keys before it, which lie in the last three tiles of 64 keys. A program owns a chunk of
tokens of one key head and walks through it, 64 tokens at a time, with all query heads of the group: dQ of those tokens
is complete at once, and dK and dV of three live tiles of keys stay in fp32 registers (they are sums over the group, so
few), one tile leaving after each step. So q, do and out are read once, dQ, dK and dV are written once.

Keys at the end of a chunk are seen by tokens of the next one as well. Both programs then leave fp32 partial sums, and
a second, small kernel adds the two: always the same two numbers, so the result has the same bits every time.

Per token and query head 192 keys are computed for the 128 that are seen. Shapes as in `triton.py`; `parts`
(2, 2, T, K, D) fp32: from the program itself or from the next one; dK or dV.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pegbox_kernels.attention.tiles import (
    LN2,
    load_rows,
    locate,
    narrow,
    of_bundle,
    offsets_of,
    product,
    store_rows,
    wide,
)
from pegbox_kernels.attention.triton import NEVER, row_sums

if TYPE_CHECKING:
    from pegbox_kernels.attention.launch import Saved, Shape

STEP = tl.constexpr(64)
"""Tokens of a step and keys of a tile: a window reaches over two tiles before that of the token."""


class Walk(NamedTuple):
    """How it is launched: tokens of a chunk (128 or 256), query heads of a tile, warps, pipeline stages."""

    chunk: int
    heads: int
    warps: int
    stages: int


def fits(window: int | None, width: int, itemsize: int) -> bool:
    """Whether three tiles of keys hold the window, and registers hold the six sums."""
    return window is not None and window <= 2 * STEP.value + 1 and width <= 64 and itemsize == 2


@triton.jit
def _key_tile(base, stride, at, begin, end, columns, D: tl.constexpr):
    key = tl.arange(0, STEP)
    inside = ((at + key >= begin) & (at + key < end))[:, None] & (columns < D)[None, :]
    return tl.load(base + wide(at) * stride + offsets_of(key, stride, columns), mask=inside, other=0.0)


@triton.jit
def _visit(
    dq, dk, dv, q, do, k, v, lse2, delta, queries, keys, window, scale,
    FAR: tl.constexpr, NEAR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What tokens of a step and a tile of keys add to gradients. FAR, NEAR: the window, the diagonal cuts the tile."""
    s = product(q, tl.trans(k), None, PRECISION)
    p = tl.exp2(s * scale - lse2[:, None])
    if NEAR:
        p = tl.where(keys[None, :] <= queries[:, None], p, 0.0)
    if FAR:
        p = tl.where(keys[None, :] > queries[:, None] - window, p, 0.0)
    dp = product(do, tl.trans(v), None, PRECISION)
    ds = narrow(p * (dp - delta[:, None]), k.dtype)
    dv = product(tl.trans(do), narrow(p, do.dtype), dv, PRECISION)
    dk = product(tl.trans(q), ds, dk, PRECISION)
    dq = product(ds, k, dq, PRECISION)
    return dq, dk, dv


@triton.jit
def _leave(
    dk_tile, dv_tile, dk, dv, parts, at, start, begin, end, tokens, kv_head, scale,
    KV_HEADS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write a tile of keys that is done with: the gradients, or this program's part of them."""
    key = tl.arange(0, STEP)
    keys = at + key
    columns = tl.arange(0, dk_tile.shape[0])
    base = wide(at) * (KV_HEADS * D) + kv_head * D
    where = offsets_of(key, KV_HEADS * D, columns)
    if at >= begin:
        of_next = at < start
        if of_next | ((at + 2 * STEP >= start + CHUNK) & (start + CHUNK < end)):
            size = tokens.to(tl.int64) * (KV_HEADS * D)
            part = parts + tl.where(of_next, 2, 0) * size
            store_rows(part + base, where, tl.trans(dk_tile), keys, end, columns, D)
            store_rows(part + size + base, where, tl.trans(dv_tile), keys, end, columns, D)
        else:
            store_rows(dk + base, where, tl.trans(dk_tile * (scale * LN2)), keys, end, columns, D)
            store_rows(dv + base, where, tl.trans(dv_tile), keys, end, columns, D)


@triton.jit(do_not_specialize=NEVER)
def walk_kernel(
    q,
    k,
    v,
    do,
    out,
    lse,
    dlse,
    sinks,
    dq,
    dk,
    dv,
    parts,
    dsinks,
    table,
    tokens,
    blocks,
    window,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_dt,
    stride_dh,
    scale,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    FAR1: tl.constexpr,
    FAR2: tl.constexpr,
    SINK: tl.constexpr,
    DLSE: tl.constexpr,
    TABLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per (chunk, key head). FAR1, FAR2: the window ends in the tile before, in that of the token."""
    kv_heads: tl.constexpr = H // GROUP
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    index = tl.program_id(0) // kv_heads
    start, begin, end = locate(table, index, blocks, tokens, TABLE, CHUNK, False)
    if start >= end:
        return
    columns = tl.arange(0, WIDTH)
    row = tl.arange(0, STEP * HEADS)
    of_q = of_bundle(row, stride_qt, stride_qh, columns, HEADS)
    of_do = of_bundle(row, stride_dt, stride_dh, columns, HEADS)
    of_out = of_bundle(row, H * D, D, columns, HEADS)
    k_at = k + kv_head * stride_kh
    v_at = v + kv_head * stride_vh
    dk0 = tl.zeros([WIDTH, STEP], tl.float32)
    dv0 = tl.zeros([WIDTH, STEP], tl.float32)
    dk1 = tl.zeros([WIDTH, STEP], tl.float32)
    dv1 = tl.zeros([WIDTH, STEP], tl.float32)
    steps = (tl.minimum(CHUNK, end - start) + STEP - 1) // STEP
    for step in tl.range(0, steps, disable_licm=True):
        token = start + step * STEP
        keys2 = token + tl.arange(0, STEP)
        keys1 = keys2 - STEP
        keys0 = keys1 - STEP
        k0 = _key_tile(k_at, stride_kt, token - 2 * STEP, begin, end, columns, D)
        v0 = _key_tile(v_at, stride_vt, token - 2 * STEP, begin, end, columns, D)
        k1 = _key_tile(k_at, stride_kt, token - STEP, begin, end, columns, D)
        v1 = _key_tile(v_at, stride_vt, token - STEP, begin, end, columns, D)
        k2 = _key_tile(k_at, stride_kt, token, begin, end, columns, D)
        v2 = _key_tile(v_at, stride_vt, token, begin, end, columns, D)
        dk2 = tl.zeros([WIDTH, STEP], tl.float32)
        dv2 = tl.zeros([WIDTH, STEP], tl.float32)
        # Tiles before the document have no keys: with lse = inf their probabilities are zero.
        away0 = tl.where(token - 2 * STEP >= begin, 0.0, float("inf"))
        away1 = tl.where(token - STEP >= begin, 0.0, float("inf"))
        queries = token + row // HEADS
        for bundle in tl.range(0, GROUP // HEADS, disable_licm=True):
            first = (kv_head * GROUP + bundle * HEADS).to(tl.int32)
            heads = first + row % HEADS
            out_at = wide(token) * (H * D) + first * D
            q_at = q + wide(token) * stride_qt + wide(first) * stride_qh
            q_tile = load_rows(q_at, of_q, queries, end, columns, D, True)
            do_at = do + wide(token) * stride_dt + wide(first) * stride_dh
            do_tile = load_rows(do_at, of_do, queries, end, columns, D, True)
            out_tile = load_rows(out + out_at, of_out, queries, end, columns, D, True)
            lse2, delta, share = row_sums(do_tile, out_tile, lse, dlse, sinks, queries, heads, tokens, end, SINK, DLSE)
            if SINK:
                members = first + tl.arange(0, HEADS)
                slot = members.to(tl.int64) * (blocks * (CHUNK // STEP)) + index * (CHUNK // STEP) + step
                tl.store(dsinks + slot, tl.sum(tl.reshape(share, [STEP, HEADS]), 0))
            dq_tile = tl.zeros([STEP * HEADS, WIDTH], tl.float32)
            dq_tile, dk0, dv0 = _visit(
                dq_tile, dk0, dv0, q_tile, do_tile, k0, v0, lse2 + away0, delta, queries, keys0, window, scale,
                True, False, PRECISION,
            )  # fmt: skip
            dq_tile, dk1, dv1 = _visit(
                dq_tile, dk1, dv1, q_tile, do_tile, k1, v1, lse2 + away1, delta, queries, keys1, window, scale,
                FAR1, False, PRECISION,
            )  # fmt: skip
            dq_tile, dk2, dv2 = _visit(
                dq_tile, dk2, dv2, q_tile, do_tile, k2, v2, lse2, delta, queries, keys2, window, scale,
                FAR2, True, PRECISION,
            )  # fmt: skip
            store_rows(dq + out_at, of_out, dq_tile * (scale * LN2), queries, end, columns, D)
        _leave(dk0, dv0, dk, dv, parts, token - 2 * STEP, start, begin, end, tokens, kv_head, scale, kv_heads, D, CHUNK)
        dk0, dv0, dk1, dv1 = dk1, dv1, dk2, dv2
    after = start + steps * STEP
    _leave(dk0, dv0, dk, dv, parts, after - 2 * STEP, start, begin, end, tokens, kv_head, scale, kv_heads, D, CHUNK)
    _leave(dk1, dv1, dk, dv, parts, after - STEP, start, begin, end, tokens, kv_head, scale, kv_heads, D, CHUNK)


@triton.jit(do_not_specialize=NEVER)
def join_kernel(
    dk,
    dv,
    parts,
    table,
    tokens,
    blocks,
    scale,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    TABLE: tl.constexpr,
):
    """Adds the two parts of the last 128 keys of each chunk that is not the last of its document."""
    kv_head = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    start, _, end = locate(table, tl.program_id(0) // KV_HEADS, blocks, tokens, TABLE, CHUNK, False)
    if start + CHUNK >= end:
        return
    key = tl.arange(0, 2 * STEP)
    keys = start + CHUNK - 2 * STEP + key
    columns = tl.arange(0, WIDTH)
    base = wide(start + CHUNK - 2 * STEP) * (KV_HEADS * D) + kv_head * D
    where = offsets_of(key, KV_HEADS * D, columns)
    size = wide(tokens) * (KV_HEADS * D)
    dk_tile = load_rows(parts + base, where, keys, end, columns, D, False)
    dk_tile += load_rows(parts + 2 * size + base, where, keys, end, columns, D, False)
    store_rows(dk + base, where, dk_tile * (scale * LN2), keys, end, columns, D)
    dv_tile = load_rows(parts + size + base, where, keys, end, columns, D, False)
    dv_tile += load_rows(parts + 3 * size + base, where, keys, end, columns, D, False)
    store_rows(dv + base, where, dv_tile, keys, end, columns, D)


def backward(
    saved: Saved, dk: Tensor, dv: Tensor, shape: Shape, walk: Walk, constants: dict[str, object], blocks: int
) -> tuple[Tensor, Tensor]:
    """dQ and the partial sums of dsinks; dK and dV are written into `dk` and `dv`."""
    device = saved.q.device
    dq = torch.empty(saved.q.shape, dtype=saved.q.dtype, device=device)
    parts = torch.empty((2, 2, *saved.k.shape), dtype=torch.float32, device=device)
    slots = blocks * (walk.chunk // STEP.value) if saved.sinks is not None else 0
    dsinks = torch.zeros(shape.heads, slots, dtype=torch.float32, device=device)
    table = saved.lse if saved.table is None else saved.table[1]
    scale = shape.scale / LN2.value
    window = shape.window or 0
    walk_kernel[(blocks * shape.kv_heads,)](
        *(saved.q, saved.k, saved.v, saved.dout, saved.out, saved.lse),
        saved.lse if saved.dlse is None else saved.dlse,
        saved.lse if saved.sinks is None else saved.sinks,
        dq,
        dk,
        dv,
        parts,
        dsinks,
        table,
        shape.tokens,
        blocks,
        window,
        *saved.q.stride()[:2],
        *saved.k.stride()[:2],
        *saved.v.stride()[:2],
        *saved.dout.stride()[:2],
        scale,
        **constants,
        HEADS=walk.heads,
        CHUNK=walk.chunk,
        FAR1=window < 2 * STEP.value,
        FAR2=window < STEP.value,
        SINK=saved.sinks is not None,
        DLSE=saved.dlse is not None,
        num_warps=walk.warps,
        num_stages=walk.stages,
        enable_fp_fusion=True,
    )
    join_kernel[(blocks * shape.kv_heads,)](
        dk,
        dv,
        parts,
        table,
        shape.tokens,
        blocks,
        scale,
        KV_HEADS=shape.kv_heads,
        D=shape.head_dim,
        WIDTH=shape.width,
        CHUNK=walk.chunk,
        TABLE=saved.table is not None,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return dq, dsinks
