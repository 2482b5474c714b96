"""How the attention kernels are launched: tile sizes, warps, stages, and which way the backward goes.

Everything that a sweep may change is in `Launch`; `default_launch` is the table of it, by architecture and shape.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from triton.backends.driver import DriverBase
from triton.runtime import driver

from pegbox_kernels.attention import tiles, window_backward, window_forward
from pegbox_kernels.attention import triton as kernels
from pegbox_kernels.attention.window_backward import Columns
from pegbox_kernels.attention.window_forward import Rows
from pegbox_kernels.dispatch import _Mode, on_device_of, power_of_two, quotient

try:
    from pegbox_kernels.attention import hopper, hopper_backward
    from pegbox_kernels.attention.hopper import Crew
    from pegbox_kernels.attention.hopper_backward import Gather
except (ImportError, AttributeError):  # Triton without Gluon, or with another Gluon than was known.
    hopper = None  # type: ignore[assignment]

GRANULE: int = tiles.GRANULE.value
MANY = 4096
"""Tokens from which the kernels of Hopper are taken: below, their programs are too few."""
CREWS = {} if hopper is None else {64: Crew(3, 128, 4), 128: Crew(2, 128, 2)}
"""By head_dim. Of the registers of a multiprocessor, three warpgroups have 160 a thread each, two 240."""
GATHERS = {} if hopper is None else {64: Gather(128, 2), 128: Gather(64, 2)}
"""By head_dim; both take 194 KiB of shared memory."""
Way: TypeAlias = Literal["atomic", "ordered"]


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


class Short(NamedTuple):
    """Of a short window: the forward and the dQ kernel, which own tokens, and that of dK and dV, which owns keys."""

    forward: Rows
    rows: Rows
    columns: Columns


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The launches of a call: `queries` is the dQ kernel, `keys` that of dK and dV.

    `short` has them for the ways of short windows. For one document on Hopper `crew` has the forward, and `gather` the
    backward that adds dQ in no certain order; who asks for the same bits has none.
    """

    forward: Tile
    queries: Tile
    keys: Tile
    way: Way
    short: Short | None = None
    crew: Crew | None = None
    gather: Gather | None = None


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

    @cached_property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @cached_property
    def width(self) -> int:
        return max(16, power_of_two(self.head_dim))

    @property
    def short(self) -> bool:
        """Whether a window leaves few tiles of keys to each token."""
        return self.window is not None and self.window <= 512

    def packed(self, most: int) -> int:
        """Query heads of one program: the largest power of two up to `most` that divides the group."""
        return min(most, self.group & -self.group)


def default_launch(shape: Shape, deterministic: bool) -> Launch:
    """The table: sizes for Hopper are measured (README.md), others chosen by what compiles without spills."""
    active = None if tiles.INTERPRETED.value and not _Mode.allocating else driver.active
    return _default_launch(active, None if active is None else active.get_current_device(), shape, deterministic)


@lru_cache(maxsize=256)
def _default_launch(active: DriverBase | None, device: object, shape: Shape, deterministic: bool) -> Launch:
    """Asking the driver what `device`, the current one, is costs the host more than a launch."""
    target = None if active is None else active.get_current_target()
    # Of Blackwell, data-center chips have as much shared memory; others (sm_120) as little as Ada.
    large = target is None or (target.backend == "cuda" and target.arch // 10 in (9, 10, 11))
    if shape.dtype.itemsize == 4:
        return _full_precision(shape, "ordered" if deterministic or shape.short else "atomic")
    if not large:
        way: Way = "ordered" if deterministic or shape.short else "atomic"
        return _smaller(shape, way, 4 if target is not None and target.backend == "hip" else 8)
    launch = _large(shape)
    if target is None or target.arch != 90 or shape.window is not None or shape.tokens < MANY:
        return launch
    gather = None if deterministic else GATHERS.get(shape.head_dim)
    return replace(launch, crew=CREWS.get(shape.head_dim), gather=gather)


def _large(shape: Shape) -> Launch:
    """Measured on an H100 for heads of 64 and 128. In plain Triton sums in registers and seven products beat five with
    atomics.
    """
    two = shape.packed(2)
    if shape.width <= 64:
        forward = Tile(128 // two, two, 64, 8, 3) if shape.short else Tile(128, 1, 64, 8, 3)
        queries, keys = Tile(64, 1, 64, 4, 3), Tile(64, 1, 64, 4, 3)
    elif shape.width == 128:
        forward, queries, keys = Tile(128, 1, 64, 8, 3), Tile(128, 1, 64, 8, 3), Tile(64, 1, 128, 8, 2)
    else:
        forward, queries, keys = Tile(128, 1, 32, 8, 2), Tile(64, 1, 32, 8, 2), Tile(32, 1, 64, 8, 1)
    launch = Launch(forward=forward, queries=queries, keys=keys, way="ordered")
    if not window_forward.fits(shape.window, shape.width, shape.dtype.itemsize):
        return launch
    rows = Rows(32, 2, 4, 4, 2).fitted(shape)
    return replace(launch, short=Short(rows, rows, Columns(64, 64, 4, 3)))


def _smaller(shape: Shape, way: Way, warps: int) -> Launch:
    """Ampere, Ada and AMD: 64 to 99 KiB of shared memory. `warps` of the kernel that holds most sums."""
    if shape.width <= 64:
        forward, queries, keys = Tile(128, 1, 64, warps, 2), Tile(64, 1, 32, 4, 2), Tile(32, 1, 64, 4, 1)
    elif shape.width == 128:
        forward, queries, keys = Tile(64, 1, 64, 4, 2), Tile(64, 1, 32, 4, 1), Tile(32, 1, 64, warps, 1)
    else:
        forward, queries, keys = Tile(64, 1, 32, warps, 1), Tile(32, 1, 32, 4, 1), Tile(16, 1, 32, 4, 1)
    return Launch(forward=forward, queries=queries, keys=keys, way=way)


def _full_precision(shape: Shape, way: Way) -> Launch:
    """fp32 products do not run on tensor cores: small tiles, for checks and tiny models."""
    size = 64 if tiles.INTERPRETED.value else 32 if shape.width <= 64 else 16
    tile = Tile(size, 1, size, 4, 1)
    return Launch(forward=tile, queries=tile, keys=tile, way=way)


def make_table(cu_seqlens_S: Tensor, tokens: int) -> Tensor:
    """(2, slots, 4) int32: the granules of all documents, see `tiles.py`; one small kernel."""
    documents = cu_seqlens_S.shape[0] - 1
    slots = tokens // GRANULE + documents
    table = torch.empty(2, slots, 4, dtype=torch.int32, device=cu_seqlens_S.device)
    if slots:
        with on_device_of(table):
            tiles.table_kernel[(quotient(slots, 128),)](
                cu_seqlens_S, table, documents, slots, documents.bit_length(), BLOCK=128, enable_fp_fusion=True
            )
    return table


def _blocks(table: Tensor | None, tokens: int, block: int) -> int:
    return quotient(tokens, block) if table is None else table.shape[1] * (GRANULE // block)


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
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(shape.heads, shape.tokens, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    tile, short = launch.forward, launch.short
    with on_device_of(q):
        if short is not None:
            blocks = _blocks(table, shape.tokens, short.forward.tokens)
            window_forward.forward(q, k, v, sinks, out, lse, table, shape, short.forward, blocks)
            return out, lse
        if launch.crew is not None and table is None and hopper.fits(q, k, v):
            hopper.forward(q, k, v, sinks, out, lse, shape, launch.crew)
            return out, lse
        blocks = _blocks(table, shape.tokens, tile.tokens)
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


class Saved(NamedTuple):
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
        dsinks = None if saved.sinks is None else torch.zeros_like(saved.sinks)
        return torch.empty(saved.q.shape, **like), dk, dv, dsinks
    with on_device_of(saved.q):
        if launch.short is not None:
            sizes = (launch.short.rows.tokens, launch.short.columns.keys)
            blocks = (_blocks(saved.table, shape.tokens, sizes[0]), _blocks(saved.table, shape.tokens, sizes[1]))
            short = launch.short
            dq, dsinks = window_backward.backward(saved, dk, dv, shape, short.rows, short.columns, blocks)
        elif launch.gather is not None and hopper_backward.fits(saved, shape, launch.gather):
            dq, dsinks = hopper_backward.backward(saved, dk, dv, shape, launch.gather)
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
    size = (shape.heads, blocks if saved.sinks is not None else 0)
    return torch.empty(*size, dtype=torch.float32, device=saved.q.device)


def _prepare(saved: Saved, shape: Shape) -> tuple[Tensor, Tensor]:
    tokens = 64
    blocks = quotient(shape.tokens, tokens)
    dsinks = partial_sums(saved, shape, blocks)
    stats = torch.empty(*saved.lse.shape, 2, dtype=torch.float32, device=saved.q.device)
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
    stats = torch.empty(*saved.lse.shape, 2, dtype=torch.float32, device=saved.q.device)
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
