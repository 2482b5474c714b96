"""The forward of attention with sinks for Hopper, written in Gluon: warps with roles, TMA, products in flight.

A program has one warp that only asks for tiles (Q once; K and V into rings of shared memory, by TMA) and two or three
warpgroups that compute, each for its own unit: ROWS tokens of one query head. The units of a program share their key
head, so they take the same tiles of keys, from the last (the diagonal) to the first. While a warpgroup takes the
softmax of one tile, its product of the last probabilities with V is in flight, and so are products of the others
(FlashAttention-3, arXiv:2407.08608, sections 3.1 and 3.2; to let the warpgroups issue products in turns, by named
barriers, was 5 % faster at 8192 tokens and heads of 64, equal at 16384, and slower with heads of 128).

A granule of tokens (`tiles.py`) and a key head have GRANULE / ROWS x GROUP units, later tokens first, heads of the
group the faster index; a program takes CONSUMERS of them in turn, and what is left over in the last is masked.

For one document, which is all tokens: a tile is not cut at the end of a document, and what a token after it holds, NaN
even, must never reach another one; after the last token there are zeros.

Shapes as in `triton.py`; q, k and v are read by descriptors of (heads, tokens, head_dim).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from pegbox_kernels.attention import tiles
from pegbox_kernels.dispatch import quotient

if TYPE_CHECKING:
    from pegbox_kernels.attention.launch import Shape

GRANULE = gl.constexpr(tiles.GRANULE.value)
ROWS = gl.constexpr(64)
"""Tokens of a unit: the rows of one product of a warpgroup."""
LOG2E = gl.constexpr(tiles.LOG2E.value)
LN2 = gl.constexpr(tiles.LN2.value)
LOWEST = gl.constexpr(tiles.LOWEST.value)
# Until Triton 3.6, and since.
fetch = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


class Crew(NamedTuple):
    """Warpgroups that compute, keys of a tile, and stages of the rings of K and V."""

    consumers: int
    keys: int
    stages: int


@gluon.jit
def _unit(index, bundle, kv_head, start, end, GROUP: gl.constexpr, CONSUMERS: gl.constexpr):
    """First token and query head of the unit of warpgroup `index`; one that is none begins at the end."""
    units: gl.constexpr = GRANULE // ROWS * GROUP
    unit = bundle * CONSUMERS + index
    token = start + (GRANULE // ROWS - 1 - unit // GROUP) * ROWS
    token = gl.where(unit < units, token, end)
    return token, kv_head * GROUP + unit % GROUP


@gluon.jit
def _load_tiles(
    load, place, GROUP: gl.constexpr, CONSUMERS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """The warp that loads."""
    q_of, k_of, v_of, q_tiles, k_tiles, v_tiles, q_full, k_full, v_full, k_free, v_free = load
    bundle, kv_head, start, end, tiles = place
    for i in gl.static_range(CONSUMERS):
        token, head = _unit(i, bundle, kv_head, start, end, GROUP, CONSUMERS)
        mbarrier.expect(q_full.index(i), q_of.block_type.nbytes)
        fetch(q_of, [head, token, 0], q_full.index(i), q_tiles.index(i))
    for j in range(tiles):
        stage = j % STAGES
        phase = (j // STAGES) & 1
        key = (tiles - 1 - j) * KEYS
        mbarrier.wait(k_free.index(stage), phase ^ 1)
        mbarrier.expect(k_full.index(stage), k_of.block_type.nbytes)
        fetch(k_of, [kv_head, key, 0], k_full.index(stage), k_tiles.index(stage))
        mbarrier.wait(v_free.index(stage), phase ^ 1)
        mbarrier.expect(v_full.index(stage), v_of.block_type.nbytes)
        fetch(v_of, [kv_head, key, 0], v_full.index(stage), v_tiles.index(stage))


@gluon.jit
def _softmax(
    s, m, l, queries, keys, end, scale,  # noqa: E741
    CAUSAL: gl.constexpr, EDGE: gl.constexpr,
):  # fmt: skip
    """Probabilities of a tile of scores, what earlier sums are multiplied by, and the new maximum and sum."""
    if EDGE:
        seen = (keys[None, :] <= queries[:, None]) if CAUSAL else ((keys < end)[None, :] & (queries >= 0)[:, None])
        s = gl.where(seen, s, -float("inf"))
    top = gl.maximum(m, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - top[:, None])
    decay = gl.exp2(m - top)
    l = l * decay + gl.sum(p, 1)  # noqa: E741
    return p, decay, top, l


@gluon.jit
def _scores(q_tile, k_tiles, stage, KEYS: gl.constexpr, D: gl.constexpr, SCORES: gl.constexpr):
    """The product Q K^T, in flight."""
    k_tile = k_tiles.index(stage).reshape([KEYS, D]).permute((1, 0))
    none = gl.zeros([ROWS, KEYS], gl.float32, SCORES)
    return warpgroup_mma(q_tile, k_tile, none, use_acc=False, is_async=True)


@gluon.jit
def _step(
    j, acc, p, m, l,  # noqa: E741
    q_tile, k_tiles, v_tiles, k_full, v_full, k_free, v_free, queries, columns, tiles, end, scale,
    INDEX: gl.constexpr, D: gl.constexpr, CONSUMERS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, EDGE: gl.constexpr,
    SCORES: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """Tile j of the keys, j > 0; `p` are the probabilities of the one before, whose product with V is issued here."""
    stage = j % STAGES
    last = (j - 1) % STAGES
    taken = gl.convert_layout(p.to(q_tile.dtype), gl.DotOperandLayout(0, SUMS, 2))
    mbarrier.wait(k_full.index(stage), (j // STAGES) & 1)
    s = _scores(q_tile, k_tiles, stage, KEYS, D, SCORES)
    mbarrier.wait(v_full.index(last), ((j - 1) // STAGES) & 1)
    acc = warpgroup_mma(taken, v_tiles.index(last).reshape([KEYS, D]), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(k_free.index(stage), count=1)
    keys = (tiles - 1 - j) * KEYS + columns
    p = s
    decay = m
    # It always is. Without a branch the assembler would move the wait for P V up, before all of the softmax.
    if j + end > 0:
        p, decay, m, l = _softmax(s, m, l, queries, keys, end, scale, CAUSAL, EDGE)  # noqa: E741
    acc, _ = warpgroup_mma_wait(0, deps=[acc, taken])
    mbarrier.arrive(v_free.index(last), count=1)
    acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, SUMS))[:, None]
    return acc, p, m, l


@gluon.jit
def _attend(
    read, place, rest, INDEX: gl.constexpr, H: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr,
    CONSUMERS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    SINK: gl.constexpr,
):  # fmt: skip
    """A warpgroup that computes one unit."""
    q_tiles, k_tiles, v_tiles, q_full, k_full, v_full, k_free, v_free = read
    bundle, kv_head, start, end, tiles = place
    sinks, out, lse, tokens, scale = rest
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    token, head = _unit(INDEX, bundle, kv_head, start, end, GROUP, CONSUMERS)
    queries = token + gl.arange(0, ROWS, ROW)
    columns = gl.arange(0, KEYS, gl.SliceLayout(0, SCORES))
    m = gl.full([ROWS], LOWEST, gl.float32, ROW)
    l = gl.zeros([ROWS], gl.float32, ROW)  # noqa: E741
    if SINK:
        sink = gl.load(sinks + head).to(gl.float32) * LOG2E
        m = gl.maximum(m, sink)
        l = gl.exp2(sink - m)  # noqa: E741
    acc = gl.zeros([ROWS, D], gl.float32, SUMS)

    # Tiles that all rows see in full: all but the first `masked`.
    clear = (gl.minimum(token + 1, end) if CAUSAL else end) // KEYS
    masked = tiles - gl.minimum(clear, tiles)

    q_tile = q_tiles.index(INDEX).reshape([ROWS, D])
    mbarrier.wait(q_full.index(INDEX), 0)
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma_wait(0, deps=[_scores(q_tile, k_tiles, 0, KEYS, D, SCORES)])
    mbarrier.arrive(k_free.index(0), count=1)
    keys = (tiles - 1) * KEYS + columns
    p, _, m, l = _softmax(s, m, l, queries, keys, end, scale, CAUSAL, True)  # noqa: E741
    for j in range(1, masked):
        acc, p, m, l = _step(  # noqa: E741
            j, acc, p, m, l, q_tile, k_tiles, v_tiles, k_full, v_full, k_free, v_free, queries, columns, tiles,
            end, scale, INDEX, D, CONSUMERS, KEYS, STAGES, CAUSAL, True, SCORES, SUMS,
        )  # fmt: skip
    for j in range(gl.maximum(masked, 1), tiles):
        acc, p, m, l = _step(  # noqa: E741
            j, acc, p, m, l, q_tile, k_tiles, v_tiles, k_full, v_full, k_free, v_free, queries, columns, tiles,
            end, scale, INDEX, D, CONSUMERS, KEYS, STAGES, CAUSAL, False, SCORES, SUMS,
        )  # fmt: skip
    last = (tiles - 1) % STAGES
    mbarrier.wait(v_full.index(last), ((tiles - 1) // STAGES) & 1)
    taken = gl.convert_layout(p.to(q_tile.dtype), gl.DotOperandLayout(0, SUMS, 2))
    acc = warpgroup_mma(taken, v_tiles.index(last).reshape([KEYS, D]), acc, is_async=True)
    gl.store(lse + head.to(gl.int64) * tokens + queries, (m + gl.log2(l)) * LN2, mask=queries < end)
    acc, _ = warpgroup_mma_wait(0, deps=[acc, taken])
    acc = acc * gl.convert_layout(1.0 / l, gl.SliceLayout(1, SUMS))[:, None]

    # Through shared memory, for whole rows; that of Q is free now.
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    q_tile.store(acc.to(q_tiles.dtype))
    rows = token + gl.arange(0, ROWS, gl.SliceLayout(1, WIDE))
    at = rows.to(gl.int64)[:, None] * (H * D) + (head * D + gl.arange(0, D, gl.SliceLayout(0, WIDE)))[None, :]
    gl.store(out + at, q_tile.load(WIDE), mask=(rows < end)[:, None])


@gluon.jit(do_not_specialize=["tokens", "granules"])
def hopper_forward_kernel(
    q_of, k_of, v_of, sinks, out, lse, tokens, granules, scale,
    H: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, CONSUMERS: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, SINK: gl.constexpr,
):  # fmt: skip
    """One program per (granule, bundle of units, key head); key heads are the fastest index, long granules first."""
    KV: gl.constexpr = H // GROUP
    BUNDLES: gl.constexpr = (GRANULE // ROWS * GROUP + CONSUMERS - 1) // CONSUMERS
    kv_head = gl.program_id(0) % KV
    bundle = gl.program_id(0) // KV % BUNDLES
    granule = gl.program_id(0) // (KV * BUNDLES)
    start = (granules - 1 - granule) * GRANULE
    end = tokens
    # From the latest token of the units to the earliest.
    latest, _ = _unit(0, bundle, kv_head, start, end, GROUP, CONSUMERS)
    unit = gl.minimum(bundle * CONSUMERS + CONSUMERS - 1, GRANULE // ROWS * GROUP - 1)
    earliest = start + (GRANULE // ROWS - 1 - unit // GROUP) * ROWS
    stop = end
    if CAUSAL:
        stop = gl.minimum(end, latest + ROWS)
    # A program without tokens takes one tile, all of it masked.
    tiles = gl.where(earliest < end, gl.maximum((stop + KEYS - 1) // KEYS, 1), 1)

    q_tiles = gl.allocate_shared_memory(q_of.dtype, [CONSUMERS, 1, ROWS, D], q_of.layout)
    k_tiles = gl.allocate_shared_memory(k_of.dtype, [STAGES, 1, KEYS, D], k_of.layout)
    v_tiles = gl.allocate_shared_memory(v_of.dtype, [STAGES, 1, KEYS, D], v_of.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=CONSUMERS)
        mbarrier.init(v_free.index(i), count=CONSUMERS)
    fence_async_shared()

    load = (q_of, k_of, v_of, q_tiles, k_tiles, v_tiles, q_full, k_full, v_full, k_free, v_free)
    read = (q_tiles, k_tiles, v_tiles, q_full, k_full, v_full, k_free, v_free)
    place = (bundle, kv_head, start, end, tiles)
    rest = (sinks, out, lse, tokens, scale)
    if CONSUMERS == 3:
        gl.warp_specialize(
            [
                (_attend, (read, place, rest, 0, H, GROUP, D, 3, KEYS, STAGES, CAUSAL, SINK)),
                (_attend, (read, place, rest, 1, H, GROUP, D, 3, KEYS, STAGES, CAUSAL, SINK)),
                (_attend, (read, place, rest, 2, H, GROUP, D, 3, KEYS, STAGES, CAUSAL, SINK)),
                (_load_tiles, (load, place, GROUP, CONSUMERS, KEYS, STAGES)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_attend, (read, place, rest, 0, H, GROUP, D, 2, KEYS, STAGES, CAUSAL, SINK)),
                (_attend, (read, place, rest, 1, H, GROUP, D, 2, KEYS, STAGES, CAUSAL, SINK)),
                (_load_tiles, (load, place, GROUP, CONSUMERS, KEYS, STAGES)),
            ],
            [4, 1],
            [240, 24],
        )


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether descriptors can read the tensors."""
    return readable(q) and readable(k) and readable(v)


def readable(tensor: Tensor) -> bool:
    """By a TMA descriptor: steps below 2^40 bytes, multiples of 16 but the innermost; sizes below 2^32."""
    size = tensor.element_size()
    aligned = tensor.data_ptr() % 16 == 0 and all(step * size % 16 == 0 for step in tensor.stride()[:2])
    return aligned and tensor.stride(2) == 1 and min(tensor.stride()[:2]) > 0 and tensor.numel() > 0


def described(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """(tokens, heads, head_dim) in blocks of `rows` tokens and some columns of one head, zeros after the last token."""
    tokens, heads, width = tensor.shape
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * tensor.element_size(), rank=3)
    steps = [tensor.stride(1), tensor.stride(0), 1]
    return TensorDescriptor(tensor, [heads, tokens, width], steps, [1, rows, columns], layout)


def forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, out: Tensor, lse: Tensor, shape: Shape, crew: Crew
) -> None:
    """Writes out (T, H, D) and lse (H, T) fp32. Heads of 64 or 128, bf16 or fp16, no window, `fits`."""
    granules = quotient(shape.tokens, GRANULE.value)
    bundles = quotient(GRANULE.value // ROWS.value * shape.group, crew.consumers)
    hopper_forward_kernel[(granules * bundles * shape.kv_heads,)](
        described(q, ROWS.value, shape.head_dim),
        described(k, crew.keys, shape.head_dim),
        described(v, crew.keys, shape.head_dim),
        lse if sinks is None else sinks,
        out,
        lse,
        shape.tokens,
        granules,
        shape.scale / LN2.value,
        H=shape.heads,
        GROUP=shape.group,
        D=shape.head_dim,
        CONSUMERS=crew.consumers,
        KEYS=crew.keys,
        STAGES=crew.stages,
        CAUSAL=shape.causal,
        SINK=sinks is not None,
        num_warps=4,
        enable_fp_fusion=True,
    )
