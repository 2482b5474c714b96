"""Backward of attention with a short window in two kernels, each with so few sums that several programs run at once.

`rows_kernel` owns tokens, as the forward in `window_forward.py` does: dQ, what the sinks get, and D = do . out - dlse
of every row, which it keeps. `columns_kernel` owns 64 keys: dK and dV, over all query heads of the group and the
tokens that see the keys, in one loop, so that loads run ahead across heads. No sum is shared between programs, so the
result has the same bits every time; the price is q and do read twice, and seven products in place of the five of one
walk along the sequence, which has to hold six sums in registers and runs alone on its multiprocessor (README.md).

Scores of `columns_kernel` are (keys, tokens): P and dS are operands straight from registers.

Shapes as in `triton.py`; `kept` (H, T, 2) fp32: lse in base 2, and D; `dsinks` (H, blocks) fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pegbox_kernels.attention.tiles import LN2, load_rows, locate, narrow, offsets_of, product, store_rows, wide
from pegbox_kernels.attention.triton import NEVER, row_sums
from pegbox_kernels.attention.window_forward import Rows, back, key_tile, of_members, own
from pegbox_kernels.launching import repeatable

if TYPE_CHECKING:
    from pegbox_kernels.attention.launch import Saved, Shape


class Columns(NamedTuple):
    """Launch of the kernel that owns keys: keys and tokens of a tile, warps, stages, most registers of a thread."""

    keys: int
    tokens: int
    warps: int
    stages: int
    registers: int | None = None


@triton.jit
def _toward(
    dq, q, do, k, v, lse2, delta, queries, low, keys, scale,
    FAR: tl.constexpr, NEAR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a tile of keys adds to dQ. FAR, NEAR: the window or the document's begin, the diagonal cuts the tile."""
    s = product(q, tl.trans(k), None, PRECISION)
    dp = product(do, tl.trans(v), None, PRECISION)
    p = tl.exp2(s * scale - lse2[:, None])
    if NEAR:
        p = tl.where(keys[None, :] <= queries[:, None], p, 0.0)
    if FAR:
        p = tl.where(keys[None, :] >= low[:, None], p, 0.0)
    return product(narrow(p * (dp - delta[:, None]), k.dtype), k, dq, PRECISION)


@repeatable
@triton.jit(do_not_specialize=NEVER)
def rows_kernel(
    q,
    k,
    v,
    do,
    out,
    lse,
    dlse,
    sinks,
    dq,
    kept,
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
    TOKENS: tl.constexpr,
    BUNDLES: tl.constexpr,
    HALF: tl.constexpr,
    FAR: tl.constexpr,
    SINK: tl.constexpr,
    DLSE: tl.constexpr,
    TABLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per (TOKENS tokens, BUNDLES x HEADS query heads). FAR: the window may end among the tokens."""
    index, head, kv_head = own(H, GROUP, HEADS, BUNDLES)
    start, begin, end = locate(table, index, blocks, tokens, TABLE, TOKENS, False)
    if start >= end:
        return
    row = tl.arange(0, TOKENS * HEADS)
    columns = tl.arange(0, WIDTH)
    queries = start + row % TOKENS
    low = tl.maximum(queries - window + 1, begin)
    keys0 = start - 2 * HALF + tl.arange(0, HALF)
    keys2 = start + tl.arange(0, TOKENS)
    k_at = k + kv_head * stride_kh
    v_at = v + kv_head * stride_vh
    k0 = key_tile(k_at, stride_kt, start - 2 * HALF, begin, end, columns, HALF, D)
    v0 = key_tile(v_at, stride_vt, start - 2 * HALF, begin, end, columns, HALF, D)
    k1 = key_tile(k_at, stride_kt, start - HALF, begin, end, columns, HALF, D)
    v1 = key_tile(v_at, stride_vt, start - HALF, begin, end, columns, HALF, D)
    k2 = key_tile(k_at, stride_kt, start, begin, end, columns, TOKENS, D)
    v2 = key_tile(v_at, stride_vt, start, begin, end, columns, TOKENS, D)
    q_at = q + wide(start) * stride_qt + wide(head) * stride_qh
    do_at = do + wide(start) * stride_dt + wide(head) * stride_dh
    out_at = wide(start) * (H * D) + head * D
    of_q = of_members(row, stride_qt, stride_qh, columns, TOKENS)
    of_do = of_members(row, stride_dt, stride_dh, columns, TOKENS)
    of_out = of_members(row, H * D, D, columns, TOKENS)
    for bundle in tl.range(0, BUNDLES, disable_licm=True):
        first = bundle * HEADS
        heads = head + first + row // TOKENS
        q_tile = load_rows(q_at + wide(first) * stride_qh, of_q, queries, end, columns, D, True)
        do_tile = load_rows(do_at + wide(first) * stride_dh, of_do, queries, end, columns, D, True)
        out_tile = load_rows(out + out_at + first * D, of_out, queries, end, columns, D, True)
        lse2, delta, share = row_sums(do_tile, out_tile, lse, dlse, sinks, queries, heads, tokens, end, SINK, DLSE)
        kept_at = kept + (heads.to(tl.int64) * tokens + queries) * 2
        tl.store(kept_at, lse2, mask=queries < end)
        tl.store(kept_at + 1, delta, mask=queries < end)
        if SINK:
            members = head + first + tl.arange(0, HEADS)
            share = tl.sum(tl.reshape(share, [HEADS, TOKENS]), 1)
            tl.store(dsinks + members.to(tl.int64) * blocks + index, share)
        acc = tl.zeros([TOKENS * HEADS, WIDTH], tl.float32)
        acc = _toward(
            acc, q_tile, do_tile, k0, v0, lse2, delta, queries, low, keys0, scale, True, False, PRECISION
        )  # fmt: skip
        acc = _toward(
            acc, q_tile, do_tile, k1, v1, lse2, delta, queries, low, keys0 + HALF, scale, True, False, PRECISION
        )  # fmt: skip
        acc = _toward(
            acc, q_tile, do_tile, k2, v2, lse2, delta, queries, low, keys2, scale, FAR, True, PRECISION
        )  # fmt: skip
        store_rows(dq + out_at + first * D, of_out, acc * (scale * LN2), queries, end, columns, D)


@triton.jit
def _collect(
    dk, dv, k, v, q_at, do_at, kept_at, n, stride_qt, stride_dt, keys, end, window, scale,
    D: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What TOKENS tokens from `n` on of a head add to dK and dV."""
    token = tl.arange(0, TOKENS)
    columns = tl.arange(0, k.shape[1])
    queries = n + token
    q = load_rows(q_at + wide(n) * stride_qt, offsets_of(token, stride_qt, columns), queries, end, columns, D, True)
    do = load_rows(do_at + wide(n) * stride_dt, offsets_of(token, stride_dt, columns), queries, end, columns, D, True)
    pair = tl.load(
        kept_at + (queries * 2)[:, None] + tl.arange(0, 2)[None, :], mask=(queries < end)[:, None], other=0.0
    )
    lse2, delta = tl.split(pair)
    s = product(k, tl.trans(q), None, PRECISION)
    dp = product(v, tl.trans(do), None, PRECISION)
    seen = (queries[None, :] >= keys[:, None]) & (queries[None, :] < (keys + window)[:, None])
    p = tl.where(seen, tl.exp2(s * scale - lse2[None, :]), 0.0)
    ds = narrow(p * (dp - delta[None, :]), q.dtype)
    dv = product(narrow(p, do.dtype), do, dv, PRECISION)
    dk = product(ds, q, dk, PRECISION)
    return dk, dv


@repeatable
@triton.jit(do_not_specialize=NEVER)
def columns_kernel(
    q,
    k,
    v,
    do,
    kept,
    dk,
    dv,
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
    KEYS: tl.constexpr,
    TOKENS: tl.constexpr,
    TABLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per (KEYS keys, key head)."""
    kv_heads: tl.constexpr = H // GROUP
    kv_head = wide(tl.program_id(0) % kv_heads)
    # Late keys first: what the rows' kernel read last may still be in the cache.
    start, _, end = locate(table, tl.program_id(0) // kv_heads, blocks, tokens, TABLE, KEYS, True)
    if start >= end:
        return
    key = tl.arange(0, KEYS)
    keys = start + key
    columns = tl.arange(0, WIDTH)
    of_k = offsets_of(key, stride_kt, columns)
    of_v = offsets_of(key, stride_vt, columns)
    k_tile = load_rows(k + kv_head * stride_kh + wide(start) * stride_kt, of_k, keys, end, columns, D, True)
    v_tile = load_rows(v + kv_head * stride_vh + wide(start) * stride_vt, of_v, keys, end, columns, D, True)
    q_at = q + kv_head * GROUP * stride_qh
    do_at = do + kv_head * GROUP * stride_dh
    row_at = kv_head * GROUP * tokens
    dk_tile = tl.zeros([KEYS, WIDTH], tl.float32)
    dv_tile = tl.zeros([KEYS, WIDTH], tl.float32)
    tiles = (tl.minimum(end - start, KEYS - 1 + window) + TOKENS - 1) // TOKENS
    for turn in tl.range(0, tiles * GROUP, disable_licm=True):
        member = wide(turn % GROUP)
        dk_tile, dv_tile = _collect(
            dk_tile, dv_tile, k_tile, v_tile, q_at + member * stride_qh, do_at + member * stride_dh,
            kept + (row_at + member * tokens) * 2, start + turn // GROUP * TOKENS,
            stride_qt, stride_dt, keys, end, window, scale, D, TOKENS, PRECISION,
        )  # fmt: skip
    at = wide(start) * (kv_heads * D) + kv_head * D
    offsets = offsets_of(key, kv_heads * D, columns)
    store_rows(dk + at, offsets, dk_tile * (scale * LN2), keys, end, columns, D)
    store_rows(dv + at, offsets, dv_tile, keys, end, columns, D)


def backward(
    saved: Saved, dk: Tensor, dv: Tensor, shape: Shape, rows: Rows, columns: Columns, blocks: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """dQ and the partial sums of dsinks; dK and dV are written into `dk` and `dv`.

    `blocks`: how many of `rows.tokens` tokens, and of `columns.keys` keys.
    """
    dq = torch.empty(saved.q.shape, dtype=saved.q.dtype, device=saved.q.device)
    kept = torch.empty(*saved.lse.shape, 2, dtype=torch.float32, device=saved.q.device)
    slots = blocks[0] if saved.sinks is not None else 0
    # Blocks without tokens leave before they write.
    make = torch.empty if saved.table is None else torch.zeros
    dsinks = make(shape.heads, slots, dtype=torch.float32, device=saved.q.device)
    window = shape.window or 0
    constants = {
        "H": shape.heads,
        "GROUP": shape.group,
        "D": shape.head_dim,
        "WIDTH": shape.width,
        "TABLE": saved.table is not None,
        "PRECISION": "ieee",
        "enable_fp_fusion": True,
    }
    strides = [stride for tensor in (saved.q, saved.k, saved.v, saved.dout) for stride in tensor.stride()[:2]]
    late, early = (saved.lse, saved.lse) if saved.table is None else saved.table.unbind()
    scale = shape.scale / LN2.value
    rows_kernel[rows.grid(shape, blocks[0])](
        *(saved.q, saved.k, saved.v, saved.dout, saved.out, saved.lse),
        saved.lse if saved.dlse is None else saved.dlse,
        saved.lse if saved.sinks is None else saved.sinks,
        *(dq, kept, dsinks, early, shape.tokens, blocks[0], window, *strides, scale),
        **constants,
        HEADS=rows.heads,
        TOKENS=rows.tokens,
        BUNDLES=rows.bundles,
        HALF=back(window) // 2,
        FAR=window < rows.tokens,
        SINK=saved.sinks is not None,
        DLSE=saved.dlse is not None,
        num_warps=rows.warps,
        num_stages=rows.stages,
        maxnreg=rows.registers,
    )
    columns_kernel[(blocks[1] * shape.kv_heads,)](
        *(saved.q, saved.k, saved.v, saved.dout, kept),
        *(dk, dv, late, shape.tokens, blocks[1], window, *strides, scale),
        **constants,
        KEYS=columns.keys,
        TOKENS=columns.tokens,
        num_warps=columns.warps,
        num_stages=columns.stages,
        maxnreg=columns.registers,
    )
    return dq, dsinks
