"""How the attention kernels are launched: tile sizes, warps, stages, and which way the backward goes.

Everything that a sweep may change is in `Launch`; `default_launch` is the table of it, by architecture and shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from pegbox_kernels.attention import tiles
from pegbox_kernels.attention import triton as kernels
from pegbox_kernels.attention import window as march

GRANULE: int = tiles.GRANULE.value
Way: TypeAlias = Literal["atomic", "ordered", "window"]


class Tile(NamedTuple):
    """One kernel's launch: tokens and query heads of a block of queries, keys of a tile, warps, pipeline stages.

    `masked`: one loop that looks at masks in every tile, in place of two; for windows of few tiles. `straight` (keys):
    scores are (queries, keys); else they are (keys, queries).
    """

    tokens: int
    heads: int
    keys: int
    warps: int
    stages: int
    masked: bool = False
    straight: bool = False


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The launches of a call: `queries` is the dQ kernel, `keys` that of dK and dV, `window` the fused one."""

    forward: Tile
    queries: Tile
    keys: Tile
    window: march.Walk
    way: Way


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the launch of a call depends on, all known without looking at the device."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    scale: float
    causal: bool
    window: int | None

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def width(self) -> int:
        return max(16, triton.next_power_of_2(self.head_dim))

    def packed(self, most: int) -> int:
        """Query heads of one program: the largest power of two up to `most` that divides the group."""
        return min(most, self.group & -self.group)


def default_launch(shape: Shape, deterministic: bool) -> Launch:
    """The table, designed by what compiles without spills in the hot loops; no size in it has been measured yet."""
    target = None if tiles.INTERPRETED.value else driver.active.get_current_target()
    # Of Blackwell, data-center chips have as much shared memory; others (sm_120) as little as Ada.
    hopper = target is None or (target.backend == "cuda" and target.arch // 10 in (9, 10, 11))
    short = shape.window is not None and shape.window <= 512
    way: Way = "ordered" if deterministic or short else "atomic"
    if march.fits(shape.window, shape.width, shape.dtype.itemsize) and hopper:
        way = "window"
    if shape.dtype.itemsize == 4:
        return _full_precision(shape, way)
    if hopper:
        return _hopper(shape, short, way)
    return _smaller(shape, way, 4 if target is not None and target.backend == "hip" else 8)


def _hopper(shape: Shape, short: bool, way: Way) -> Launch:
    """Eight warps on 128 rows are two warpgroups; 227 KiB of shared memory, two programs where registers allow."""
    two = shape.packed(2)
    if shape.width <= 64:
        forward = Tile(128 // two, two, 64, 8, 3) if short else Tile(128, 1, 128, 8, 3)
        queries = Tile(128, 1, 64, 8, 3)
        keys = Tile(64, 1, 128, 8, 2)
    elif shape.width == 128:
        forward, queries, keys = Tile(128, 1, 64, 8, 3), Tile(128, 1, 64, 8, 2), Tile(32, 1, 128, 8, 2)
    else:
        forward, queries, keys = Tile(128, 1, 32, 8, 2), Tile(64, 1, 32, 8, 2), Tile(32, 1, 64, 8, 1)
    return Launch(forward=forward, queries=queries, keys=keys, window=march.Walk(256, two, 8, 2), way=way)


def _smaller(shape: Shape, way: Way, warps: int) -> Launch:
    """Ampere, Ada and AMD: 64 to 99 KiB of shared memory. `warps` of the kernel that holds most sums."""
    if shape.width <= 64:
        forward, queries, keys = Tile(128, 1, 64, warps, 2), Tile(64, 1, 32, 4, 2), Tile(32, 1, 64, 4, 1)
    elif shape.width == 128:
        forward, queries, keys = Tile(64, 1, 64, 4, 2), Tile(64, 1, 32, 4, 1), Tile(32, 1, 64, warps, 1)
    else:
        forward, queries, keys = Tile(64, 1, 32, warps, 1), Tile(32, 1, 32, 4, 1), Tile(16, 1, 32, 4, 1)
    return Launch(forward=forward, queries=queries, keys=keys, window=march.Walk(256, shape.packed(2), 8, 1), way=way)


def _full_precision(shape: Shape, way: Way) -> Launch:
    """fp32 products do not run on tensor cores: small tiles, for checks and tiny models."""
    size = 64 if tiles.INTERPRETED.value else 32 if shape.width <= 64 else 16
    tile = Tile(size, 1, size, 4, 1)
    return Launch(forward=tile, queries=tile, keys=tile, window=march.Walk(256, 1, 8, 1), way=way)


def make_table(cu_seqlens_S: Tensor, tokens: int) -> Tensor:
    """(2, slots, 4) int32: the granules of all documents, see `tiles.py`; one small kernel."""
    documents = cu_seqlens_S.shape[0] - 1
    slots = tokens // GRANULE + documents
    table = torch.empty(2, slots, 4, dtype=torch.int32, device=cu_seqlens_S.device)
    if slots:
        with torch.cuda.device_of(table):
            tiles.table_kernel[(triton.cdiv(slots, 128),)](
                cu_seqlens_S, table, documents, slots, documents.bit_length(), BLOCK=128, enable_fp_fusion=True
            )
    return table


def _blocks(table: Tensor | None, tokens: int, block: int) -> int:
    return triton.cdiv(tokens, block) if table is None else table.shape[1] * (GRANULE // block)


def _constants(shape: Shape, table: Tensor | None) -> dict[str, object]:
    return {
        "H": shape.heads,
        "GROUP": shape.group,
        "D": shape.head_dim,
        "WIDTH": shape.width,
        "CAUSAL": shape.causal,
        "WINDOWED": shape.window is not None,
        "TABLE": table is not None,
        "PRECISION": "ieee",
    }


def _window(shape: Shape) -> int:
    return shape.window or 0


def forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, table: Tensor | None, shape: Shape, launch: Launch
) -> tuple[Tensor, Tensor]:
    """Outputs (T, H, D) and lse (H, T) fp32."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(shape.heads, shape.tokens, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    tile = launch.forward
    blocks = _blocks(table, shape.tokens, tile.tokens)
    with torch.cuda.device_of(q):
        kernels.forward_kernel[(blocks * (shape.heads // tile.heads),)](
            q,
            k,
            v,
            q if sinks is None else sinks,
            out,
            lse,
            lse if table is None else table[0],
            shape.tokens,
            blocks,
            _window(shape),
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            shape.scale / tiles.LN2.value,
            **_constants(shape, table),
            HEADS=tile.heads,
            TOKENS=tile.tokens,
            KEYS=tile.keys,
            SINK=sinks is not None,
            MASKED=tile.masked,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )
    return out, lse


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a backward reads; `sinks` is None if there are none or they are frozen."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    out: Tensor
    lse: Tensor
    dout: Tensor
    dlse: Tensor | None
    table: Tensor | None


def backward(saved: Saved, shape: Shape, launch: Launch) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and sinks, contiguous."""
    like = {"dtype": saved.q.dtype, "device": saved.q.device}
    dk, dv = torch.empty(saved.k.shape, **like), torch.empty(saved.v.shape, **like)
    if saved.q.numel() == 0:
        return (
            torch.empty(saved.q.shape, **like),
            dk,
            dv,
            None if saved.sinks is None else torch.zeros_like(saved.sinks),
        )
    with torch.cuda.device_of(saved.q):
        if launch.way == "window":
            blocks = _blocks(saved.table, shape.tokens, launch.window.chunk)
            dq, dsinks = march.backward(saved, dk, dv, shape, launch.window, _constants(shape, saved.table), blocks)
        elif launch.way == "atomic":
            stats, dsinks = _prepare(saved, shape)
            total = torch.zeros(saved.q.shape, dtype=torch.float32, device=saved.q.device)
            _keys(saved, stats, total, dk, dv, shape, launch.keys)
            dq = torch.mul(total, shape.scale, out=torch.empty(saved.q.shape, **like))
        else:
            dq = torch.empty(saved.q.shape, **like)
            stats, dsinks = _queries(saved, dq, shape, launch.queries)
            _keys(saved, stats, None, dk, dv, shape, launch.keys)
    return dq, dk, dv, None if saved.sinks is None else dsinks.sum(1).to(saved.sinks.dtype)


def partial_sums(saved: Saved, shape: Shape, blocks: int) -> Tensor:
    """(H, blocks) for the gradient of the sinks."""
    return torch.empty(
        shape.heads, blocks if saved.sinks is not None else 0, dtype=torch.float32, device=saved.q.device
    )


def _prepare(saved: Saved, shape: Shape) -> tuple[Tensor, Tensor]:
    tokens = 64
    blocks = triton.cdiv(shape.tokens, tokens)
    dsinks = partial_sums(saved, shape, blocks)
    stats = torch.empty(2, *saved.lse.shape, dtype=torch.float32, device=saved.q.device)
    kernels.prepare_kernel[(blocks * shape.heads,)](
        saved.dout,
        saved.out,
        saved.lse,
        saved.lse if saved.dlse is None else saved.dlse,
        saved.lse if saved.sinks is None else saved.sinks,
        stats,
        dsinks,
        shape.tokens,
        blocks,
        *saved.dout.stride()[:2],
        H=shape.heads,
        D=shape.head_dim,
        WIDTH=shape.width,
        TOKENS=tokens,
        SINK=saved.sinks is not None,
        DLSE=saved.dlse is not None,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return stats, dsinks


def _queries(saved: Saved, dq: Tensor, shape: Shape, tile: Tile) -> tuple[Tensor, Tensor]:
    blocks = _blocks(saved.table, shape.tokens, tile.tokens)
    dsinks = partial_sums(saved, shape, blocks)
    stats = torch.empty(2, *saved.lse.shape, dtype=torch.float32, device=saved.q.device)
    kernels.queries_kernel[(blocks * (shape.heads // tile.heads),)](
        saved.q,
        saved.k,
        saved.v,
        saved.dout,
        saved.out,
        saved.lse,
        saved.lse if saved.dlse is None else saved.dlse,
        saved.lse if saved.sinks is None else saved.sinks,
        dq,
        stats,
        dsinks,
        saved.lse if saved.table is None else saved.table[0],
        shape.tokens,
        blocks,
        _window(shape),
        *saved.q.stride()[:2],
        *saved.k.stride()[:2],
        *saved.v.stride()[:2],
        *saved.dout.stride()[:2],
        shape.scale / tiles.LN2.value,
        **_constants(shape, saved.table),
        HEADS=tile.heads,
        TOKENS=tile.tokens,
        KEYS=tile.keys,
        SINK=saved.sinks is not None,
        DLSE=saved.dlse is not None,
        MASKED=tile.masked,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    return stats, dsinks


def _keys(saved: Saved, stats: Tensor, dq: Tensor | None, dk: Tensor, dv: Tensor, shape: Shape, tile: Tile) -> None:
    blocks = _blocks(saved.table, shape.tokens, tile.keys)
    kernels.keys_kernel[(blocks * shape.kv_heads,)](
        saved.q,
        saved.k,
        saved.v,
        saved.dout,
        stats,
        stats if dq is None else dq,
        dk,
        dv,
        stats if saved.table is None else saved.table[1],
        shape.tokens,
        blocks,
        _window(shape),
        *saved.q.stride()[:2],
        *saved.k.stride()[:2],
        *saved.v.stride()[:2],
        *saved.dout.stride()[:2],
        shape.scale / tiles.LN2.value,
        **_constants(shape, saved.table),
        KEYS=tile.keys,
        TOKENS=tile.tokens,
        ATOMIC=dq is not None,
        STRAIGHT=tile.straight,
        MASKED=tile.masked,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
