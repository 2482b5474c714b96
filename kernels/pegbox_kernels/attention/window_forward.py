"""Forward of attention with a short window, in one pass over the keys: all scores of a row are in registers at once.

A program owns some tokens of one key head, whose keys are the BACK before the first token and the tokens themselves:
128 + 32 for 32 tokens, loaded once and kept in shared memory while it goes through the query heads of the group, the
next ones being loaded meanwhile. With every score of a row at hand there is one maximum, one sum and no rescaling of
outputs. Few registers and little shared memory let three programs share a multiprocessor: the passes over
q and out are what bounds this kernel, and other programs hide each one's waits.

Shapes as in `triton.py`. Rows of a tile are heads x tokens, tokens the faster index.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from pegbox_kernels.attention.tiles import LN2, LOG2E, load_rows, locate, narrow, offsets_of, product, store_rows, wide
from pegbox_kernels.attention.triton import NEVER
from pegbox_kernels.launching import repeatable

if TYPE_CHECKING:
    from pegbox_kernels.attention.launch import Shape

FURTHEST = 128
"""Keys before a token that the kernels of short windows hold at most."""


class Rows(NamedTuple):
    """How a kernel that owns tokens is launched: tokens and query heads of a tile, tiles of a program, warps, stages,
    and the most registers of a thread.
    """

    tokens: int
    heads: int
    bundles: int
    warps: int
    stages: int
    registers: int | None = None

    def fitted(self, shape: Shape) -> Rows:
        """With as many rows, for a group of any size."""
        heads = shape.packed(self.heads)
        left = shape.group // heads
        bundles = max(count for count in range(1, self.bundles + 1) if left % count == 0)
        return self._replace(tokens=self.tokens * self.heads // heads, heads=heads, bundles=bundles)

    def grid(self, shape: Shape, blocks: int) -> tuple[int]:
        return (blocks * (shape.heads // (self.heads * self.bundles)),)


def fits(window: int | None, width: int, itemsize: int) -> bool:
    """Whether these kernels and those of `window_backward.py` take a call: they hold a window, products are fast."""
    return window is not None and window <= FURTHEST + 1 and width <= 64 and itemsize == 2


def back(window: int) -> int:
    """Keys of the tile before the tokens: a power of two that holds the window."""
    return min(FURTHEST, max(32, 1 << max(0, window - 2).bit_length()))


@triton.jit
def of_members(row, stride_t, stride_h, columns, TOKENS: tl.constexpr):
    """Offsets of rows that are TOKENS tokens of each head."""
    return ((row % TOKENS) * stride_t + (row // TOKENS) * stride_h)[:, None] + columns[None, :]


@triton.jit
def key_tile(base, stride, at, begin, end, columns, KEYS: tl.constexpr, D: tl.constexpr):
    """KEYS rows from `at` on; those outside of the document are zero."""
    key = tl.arange(0, KEYS)
    inside = ((at + key >= begin) & (at + key < end))[:, None] & (columns < D)[None, :]
    return tl.load(base + wide(at) * stride + offsets_of(key, stride, columns), mask=inside, other=0.0)


@triton.jit
def own(H: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, BUNDLES: tl.constexpr):
    """Of a program: the index of its block, its first query head and its key head. Heads are the faster index."""
    shares: tl.constexpr = H // (HEADS * BUNDLES)
    head = (tl.program_id(0) % shares) * (HEADS * BUNDLES)
    return tl.program_id(0) // shares, head, wide(head // GROUP)


@repeatable
@triton.jit(do_not_specialize=NEVER)
def single_kernel(
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
    BUNDLES: tl.constexpr,
    BACK: tl.constexpr,
    FAR: tl.constexpr,
    SINK: tl.constexpr,
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
    keys0 = start - BACK + tl.arange(0, BACK)
    keys1 = start + tl.arange(0, TOKENS)
    k_at = k + kv_head * stride_kh
    v_at = v + kv_head * stride_vh
    k0 = key_tile(k_at, stride_kt, start - BACK, begin, end, columns, BACK, D)
    k1 = key_tile(k_at, stride_kt, start, begin, end, columns, TOKENS, D)
    v0 = key_tile(v_at, stride_vt, start - BACK, begin, end, columns, BACK, D)
    v1 = key_tile(v_at, stride_vt, start, begin, end, columns, TOKENS, D)
    q_at = q + wide(start) * stride_qt + wide(head) * stride_qh
    out_at = out + wide(start) * (H * D) + head * D
    of_q = of_members(row, stride_qt, stride_qh, columns, TOKENS)
    of_out = of_members(row, H * D, D, columns, TOKENS)
    for bundle in tl.range(0, BUNDLES, disable_licm=True):
        first = bundle * HEADS
        heads = head + first + row // TOKENS
        tile = load_rows(q_at + wide(first) * stride_qh, of_q, queries, end, columns, D, True)
        s0 = product(tile, tl.trans(k0), None, PRECISION)
        s1 = product(tile, tl.trans(k1), None, PRECISION)
        s0 = tl.where(keys0[None, :] >= low[:, None], s0, -float("inf"))
        seen = keys1[None, :] <= queries[:, None]
        if FAR:
            seen = seen & (keys1[None, :] >= low[:, None])
        s1 = tl.where(seen, s1, -float("inf"))
        m = tl.maximum(tl.max(s0, 1), tl.max(s1, 1)) * scale
        if SINK:
            sink = tl.load(sinks + heads).to(tl.float32) * LOG2E
            m = tl.maximum(m, sink)
        p0 = tl.exp2(s0 * scale - m[:, None])
        p1 = tl.exp2(s1 * scale - m[:, None])
        l = tl.sum(p0, 1) + tl.sum(p1, 1)  # noqa: E741
        if SINK:
            l += tl.exp2(sink - m)  # noqa: E741
        acc = product(narrow(p0, v0.dtype), v0, None, PRECISION)
        acc = product(narrow(p1, v1.dtype), v1, acc, PRECISION)
        store_rows(out_at + first * D, of_out, acc * (1 / l)[:, None], queries, end, columns, D)
        tl.store(lse + heads.to(tl.int64) * tokens + queries, (m + tl.log2(l)) * LN2, mask=queries < end)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    table: Tensor | None,
    shape: Shape,
    rows: Rows,
    blocks: int,
) -> None:
    """Writes out (T, H, D) and lse (H, T) fp32; `blocks` of `rows.tokens` tokens. At least one token."""
    window = shape.window or 0
    single_kernel[rows.grid(shape, blocks)](
        q,
        k,
        v,
        lse if sinks is None else sinks,
        out,
        lse,
        lse if table is None else table[1],
        shape.tokens,
        blocks,
        window,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        shape.scale / LN2.value,
        H=shape.heads,
        GROUP=shape.group,
        D=shape.head_dim,
        WIDTH=shape.width,
        HEADS=rows.heads,
        TOKENS=rows.tokens,
        BUNDLES=rows.bundles,
        BACK=back(window),
        FAR=window < rows.tokens,
        SINK=sinks is not None,
        TABLE=table is not None,
        PRECISION="ieee",
        num_warps=rows.warps,
        num_stages=rows.stages,
        maxnreg=rows.registers,
        enable_fp_fusion=True,
    )
