"""The backward of attention with sinks for Hopper, written in Gluon: warps with roles, TMA, and dQ added by TMA.

A program owns KEYS keys of a key head and goes over the query heads of the group and tiles of their queries, which one
warp loads. Two warpgroups compute, each for half of the keys: scores are (keys, queries), so P^T and dS^T are operands
from registers for dV and dK. dS goes through shared memory, where the warpgroups meet once a tile: each multiplies all
keys with its half of dQ (of its queries, or of its columns), which TMA adds into an fp32 buffer: five products, and
sums of dQ in no certain order. The product of the next scores is in flight while a tile's dQ is rounded and added.

For one document without a window, as `hopper.py` is, and for the same reason: what a tensor holds after the last token
is read as zeros.

Shapes as in `triton.py`; q, k, v and do are read by descriptors of (heads, tokens, head_dim), dQ / scale is added by
one. What is known of each row, lse in base 2 and D, is (2, H, rows), a row of numbers to its descriptor; TMA reads it
from multiples of 16 bytes only, so that a head has as many numbers as tiles of queries have tokens, zeros at its end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from pegbox_kernels.attention import tiles
from pegbox_kernels.attention.hopper import described, fetch, readable
from pegbox_kernels.attention.tiles import load_rows, offsets_of, wide
from pegbox_kernels.attention.triton import row_sums
from pegbox_kernels.dispatch import quotient
from pegbox_kernels.launching import repeatable

if TYPE_CHECKING:
    from pegbox_kernels.attention.launch import Saved, Shape

HALF = gl.constexpr(64)
"""Rows of one product of a warpgroup: half of the keys of a program."""
KEYS = gl.constexpr(128)
BLOCK = 64
"""Tokens of a program of `statistics_kernel`."""
LN2 = gl.constexpr(tiles.LN2.value)
# Since Triton 3.7 or so, and until then.
_all_here = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


class Gather(NamedTuple):
    """Tokens of a tile of queries, 8192 / head_dim of them, and stages of the ring of such tiles."""

    tokens: int
    stages: int


@repeatable
@triton.jit(do_not_specialize=["tokens", "rows", "blocks"])
def statistics_kernel(
    do, out, lse, dlse, sinks, stats, dsinks, tokens, rows, blocks, stride_dt, stride_dh,
    H: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, SINK: tl.constexpr, DLSE: tl.constexpr,
):  # fmt: skip
    """`stats` (2, H, rows): lse in base 2, and D, zeros after the last token; and what a block adds to dsinks."""
    head = tl.program_id(0) % H
    block = tl.program_id(0) // H
    start = block * TOKENS
    token = tl.arange(0, TOKENS)
    queries = start + token
    heads = head + tl.zeros([TOKENS], tl.int32)
    columns = tl.arange(0, D)
    do_at = do + wide(start) * stride_dt + wide(head) * stride_dh
    do_tile = load_rows(do_at, offsets_of(token, stride_dt, columns), queries, tokens, columns, D, True)
    out_at = out + wide(start) * (H * D) + head * D
    out_tile = load_rows(out_at, offsets_of(token, H * D, columns), queries, tokens, columns, D, True)
    lse2, sums, share = row_sums(do_tile, out_tile, lse, dlse, sinks, queries, heads, tokens, tokens, SINK, DLSE)
    # Of what is masked probabilities are 0, and 0 times what stands here must be 0.
    at = stats + wide(head) * rows + queries
    tl.store(at, tl.where(queries < tokens, lse2, 0.0))
    tl.store(at + wide(rows) * H, tl.where(queries < tokens, sums, 0.0))
    if SINK:
        tl.store(dsinks + wide(head) * blocks + block, tl.sum(share, 0))


@builtin
def _add_tile(into, coord, tile, _semantic=None):
    """Add a tile in shared memory to global memory, by TMA; Gluon of Triton 3.6 has no name for it."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, into.handle, coord, tile.handle)


@gluon.jit
def _meet(barrier):
    """Both warpgroups come here."""
    gl.inline_asm_elementwise(
        "bar.sync $1, 256; mov.b32 $0, $1;", "=r,r", [barrier], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _load_tiles(
    load, place, H: gl.constexpr, GROUP: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """The warp that loads."""
    k_of, v_of, q_of, do_of, stats_of, k_tiles, v_tiles, q_tiles, do_tiles, stats, kv_full, full, free, rows = load
    kv_head, start, first, tiles = place
    mbarrier.expect(kv_full.index(0), 4 * k_of.block_type.nbytes)
    for half in gl.static_range(2):
        fetch(k_of, [kv_head, start + half * HALF, 0], kv_full.index(0), k_tiles.index(half))
        fetch(v_of, [kv_head, start + half * HALF, 0], kv_full.index(0), v_tiles.index(half))
    for i in range(GROUP * tiles):
        stage = i % STAGES
        head = kv_head * GROUP + i // tiles
        query = first + i % tiles * TOKENS
        mbarrier.wait(free.index(stage), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), 2 * q_of.block_type.nbytes + 2 * stats_of.block_type.nbytes)
        fetch(q_of, [head, query, 0], full.index(stage), q_tiles.index(stage))
        fetch(stats_of, [head * rows + query], full.index(stage), stats.index(2 * stage))
        fetch(do_of, [head, query, 0], full.index(stage), do_tiles.index(stage))
        fetch(stats_of, [(H + head) * rows + query], full.index(stage), stats.index(2 * stage + 1))


@gluon.jit
def _gather(
    read, place, rest, INDEX: gl.constexpr, H: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr,
    TOKENS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """A warpgroup that computes: dK and dV of one half of the keys, one half of dQ (rows, or columns of 64 rows)."""
    k_tiles, v_tiles, q_tiles, do_tiles, stats, ds_tiles, dq_tiles, kv_full, full, free = read
    kv_head, start, first, tiles = place
    into, dk_at, dv_at, end, scale = rest
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    keys = start + INDEX * HALF + gl.arange(0, HALF, gl.SliceLayout(1, SCORES))
    token = gl.arange(0, TOKENS, gl.SliceLayout(0, SCORES))
    none = gl.zeros([HALF, TOKENS], gl.float32, SCORES)
    dk = gl.zeros([HALF, D], gl.float32, SUMS)
    dv = gl.zeros([HALF, D], gl.float32, SUMS)
    # Tiles from `clear` to `last` have nothing to mask: before is the diagonal, after the end.
    clear: gl.constexpr = KEYS // TOKENS if CAUSAL else 0
    last = gl.where(start + KEYS <= end, (end - first) // TOKENS, 0)
    k_tile = k_tiles.index(INDEX).reshape([HALF, D])
    v_tile = v_tiles.index(INDEX).reshape([HALF, D])
    dq_tile = dq_tiles.index(INDEX).reshape([HALF, HALF])
    mbarrier.wait(kv_full.index(0), 0)
    mbarrier.wait(full.index(0), 0)
    q_tile = q_tiles.index(0).reshape([TOKENS, D])
    s = warpgroup_mma(k_tile, q_tile.permute((1, 0)), none, use_acc=False)
    for i in range(GROUP * tiles):
        stage = i % STAGES
        turn = i % tiles
        query = first + turn * TOKENS
        q_tile = q_tiles.index(stage).reshape([TOKENS, D])
        do_tile = do_tiles.index(stage).reshape([TOKENS, D])
        dp = warpgroup_mma(v_tile, do_tile.permute((1, 0)), none, use_acc=False, is_async=True)
        lse2 = stats.index(2 * stage).load(gl.SliceLayout(0, SCORES))
        p = gl.exp2(s * scale - lse2[None, :])
        if (turn < clear) | (turn >= last):
            queries = query + token
            seen = (keys[:, None] <= queries[None, :]) if CAUSAL else ((keys < end)[:, None] & (queries >= 0)[None, :])
            p = gl.where(seen & (queries < end)[None, :], p, 0.0)
        p_taken = gl.convert_layout(p.to(q_tile.dtype), OPERAND)
        dv = warpgroup_mma(p_taken, do_tile, dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=[dp])
        delta = stats.index(2 * stage + 1).load(gl.SliceLayout(0, SCORES))
        ds = (p * (dp - delta[None, :])).to(q_tile.dtype)
        # In one of two places by turns: whoever comes here again has met the other after its products with the first.
        side = i % 2 * 2
        ds_tiles.index(side + INDEX).store(ds)
        ds_taken = gl.convert_layout(ds, OPERAND)
        fence_async_shared()
        _meet(8)
        dq = gl.zeros([HALF, HALF], gl.float32, PART)
        for half in gl.static_range(2):
            ds_half = ds_tiles.index(side + half)
            k_half = k_tiles.index(half).reshape([HALF, D])
            if TOKENS == HALF:
                k_half = k_half.slice(INDEX * HALF, HALF, 1)
            else:
                ds_half = ds_half.slice(INDEX * HALF, HALF, 1)
            dq = warpgroup_mma(ds_half.permute((1, 0)), k_half, dq, use_acc=half > 0, is_async=True)
        dk = warpgroup_mma(ds_taken, q_tile, dk, is_async=True)
        # The scores of the next tile; in the end of a tile that nobody needs.
        after = (i + 1) % STAGES
        dv, _ = warpgroup_mma_wait(3, deps=[dv, p_taken])
        mbarrier.wait(full.index(after), ((i + 1) // STAGES) & 1, pred=i + 1 < GROUP * tiles)
        q_tile = q_tiles.index(after).reshape([TOKENS, D])
        s = warpgroup_mma(k_tile, q_tile.permute((1, 0)), none, use_acc=False, is_async=True)
        dq = warpgroup_mma_wait(2, deps=[dq])
        tma.store_wait(0)
        _all_here()
        dq_tile.store(dq)
        fence_async_shared()
        _all_here()
        head = kv_head * GROUP + i // tiles
        if TOKENS == HALF:
            _add_tile(into, [head, query, INDEX * HALF], dq_tiles.index(INDEX))
        else:
            _add_tile(into, [head, query + INDEX * HALF, 0], dq_tiles.index(INDEX))
        s, dk, _ = warpgroup_mma_wait(0, deps=[s, dk, ds_taken])
        mbarrier.arrive(free.index(stage), count=1)
    tma.store_wait(0)
    rows = start + INDEX * HALF + gl.arange(0, HALF, gl.SliceLayout(1, SUMS))
    column = kv_head * D + gl.arange(0, D, gl.SliceLayout(0, SUMS))
    at = rows.to(gl.int64)[:, None] * (H // GROUP * D) + column[None, :]
    gl.store(dk_at + at, (dk * (scale * LN2)).to(q_tiles.dtype), mask=(rows < end)[:, None])
    gl.store(dv_at + at, dv.to(q_tiles.dtype), mask=(rows < end)[:, None])


@gluon.jit(do_not_specialize=["tokens", "rows"])
def hopper_backward_kernel(
    q_of, k_of, v_of, do_of, stats_of, into, dk, dv, tokens, rows, scale,
    H: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
):  # fmt: skip
    """One program per (tile of keys, key head), early keys first: dK, dV, and dQ / scale, added in fp32."""
    kv_head = gl.program_id(0) % (H // GROUP)
    start = gl.program_id(0) // (H // GROUP) * KEYS
    first = start if CAUSAL else start * 0
    tiles = (tokens - first + TOKENS - 1) // TOKENS

    k_tiles = gl.allocate_shared_memory(k_of.dtype, [2, 1, HALF, D], k_of.layout)
    v_tiles = gl.allocate_shared_memory(v_of.dtype, [2, 1, HALF, D], v_of.layout)
    q_tiles = gl.allocate_shared_memory(q_of.dtype, [STAGES, 1, TOKENS, D], q_of.layout)
    do_tiles = gl.allocate_shared_memory(do_of.dtype, [STAGES, 1, TOKENS, D], do_of.layout)
    stats = gl.allocate_shared_memory(gl.float32, [2 * STAGES, TOKENS], stats_of.layout)
    DS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    ds_tiles = gl.allocate_shared_memory(q_of.dtype, [4, HALF, TOKENS], DS)
    dq_tiles = gl.allocate_shared_memory(gl.float32, [2, 1, HALF, HALF], into.layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full.index(0), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    fence_async_shared()

    load = (k_of, v_of, q_of, do_of, stats_of, k_tiles, v_tiles, q_tiles, do_tiles, stats, kv_full, full, free, rows)
    read = (k_tiles, v_tiles, q_tiles, do_tiles, stats, ds_tiles, dq_tiles, kv_full, full, free)
    place = (kv_head, start, first, tiles)
    rest = (into, dk, dv, tokens, scale)
    gl.warp_specialize(
        [
            (_gather, (read, place, rest, 0, H, GROUP, D, TOKENS, STAGES, CAUSAL)),
            (_gather, (read, place, rest, 1, H, GROUP, D, TOKENS, STAGES, CAUSAL)),
            (_load_tiles, (load, place, H, GROUP, TOKENS, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


def fits(saved: Saved, shape: Shape, gather: Gather) -> bool:
    """Whether descriptors can read the tensors, whose coordinates are 32-bit; one document."""
    small = 2 * shape.heads * rows_of(shape, gather) < 2**31
    return small and saved.table is None and all(map(readable, (saved.q, saved.k, saved.v, saved.dout)))


def rows_of(shape: Shape, gather: Gather) -> int:
    """Numbers of a head in `stats`: tokens of all its tiles."""
    return quotient(shape.tokens, gather.tokens) * gather.tokens


def backward(saved: Saved, dk: Tensor, dv: Tensor, shape: Shape, gather: Gather) -> tuple[Tensor, Tensor]:
    """dQ and the parts of the gradient of the sinks (H, blocks); writes dK and dV, contiguous. One token or more."""
    device, rows = saved.q.device, rows_of(shape, gather)
    stats = torch.empty(2, shape.heads, rows, dtype=torch.float32, device=device)
    total = torch.zeros(saved.q.shape, dtype=torch.float32, device=device)
    dsinks = keep_statistics(saved, stats, shape)
    gather_gradients(saved, stats, total, dk, dv, shape, gather)
    return torch.mul(total, shape.scale, out=torch.empty(saved.q.shape, dtype=saved.q.dtype, device=device)), dsinks


def keep_statistics(saved: Saved, stats: Tensor, shape: Shape) -> Tensor:
    """Fills `stats` (2, H, rows); the parts of the gradient of the sinks (H, blocks)."""
    blocks = quotient(stats.shape[2], BLOCK)
    trained = saved.sinks is not None
    dsinks = torch.empty(shape.heads, blocks if trained else 0, dtype=torch.float32, device=stats.device)
    statistics_kernel[(blocks * shape.heads,)](
        saved.dout,
        saved.out,
        saved.lse,
        saved.lse if saved.dlse is None else saved.dlse,
        saved.lse if saved.sinks is None else saved.sinks,
        stats,
        dsinks,
        shape.tokens,
        stats.shape[2],
        blocks,
        *saved.dout.stride()[:2],
        H=shape.heads,
        D=shape.head_dim,
        TOKENS=BLOCK,
        SINK=trained,
        DLSE=saved.dlse is not None,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return dsinks


def gather_gradients(
    saved: Saved, stats: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, shape: Shape, gather: Gather
) -> None:
    """Writes dK and dV, adds dQ / scale to `dq` (T, H, D) fp32. Heads of 64 or 128, bf16 or fp16, no window, `fits`."""
    width, half = shape.head_dim, HALF.value
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    hopper_backward_kernel[(quotient(shape.tokens, KEYS.value) * shape.kv_heads,)](
        described(saved.q, gather.tokens, width),
        described(saved.k, half, width),
        described(saved.v, half, width),
        described(saved.dout, gather.tokens, width),
        TensorDescriptor(stats, [stats.numel()], [1], [gather.tokens], layout),
        described(dq, half, half),
        dk,
        dv,
        shape.tokens,
        stats.shape[2],
        shape.scale / LN2.value,
        H=shape.heads,
        GROUP=shape.group,
        D=width,
        TOKENS=gather.tokens,
        STAGES=gather.stages,
        CAUSAL=shape.causal,
        num_warps=4,
        enable_fp_fusion=True,
    )
