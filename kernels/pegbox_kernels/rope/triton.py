"""The Triton kernel: one program for one token, all its heads of queries and keys in one launch.

The heads of a token lie side by side in memory as a projection wrote them, so a program reads one run of (Hq + Hk) D
numbers and the tables of its token once. A tile is (HEADS, HALF) pairs. Halves are two loads; interleaved pairs are one
load whose neighbours are split in registers. Nothing but the tables is needed for the backward, which is the same
kernel with the transposed map.

Strides of rows, tokens and heads are free; the numbers of a head are adjacent, or copied so. Addresses are 64-bit.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from pegbox_kernels.dispatch import on_device_of, power_of_two
from pegbox_kernels.launching import repeatable
from pegbox_kernels.rms_norm.triton import _as


class Launch(NamedTuple):
    """How the kernel is launched: pairs of a tile, and warps of a program."""

    pairs: int
    warps: int


def default_launch(half: int, heads: int) -> Launch:
    """Sixteen pairs for each thread: two 16-byte loads of each half in half precision."""
    pairs = power_of_two(half) * power_of_two(heads)
    return Launch(min(pairs, 2048), 4 if pairs > 1024 else 2 if pairs > 512 else 1)


@triton.jit
def _turn(
    source,
    sink,
    source_head,
    sink_head,
    cos_a,
    cos_b,
    sin_a,
    sin_b,
    COUNT: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    COPY: tl.constexpr,
):
    """Turn the COUNT heads of one token, HEADS at a time; COPY: how many lanes pass on what is not turned."""
    DTYPE: tl.constexpr = sink.dtype.element_ty
    PAIRS: tl.constexpr = ROTARY // 2
    i = tl.arange(0, HALF)
    for first in range(0, COUNT, HEADS):
        heads = (first + tl.arange(0, HEADS))[:, None]
        x = source + heads * source_head
        y = sink + heads * sink_head
        if INTERLEAVED:
            both = tl.arange(0, 2 * HALF)[None, :]
            inside = (heads < COUNT) & (both < ROTARY)
            tile = tl.load(x + both, mask=inside, other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(tile, [HEADS, HALF, 2]))
            turned = tl.join(a * cos_a - b * sin_a, b * cos_b + a * sin_b)
            tl.store(y + both, _as(tl.reshape(turned, [HEADS, 2 * HALF]), DTYPE), mask=inside)
        else:
            inside = (heads < COUNT) & (i < PAIRS)[None, :]
            a = tl.load(x + i[None, :], mask=inside, other=0.0).to(tl.float32)
            b = tl.load(x + PAIRS + i[None, :], mask=inside, other=0.0).to(tl.float32)
            tl.store(y + i[None, :], _as(a * cos_a - b * sin_a, DTYPE), mask=inside)
            tl.store(y + PAIRS + i[None, :], _as(b * cos_b + a * sin_b, DTYPE), mask=inside)
        if COPY > 0:
            rest = ROTARY + tl.arange(0, COPY)[None, :]
            left = (heads < COUNT) & (rest < DIM)
            tl.store(y + rest, tl.load(x + rest, mask=left), mask=left)


@repeatable
@triton.jit(do_not_specialize=["tokens"])
def rope_kernel(
    q,
    k,
    q_out,
    k_out,
    cos,
    sin,
    tokens,
    q_row,
    q_token,
    q_head,
    k_row,
    k_token,
    k_head,
    q_out_row,
    q_out_token,
    q_out_head,
    k_out_row,
    k_out_token,
    k_out_head,
    cos_row,
    cos_token,
    sin_row,
    sin_token,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    HALF: tl.constexpr,
    Q_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
    PER_PAIR: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    COPY: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """PER_PAIR: tables hold one number for each pair, not one for each element."""
    row = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    i = tl.arange(0, HALF)
    if PER_PAIR:
        at_a = i
        at_b = i
    elif INTERLEAVED:
        at_a = 2 * i
        at_b = 2 * i + 1
    else:
        at_a = i
        at_b = ROTARY // 2 + i
    known = i < ROTARY // 2
    cos += row * cos_row + token * cos_token
    sin += row * sin_row + token * sin_token
    cos_a = tl.load(cos + at_a, mask=known, other=0.0).to(tl.float32)[None, :]
    cos_b = tl.load(cos + at_b, mask=known, other=0.0).to(tl.float32)[None, :]
    sin_a = tl.load(sin + at_a, mask=known, other=0.0).to(tl.float32)[None, :]
    sin_b = tl.load(sin + at_b, mask=known, other=0.0).to(tl.float32)[None, :]
    if TRANSPOSED:
        kept = sin_a
        sin_a = -sin_b
        sin_b = -kept
    q += row * q_row + token * q_token
    k += row * k_row + token * k_token
    q_out += row * q_out_row + token * q_out_token
    k_out += row * k_out_row + token * k_out_token
    # fmt: off
    _turn(q, q_out, q_head, q_out_head, cos_a, cos_b, sin_a, sin_b,
          Q_HEADS, DIM, ROTARY, Q_TILE, HALF, INTERLEAVED, COPY)
    _turn(k, k_out, k_head, k_out_head, cos_a, cos_b, sin_a, sin_b,
          K_HEADS, DIM, ROTARY, K_TILE, HALF, INTERLEAVED, COPY)
    # fmt: on


def turn(
    q: Tensor,
    k: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    cos: Tensor,
    sin: Tensor,
    rotary: int,
    interleaved: bool,
    heads_dim: int,
    transposed: bool,
    launch: Launch | None = None,
) -> None:
    """Write the turned q and k into `q_out` and `k_out`, which may be q and k themselves."""
    in_place = q_out.data_ptr() == q.data_ptr()
    by_token = [part.transpose(1, 2) if heads_dim == 1 else part for part in (q, k, q_out, k_out)]
    rows, tokens, q_heads, dim = by_token[0].shape
    k_heads = by_token[1].shape[2]
    cos, sin = (table if table.stride(-1) == 1 else table.contiguous() for table in (cos, sin))
    half = power_of_two(rotary // 2)
    launch = launch or default_launch(dim // 2, max(q_heads, k_heads))
    copied = 0 if in_place or rotary == dim else power_of_two(dim - rotary)
    if q.numel() + k.numel() == 0:
        return
    with on_device_of(q):
        rope_kernel[(rows * tokens,)](
            *by_token,
            cos,
            sin,
            tokens,
            *(stride for part in by_token for stride in part.stride()[:3]),
            *(stride for table in (cos, sin) for stride in (table.stride(0) * (table.shape[0] > 1), table.stride(1))),
            Q_HEADS=q_heads,
            K_HEADS=k_heads,
            DIM=dim,
            ROTARY=rotary,
            HALF=half,
            Q_TILE=min(power_of_two(q_heads), max(1, launch.pairs // half)),
            K_TILE=min(power_of_two(k_heads), max(1, launch.pairs // half)),
            PER_PAIR=cos.shape[-1] < rotary,
            INTERLEAVED=interleaved,
            COPY=copied,
            TRANSPOSED=transposed,
            num_warps=launch.warps,
            enable_fp_fusion=True,
        )
