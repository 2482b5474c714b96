"""The Triton kernels of attention with sinks: forward, and backward in two ways.

Online softmax in base 2: with s in units of log2(e) the running maximum m and sum l of a row begin as the sink and 1,
since a sink is a score without a value; lse = ln2 (m + log2 l) then holds it, and so does all of the backward.

A forward program has BLOCK = tokens x heads rows: some tokens, of one or several query heads that share their keys and
values. It runs over tiles of keys in three phases (the far edge of the window, tiles that every row sees, the
diagonal), of which the first and last look at masks. Keys that no row sees are not visited.

Backward, atomic: one program per tile of keys and key head loops over the query heads of the group and over tiles of
queries; dK and dV stay in fp32 registers, dQ tiles are added into an fp32 buffer, in no certain order (5 products).
Backward, ordered: the same program without dQ, and another per tile of queries for dQ (7 products), which
gives the same bits every time. Short windows have kernels of their own, `window_forward.py` and `window_backward.py`.

For dK and dV scores are computed transposed (keys, queries), so that P^T and dS^T are operands straight from
registers; only dS changes its layout through shared memory, for dQ. Or (STRAIGHT) as in the forward:
dS is the operand for dQ from registers, P and dS are written to shared memory for dV and dK, which are accumulated
transposed; statistics of a query are then one number per row instead of a row per thread.

Loops over heads and steps forbid hoisting of loop invariants (disable_licm): addresses kept in registers all along
would spill the accumulators.

Shapes: q (T, H, D), k, v (T, K, D), out (T, H, D) contiguous, lse (H, T) fp32,
stats (H, T, 2) fp32: lse in base 2, and D; dsinks (H, blocks) fp32 partial sums. Addresses are 64-bit. `table` is
described in `tiles.py`. The two stats of a token lie beside each other, because a tile of pairs has a number for each
thread to load once; of 64 numbers for 128 threads the compiler makes each thread load all that it will use.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pegbox_kernels.attention.tiles import (
    LN2,
    LOG2E,
    LOWEST,
    is_seen,
    key_range,
    load_rows,
    locate,
    narrow,
    of_bundle,
    offsets_of,
    product,
    query_range,
    store_rows,
    two_runs,
    wide,
)
from pegbox_kernels.launching import repeatable

NEVER = ["tokens", "blocks", "window"]
"""Runtime numbers that no kernel is compiled anew for."""


@triton.jit
def _attend(
    acc,
    m,
    l,  # noqa: E741
    q,
    k_at,
    v_at,
    low,
    gap,
    resume,
    high,
    queries,
    end,
    window,
    stride_kt,
    stride_vt,
    scale,
    D: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    EDGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take the tiles of keys from `low` to `high` into the sums of the rows."""
    columns = tl.arange(0, q.shape[1])
    of_k = offsets_of(tl.arange(0, KEYS), stride_kt, columns)
    of_v = offsets_of(tl.arange(0, KEYS), stride_vt, columns)
    before, tiles = two_runs(low, gap, resume, high, KEYS)
    for tile in range(tiles):
        n = low + tile * KEYS
        if EDGE:
            n += tl.where(tile < before, 0, resume - gap)
        keys = n + tl.arange(0, KEYS)
        k = load_rows(k_at + wide(n) * stride_kt, of_k, keys, end, columns, D, EDGE)
        s = product(q, tl.trans(k), None, PRECISION)
        if EDGE:
            s = tl.where(is_seen(queries[:, None], keys[None, :], end, window, CAUSAL, WINDOWED), s, -float("inf"))
        top = tl.maximum(m, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - top[:, None])
        decay = tl.exp2(m - top)
        l = l * decay + tl.sum(p, 1)  # noqa: E741
        v = load_rows(v_at + wide(n) * stride_vt, of_v, keys, end, columns, D, EDGE)
        acc = product(narrow(p, v.dtype), v, acc * decay[:, None], PRECISION)
        m = top
    return acc, m, l


@repeatable
@triton.jit(do_not_specialize=NEVER)
def forward_kernel(
    q,
    k,
    v,
    sinks,
    out,
    lse,
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
    scale,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    MASKED: tl.constexpr,
    SINK: tl.constexpr,
    TABLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per (block of TOKENS tokens, HEADS query heads); heads are the faster index, long blocks first."""
    bundle = tl.program_id(0) % (H // HEADS)
    start, begin, end = locate(table, tl.program_id(0) // (H // HEADS), blocks, tokens, TABLE, TOKENS, CAUSAL)
    if start >= end:
        return
    row = tl.arange(0, TOKENS * HEADS)
    queries = start + row // HEADS
    heads = bundle * HEADS + row % HEADS
    columns = tl.arange(0, WIDTH)
    kv_head = wide(bundle * HEADS // GROUP)
    k_at = k + kv_head * stride_kh
    v_at = v + kv_head * stride_vh

    q_at = q + wide(start) * stride_qt + wide(bundle * HEADS) * stride_qh
    tile = load_rows(q_at, of_bundle(row, stride_qt, stride_qh, columns, HEADS), queries, end, columns, D, True)
    acc = tl.zeros([TOKENS * HEADS, WIDTH], tl.float32)
    m = tl.full([TOKENS * HEADS], LOWEST, tl.float32)
    l = tl.zeros([TOKENS * HEADS], tl.float32)  # noqa: E741
    if SINK:
        sink = tl.load(sinks + heads).to(tl.float32) * LOG2E
        m = tl.maximum(sink, LOWEST)
        l = tl.exp2(sink - m)  # noqa: E741
    first, left, clear, stop = key_range(start, begin, end, window, TOKENS, KEYS, CAUSAL, WINDOWED, MASKED)
    if not MASKED:
        acc, m, l = _attend(  # noqa: E741
            acc, m, l, tile, k_at, v_at, left, left, left, clear, queries, end, window, stride_kt, stride_vt, scale,
            D, KEYS, CAUSAL, WINDOWED, False, PRECISION,
        )  # fmt: skip
    acc, m, l = _attend(  # noqa: E741
        acc, m, l, tile, k_at, v_at, first, left, clear, stop, queries, end, window, stride_kt, stride_vt, scale,
        D, KEYS, CAUSAL, WINDOWED, True, PRECISION,
    )  # fmt: skip
    out_at = out + wide(start) * (H * D) + bundle * HEADS * D
    store_rows(out_at, of_bundle(row, H * D, D, columns, HEADS), acc / l[:, None], queries, end, columns, D)
    tl.store(lse + heads.to(tl.int64) * tokens + queries, (m + tl.log2(l)) * LN2, mask=queries < end)


@triton.jit
def row_sums(do, out, lse, dlse, sinks, queries, heads, tokens, end, SINK: tl.constexpr, DLSE: tl.constexpr):
    """Of rows of outputs: lse in base 2, D = do . out - dlse, and what each adds to the gradient of its sink.

    A row after the end has lse = +inf, so that all its probabilities are zero.
    """
    inside = queries < end
    at = heads.to(tl.int64) * tokens + queries
    total = tl.load(lse + at, mask=inside, other=float("inf"))
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    if DLSE:
        delta -= tl.load(dlse + at, mask=inside, other=0.0)
    share = tl.zeros_like(delta)
    if SINK:
        # The difference first: a large sink and its lse, rounded apart, would not cancel.
        share = -tl.exp2((tl.load(sinks + heads).to(tl.float32) - total) * LOG2E) * delta
    return total * LOG2E, delta, share


@triton.jit
def _keep(stats, lse2, delta, heads, queries, tokens, end):
    at = stats + (wide(heads) * tokens + queries) * 2
    tl.store(at[:, None] + tl.arange(0, 2)[None, :], tl.join(lse2, delta), mask=(queries < end)[:, None])


@triton.jit
def _store_share(dsinks, share, block, blocks, bundle, TOKENS: tl.constexpr, HEADS: tl.constexpr):
    heads = bundle * HEADS + tl.arange(0, HEADS)
    total = tl.sum(tl.reshape(share, [TOKENS, HEADS]), 0)
    tl.store(dsinks + heads.to(tl.int64) * blocks + block, total)


@repeatable
@triton.jit(do_not_specialize=NEVER)
def prepare_kernel(
    do,
    out,
    lse,
    dlse,
    sinks,
    stats,
    dsinks,
    tokens,
    blocks,
    stride_dt,
    stride_dh,
    H: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    SINK: tl.constexpr,
    DLSE: tl.constexpr,
):
    """D of every row, for the atomic way, which has no program that owns a row. Documents do not matter here."""
    head = tl.program_id(0) % H
    block = tl.program_id(0) // H
    start = block * TOKENS
    queries = start + tl.arange(0, TOKENS)
    heads = head + tl.zeros([TOKENS], tl.int32)
    columns = tl.arange(0, WIDTH)
    token = tl.arange(0, TOKENS)
    do_at = do + wide(start) * stride_dt + wide(head) * stride_dh
    do_tile = load_rows(do_at, offsets_of(token, stride_dt, columns), queries, tokens, columns, D, True)
    out_at = out + wide(start) * (H * D) + head * D
    out_tile = load_rows(out_at, offsets_of(token, H * D, columns), queries, tokens, columns, D, True)
    lse2, sums, share = row_sums(do_tile, out_tile, lse, dlse, sinks, queries, heads, tokens, tokens, SINK, DLSE)
    _keep(stats, lse2, sums, heads, queries, tokens, tokens)
    if SINK:
        _store_share(dsinks, share, block, blocks, head, TOKENS, 1)


@triton.jit
def _add_dq(
    dq,
    q,
    do,
    lse2,
    delta,
    k_at,
    v_at,
    low,
    gap,
    resume,
    high,
    queries,
    end,
    window,
    stride_kt,
    stride_vt,
    scale,
    D: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    EDGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    columns = tl.arange(0, q.shape[1])
    of_k = offsets_of(tl.arange(0, KEYS), stride_kt, columns)
    of_v = offsets_of(tl.arange(0, KEYS), stride_vt, columns)
    before, tiles = two_runs(low, gap, resume, high, KEYS)
    for tile in range(tiles):
        n = low + tile * KEYS
        if EDGE:
            n += tl.where(tile < before, 0, resume - gap)
        keys = n + tl.arange(0, KEYS)
        k = load_rows(k_at + wide(n) * stride_kt, of_k, keys, end, columns, D, EDGE)
        v = load_rows(v_at + wide(n) * stride_vt, of_v, keys, end, columns, D, EDGE)
        s = product(q, tl.trans(k), None, PRECISION)
        dp = product(do, tl.trans(v), None, PRECISION)
        p = tl.exp2(s * scale - lse2[:, None])
        if EDGE:
            p = tl.where(is_seen(queries[:, None], keys[None, :], end, window, CAUSAL, WINDOWED), p, 0.0)
        ds = p * (dp - delta[:, None])
        dq = product(narrow(ds, k.dtype), k, dq, PRECISION)
    return dq


@repeatable
@triton.jit(do_not_specialize=NEVER)
def queries_kernel(
    q,
    k,
    v,
    do,
    out,
    lse,
    dlse,
    sinks,
    dq,
    stats,
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
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    MASKED: tl.constexpr,
    SINK: tl.constexpr,
    DLSE: tl.constexpr,
    TABLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Ordered way, first: dQ of a block as the forward has blocks, with D (kept for the keys) and sinks beside it."""
    bundle = tl.program_id(0) % (H // HEADS)
    block = tl.program_id(0) // (H // HEADS)
    start, begin, end = locate(table, block, blocks, tokens, TABLE, TOKENS, CAUSAL)
    row = tl.arange(0, TOKENS * HEADS)
    if start >= end:
        if SINK:
            _store_share(dsinks, tl.zeros([TOKENS * HEADS], tl.float32), block, blocks, bundle, TOKENS, HEADS)
        return
    queries = start + row // HEADS
    heads = bundle * HEADS + row % HEADS
    columns = tl.arange(0, WIDTH)
    kv_head = wide(bundle * HEADS // GROUP)
    k_at = k + kv_head * stride_kh
    v_at = v + kv_head * stride_vh
    head = wide(bundle * HEADS)
    out_at = wide(start) * (H * D) + head * D
    of_out = of_bundle(row, H * D, D, columns, HEADS)
    of_do = of_bundle(row, stride_dt, stride_dh, columns, HEADS)
    of_q = of_bundle(row, stride_qt, stride_qh, columns, HEADS)

    do_tile = load_rows(do + wide(start) * stride_dt + head * stride_dh, of_do, queries, end, columns, D, True)
    out_tile = load_rows(out + out_at, of_out, queries, end, columns, D, True)
    lse2, sums, share = row_sums(do_tile, out_tile, lse, dlse, sinks, queries, heads, tokens, end, SINK, DLSE)
    _keep(stats, lse2, sums, heads, queries, tokens, end)
    if SINK:
        _store_share(dsinks, share, block, blocks, bundle, TOKENS, HEADS)
    tile = load_rows(q + wide(start) * stride_qt + head * stride_qh, of_q, queries, end, columns, D, True)
    acc = tl.zeros([TOKENS * HEADS, WIDTH], tl.float32)
    first, left, clear, stop = key_range(start, begin, end, window, TOKENS, KEYS, CAUSAL, WINDOWED, MASKED)
    if not MASKED:
        acc = _add_dq(
            acc, tile, do_tile, lse2, sums, k_at, v_at, left, left, left, clear, queries, end, window, stride_kt,
            stride_vt, scale, D, KEYS, CAUSAL, WINDOWED, False, PRECISION,
        )  # fmt: skip
    acc = _add_dq(
        acc, tile, do_tile, lse2, sums, k_at, v_at, first, left, clear, stop, queries, end, window, stride_kt,
        stride_vt, scale, D, KEYS, CAUSAL, WINDOWED, True, PRECISION,
    )  # fmt: skip
    store_rows(dq + out_at, of_out, acc * (scale * LN2), queries, end, columns, D)


@triton.jit
def _add_dkv(
    dk,
    dv,
    k,
    v,
    q_at,
    do_at,
    dq_at,
    stats_at,
    low,
    gap,
    resume,
    high,
    keys,
    end,
    window,
    stride_qt,
    stride_dt,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    EDGE: tl.constexpr,
    ATOMIC: tl.constexpr,
    STRAIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take the tiles of queries from `low` to `high` of one head into the gradients of the keys."""
    columns = tl.arange(0, k.shape[1])
    token = tl.arange(0, TOKENS)
    of_q = offsets_of(token, stride_qt, columns)
    of_do = offsets_of(token, stride_dt, columns)
    of_dq = offsets_of(token, H * D, columns)
    before, tiles = two_runs(low, gap, resume, high, TOKENS)
    for tile in range(tiles):
        n = low + tile * TOKENS
        if EDGE:
            n += tl.where(tile < before, 0, resume - gap)
        queries = n + token
        q = load_rows(q_at + wide(n) * stride_qt, of_q, queries, end, columns, D, EDGE)
        inside = queries < end
        stats_of = stats_at + (queries * 2)[:, None] + tl.arange(0, 2)[None, :]
        if EDGE:
            lse2, delta = tl.split(tl.load(stats_of, mask=inside[:, None], other=float("inf")))
            delta = tl.where(inside, delta, 0.0)
        else:
            lse2, delta = tl.split(tl.load(stats_of))
        if STRAIGHT:
            s = product(q, tl.trans(k), None, PRECISION)
            p = tl.exp2(s * scale - lse2[:, None])
            if EDGE:
                p = tl.where(is_seen(queries[:, None], keys[None, :], end, window, CAUSAL, WINDOWED), p, 0.0)
        else:
            s = product(k, tl.trans(q), None, PRECISION)
            p = tl.exp2(s * scale - lse2[None, :])
            if EDGE:
                p = tl.where(is_seen(queries[None, :], keys[:, None], end, window, CAUSAL, WINDOWED), p, 0.0)
        do = load_rows(do_at + wide(n) * stride_dt, of_do, queries, end, columns, D, EDGE)
        if STRAIGHT:
            dv = product(tl.trans(do), narrow(p, do.dtype), dv, PRECISION)
            dp = product(do, tl.trans(v), None, PRECISION)
            ds = narrow(p * (dp - delta[:, None]), q.dtype)
            dk = product(tl.trans(q), ds, dk, PRECISION)
        else:
            dv = product(narrow(p, do.dtype), do, dv, PRECISION)
            dp = product(v, tl.trans(do), None, PRECISION)
            ds = narrow(p * (dp - delta[None, :]), q.dtype)
            dk = product(ds, q, dk, PRECISION)
        if ATOMIC:
            dq = product(ds, k, None, PRECISION) if STRAIGHT else tl.trans(product(tl.trans(k), ds, None, PRECISION))
            added = inside[:, None] & (columns < D)[None, :]
            tl.atomic_add(dq_at + wide(n) * (H * D) + of_dq, dq, mask=added, sem="relaxed")
    return dk, dv


@repeatable
@triton.jit(do_not_specialize=NEVER)
def keys_kernel(
    q,
    k,
    v,
    do,
    stats,
    dq,
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
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    MASKED: tl.constexpr,
    TABLE: tl.constexpr,
    ATOMIC: tl.constexpr,
    STRAIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dK and dV of a block of keys, over all query heads of the group; ATOMIC: adds dQ / scale into fp32, too."""
    kv_heads: tl.constexpr = H // GROUP
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    start, begin, end = locate(table, tl.program_id(0) // kv_heads, blocks, tokens, TABLE, KEYS, False)
    if start >= end:
        return
    keys = start + tl.arange(0, KEYS)
    columns = tl.arange(0, WIDTH)
    key = tl.arange(0, KEYS)
    k_at = k + kv_head * stride_kh + wide(start) * stride_kt
    k_tile = load_rows(k_at, offsets_of(key, stride_kt, columns), keys, end, columns, D, True)
    v_at = v + kv_head * stride_vh + wide(start) * stride_vt
    v_tile = load_rows(v_at, offsets_of(key, stride_vt, columns), keys, end, columns, D, True)
    dk_tile = tl.zeros([WIDTH, KEYS] if STRAIGHT else [KEYS, WIDTH], tl.float32)
    dv_tile = tl.zeros([WIDTH, KEYS] if STRAIGHT else [KEYS, WIDTH], tl.float32)
    first, clear, last, stop = query_range(start, begin, end, window, KEYS, TOKENS, CAUSAL, WINDOWED, MASKED)
    for member in tl.range(0, GROUP, disable_licm=True):
        head = kv_head * GROUP + member
        q_at = q + head * stride_qh
        do_at = do + head * stride_dh
        dq_at = dq + head * D
        stats_at = stats + head * tokens * 2
        if not MASKED:
            dk_tile, dv_tile = _add_dkv(
                dk_tile, dv_tile, k_tile, v_tile, q_at, do_at, dq_at, stats_at, clear, clear, clear, last,
                keys, end, window, stride_qt, stride_dt, scale, H, D, TOKENS, CAUSAL, WINDOWED, False, ATOMIC, STRAIGHT,
                PRECISION,
            )  # fmt: skip
        dk_tile, dv_tile = _add_dkv(
            dk_tile, dv_tile, k_tile, v_tile, q_at, do_at, dq_at, stats_at, first, clear, last, stop,
            keys, end, window, stride_qt, stride_dt, scale, H, D, TOKENS, CAUSAL, WINDOWED, True, ATOMIC, STRAIGHT,
                PRECISION,
        )  # fmt: skip
    if STRAIGHT:
        dk_tile = tl.trans(dk_tile)
        dv_tile = tl.trans(dv_tile)
    at = wide(start) * (kv_heads * D) + kv_head * D
    offsets = offsets_of(key, kv_heads * D, columns)
    store_rows(dk + at, offsets, dk_tile * (scale * LN2), keys, end, columns, D)
    store_rows(dv + at, offsets, dv_tile, keys, end, columns, D)
