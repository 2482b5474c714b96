"""The Triton kernels of a gated MLP with LoRA: activation and rank products in one pass, forward and backward.

A tile is (BT tokens, BI columns of the width). The base products of gate and up are read once; their rank products
P B^T are dots of inner length r made in the tile, from matrices so small (r (T + I) numbers) that they stay in the L2
cache. So LoRA adds no byte of device memory to a kernel that memory limits:

    forward    reads g, u                writes h             6 bytes per element in bf16
    backward   reads dh, g, u            writes dg, du       10 bytes per element, and shares of sums

The forward can also multiply its tile of h with A_down (`reduce`): P_d = h A_d^T is a sum over columns, so each column
block writes its share of it, and h is read once less. It takes registers from 63 to 130 and more (sm_90), so it is for
the sweep of the benchmark to say where it pays; the GEMM is the default.

The backward sums what belongs to the factors in the same pass, as long as ranks are small (`REDUCED_RANK`): a program
owns BI columns and a chunk of tokens, walks over them, and keeps dB_g = dg^T P_g, dB_u = du^T P_u and dA_d = h^T dP_d
of its columns in registers until its end. The shares of the chunks are added afterwards, in a fixed order: no atomics,
the same bits each time. So h is never written, and dg and du are read once less. dP = [dg B_g, du B_u] would be a sum
over columns: its operands double the registers (128 to 255 and spills, on sm_90), so it is left to GEMMs. Beyond that
rank all five products are, and h is written for one of them.

Sums are fp32, addresses 64-bit. dg takes the memory of dh: a program reads its tile before it writes it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pegbox_kernels.dispatch import on_device_of
from pegbox_kernels.lora_linear.projection import mm_wide

# Whether Triton's interpreter runs the kernels: TRITON_INTERPRET=1 was set when this module was imported.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
REDUCED_RANK = 32
"""Largest rank whose gradients are summed in the kernel of the backward."""
RANK_STEP = 64
"""Ranks of one dot where they are not summed there."""


class Launch(NamedTuple):
    """Tile (tokens, columns), warps, pipeline stages, and how many programs share the tokens of a column block."""

    tokens: int
    columns: int
    warps: int
    stages: int = 2
    chunks: int = 1


LAUNCHES: dict[tuple[str, str], Launch] = {
    ("forward", "hopper"): Launch(32, 128, 8, stages=1),
    ("backward", "hopper"): Launch(32, 128, 8, stages=1),
    ("reduce", "hopper"): Launch(32, 128, 8, stages=2, chunks=8),
    ("forward", "other"): Launch(32, 128, 8, stages=1),
    ("forward", "amd"): Launch(64, 128, 8, stages=1),
    ("backward", "other"): Launch(32, 64, 4, stages=1),
    ("reduce", "other"): Launch(32, 64, 4, stages=1, chunks=8),
}
"""By kernel and GPU: NVIDIA's from Hopper on, AMD's, others. At real sizes nothing spills on sm_80, sm_90, gfx942."""
FULL_PRECISION = Launch(16, 64, 4, stages=1, chunks=8)
"""For fp32, whose products take no tensor core but registers."""


def default_launch(kernel: str, dtype: torch.dtype) -> Launch:
    """The entry of the table for the GPU in use."""
    if dtype == torch.float32 and not INTERPRETED.value:
        return FULL_PRECISION
    target = None if INTERPRETED.value else triton.runtime.driver.active.get_current_target()
    if target is None or (target.backend == "cuda" and target.arch >= 90):
        return LAUNCHES[kernel, "hopper"]
    other = LAUNCHES[kernel, "other"]
    return LAUNCHES.get((kernel, "amd"), other) if target.backend == "hip" else other


@triton.jit
def _rounded(value, dtype: tl.constexpr):
    """In another dtype, to nearest even, as a GPU does by itself; the interpreter truncates."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        value = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def _dot(a, b, total=None):
    """total + a b, summed in fp32; the interpreter knows no products of bf16."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _activated(g, ACTIVATION: tl.constexpr):
    """act(g) and act'(g) in fp32."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(g)
        value = g * s
        slope = s * (1.0 + g * (1.0 - s))
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        value = g * cdf
        slope = cdf + g * tl.exp(-0.5 * g * g) * 0.3989422804014327
    else:
        k: tl.constexpr = 0.7978845608028654
        # tanh(z) = 2 sigmoid(2 z) - 1
        t = 2.0 * tl.sigmoid(2.0 * k * g * (1.0 + 0.044715 * g * g)) - 1.0
        value = 0.5 * g * (1.0 + t)
        slope = 0.5 * (1.0 + t) + 0.5 * g * (1.0 - t * t) * k * (1.0 + 0.134145 * g * g)
    return value, slope


@triton.jit
def _tile(first, i, width, BT: tl.constexpr):
    """Where a tile begins, in 64 bits, and offsets in it, in 32: a 64-bit offset for each element takes registers."""
    return first.to(tl.int64) * width, tl.arange(0, BT)[:, None] * width + i[None, :]


@triton.jit
def _product(
    p, b, t, i, tokens, width, p_stride, b_i, b_k,
    RANK: tl.constexpr, STEP: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """P B^T in one tile (BT, BI): P (T, RANK) with rows p_stride apart; element (k, i) of B^T at k b_k + i b_i."""
    total = tl.zeros([BT, BI], tl.float32)
    k = tl.arange(0, STEP)
    for start in range(0, RANK, STEP):
        known = start + k < RANK
        left = p + t[:, None].to(tl.int64) * p_stride + (start + k)[None, :]
        right = b + (start + k)[:, None].to(tl.int64) * b_k + i[None, :].to(tl.int64) * b_i
        left = tl.load(left, mask=(t < tokens)[:, None] & known[None, :], other=0.0)
        right = tl.load(right, mask=known[:, None] & (i < width)[None, :], other=0.0)
        total = _dot(left, right, total)
    return total


@triton.jit
def _factor(b, i, width, b_i, b_k, RANK: tl.constexpr, PADDED: tl.constexpr):
    """B^T (PADDED, BI) of some columns, zero beyond the rank."""
    k = tl.arange(0, PADDED)
    at = k[:, None].to(tl.int64) * b_k + i[None, :].to(tl.int64) * b_i
    return tl.load(b + at, mask=(k < RANK)[:, None] & (i < width)[None, :], other=0.0)


@triton.jit(do_not_specialize=["tokens"])
def forward_kernel(
    gate, up, h, p, b_gate, b_up, a_down, shares, tokens, width, p_stride, scale_gate, scale_up,
    RG: tl.constexpr, RU: tl.constexpr, RD: tl.constexpr, SG: tl.constexpr, SU: tl.constexpr, SD: tl.constexpr,
    ACTIVATION: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """One tile of h, and its share of h A_down^T, in fp32: shares (column blocks, T, RD).

    RG, RU, RD: ranks of gate, up and down (0: none); SG, SU: ranks of one dot, SD: RD padded.
    """
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    inside = (t < tokens)[:, None] & (i < width)[None, :]
    origin, at = _tile(tl.program_id(1) * BT, i, width, BT)
    g = tl.load(gate + origin + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + origin + at, mask=inside, other=0.0).to(tl.float32)
    if RG > 0:
        g += scale_gate * _product(p, b_gate, t, i, tokens, width, p_stride, RG, 1, RG, SG, BT, BI)
    if RU > 0:
        u += scale_up * _product(p + RG, b_up, t, i, tokens, width, p_stride, RU, 1, RU, SU, BT, BI)
    value, _ = _activated(g, ACTIVATION)
    hidden = _rounded(value * u, h.dtype.element_ty)
    tl.store(h + origin + at, hidden, mask=inside)
    if RD > 0:
        k = tl.arange(0, SD)
        share = _dot(hidden, tl.trans(_factor(a_down, i, width, 1, width, RD, SD)))
        row = tl.program_id(0).to(tl.int64) * tokens + t[:, None]
        tl.store(shares + row * RD + k[None, :], share, mask=(t < tokens)[:, None] & (k < RD)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def backward_kernel(
    dh, gate, up, dup, h, p, b_gate, b_up, dp_down, a_down,
    tokens, width, p_stride, dp_stride, scale_gate, scale_up,
    RG: tl.constexpr, RU: tl.constexpr, RD: tl.constexpr, SG: tl.constexpr, SU: tl.constexpr, SD: tl.constexpr,
    ACTIVATION: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """One tile of dg (over dh), du and h, for ranks whose gradients are summed by GEMMs."""
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    inside = (t < tokens)[:, None] & (i < width)[None, :]
    origin, at = _tile(tl.program_id(1) * BT, i, width, BT)
    d = tl.load(dh + origin + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + origin + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + origin + at, mask=inside, other=0.0).to(tl.float32)
    if RG > 0:
        g += scale_gate * _product(p, b_gate, t, i, tokens, width, p_stride, RG, 1, RG, SG, BT, BI)
    if RU > 0:
        u += scale_up * _product(p + RG, b_up, t, i, tokens, width, p_stride, RU, 1, RU, SU, BT, BI)
    if RD > 0:
        d += _product(dp_down, a_down, t, i, tokens, width, dp_stride, 1, width, RD, SD, BT, BI)
    value, slope = _activated(g, ACTIVATION)
    tl.store(dh + origin + at, _rounded(d * u * slope, dh.dtype.element_ty), mask=inside)
    tl.store(dup + origin + at, _rounded(d * value, dup.dtype.element_ty), mask=inside)
    tl.store(h + origin + at, _rounded(value * u, h.dtype.element_ty), mask=inside)


@triton.jit
def _rows(p, t, tokens, p_stride, RANK: tl.constexpr, PADDED: tl.constexpr):
    """P (BT, PADDED) of some tokens, zero beyond the rank."""
    k = tl.arange(0, PADDED)
    at = t[:, None].to(tl.int64) * p_stride + k[None, :]
    return tl.load(p + at, mask=(t < tokens)[:, None] & (k < RANK)[None, :], other=0.0)


@triton.jit
def _store_columns(out, value, part, i, width, RANK: tl.constexpr, PADDED: tl.constexpr):
    """One program's share (BI, RANK) into out (parts, I, RANK)."""
    k = tl.arange(0, PADDED)
    at = part.to(tl.int64) * width * RANK + i[:, None].to(tl.int64) * RANK + k[None, :]
    tl.store(out + at, value, mask=(i < width)[:, None] & (k < RANK)[None, :])


@triton.jit(do_not_specialize=["tokens", "chunk"])
def reduce_kernel(
    dh, gate, up, dup, h, p, b_gate, b_up, dp_down, a_down, db_gate, db_up, da_down,
    tokens, width, chunk, p_stride, dp_stride, scale_gate, scale_up,
    RG: tl.constexpr, RU: tl.constexpr, RD: tl.constexpr, SG: tl.constexpr, SU: tl.constexpr, SD: tl.constexpr,
    ACTIVATION: tl.constexpr, WITH_H: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """dg (over dh) and du of BI columns and a chunk of tokens, and its shares of dB and dA; SG.. are padded ranks.

    db_gate, db_up, da_down: (chunks, I, rank), fp32.
    """
    part = tl.program_id(1)
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    dtype: tl.constexpr = dh.dtype.element_ty
    if RG > 0:
        factor_gate = _factor(b_gate, i, width, RG, 1, RG, SG)
        sum_gate = tl.zeros([BI, SG], tl.float32)
    if RU > 0:
        factor_up = _factor(b_up, i, width, RU, 1, RU, SU)
        sum_up = tl.zeros([BI, SU], tl.float32)
    if RD > 0:
        factor_down = _factor(a_down, i, width, 1, width, RD, SD)
        sum_down = tl.zeros([BI, SD], tl.float32)
    first = part * chunk
    for step in range(0, tl.minimum(chunk, tokens - first), BT):
        start = first + step
        t = start + tl.arange(0, BT)
        inside = (t < tokens)[:, None] & (i < width)[None, :]
        origin, at = _tile(start, i, width, BT)
        d = tl.load(dh + origin + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(gate + origin + at, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up + origin + at, mask=inside, other=0.0).to(tl.float32)
        if RG > 0:
            p_gate = _rows(p, t, tokens, p_stride, RG, SG)
            g += scale_gate * _dot(p_gate, factor_gate)
        if RU > 0:
            p_up = _rows(p + RG, t, tokens, p_stride, RU, SU)
            u += scale_up * _dot(p_up, factor_up)
        if RD > 0:
            dp = _rows(dp_down, t, tokens, dp_stride, RD, SD)
            d += _dot(dp, factor_down)
        value, slope = _activated(g, ACTIVATION)
        dg = _rounded(d * u * slope, dtype)
        du = _rounded(d * value, dtype)
        tl.store(dh + origin + at, dg, mask=inside)
        tl.store(dup + origin + at, du, mask=inside)
        hidden = _rounded(value * u, dtype)
        if WITH_H:
            tl.store(h + origin + at, hidden, mask=inside)
        if RG > 0:
            sum_gate = _dot(tl.trans(dg), p_gate, sum_gate)
        if RU > 0:
            sum_up = _dot(tl.trans(du), p_up, sum_up)
        if RD > 0:
            sum_down = _dot(tl.trans(hidden), dp, sum_down)
    if RG > 0:
        _store_columns(db_gate, sum_gate * scale_gate, part, i, width, RG, SG)
    if RU > 0:
        _store_columns(db_up, sum_up * scale_up, part, i, width, RU, SU)
    if RD > 0:
        _store_columns(da_down, sum_down, part, i, width, RD, SD)


def _padded(rank: int) -> int:
    """Inner length of a dot that holds a rank: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(rank))


def _steps(dtype: torch.dtype, *ranks: int) -> list[int]:
    return [min(_padded(rank), 16 if dtype == torch.float32 else RANK_STEP) for rank in ranks]


def forward(
    gate: Tensor,
    up: Tensor,
    p: Tensor,
    b_gate: Tensor,
    b_up: Tensor,
    a_down: Tensor,
    scale_gate: float,
    scale_up: float,
    activation: str,
    launch: Launch | None = None,
    reduce: bool = False,
) -> tuple[Tensor, Tensor]:
    """h (T, I) and h A_down^T (T, r_down); arguments as in `reference.glu`.

    `reduce`: sum the second inside the kernel, if its rank is small.
    """
    gate, up, p, b_gate, b_up, a_down = (tensor.contiguous() for tensor in (gate, up, p, b_gate, b_up, a_down))
    tokens, width = gate.shape
    launch = launch or default_launch("forward", gate.dtype)
    h = torch.empty_like(gate)
    if not h.numel():
        return h, h.new_empty(tokens, a_down.shape[0])
    ranks, down = (b_gate.shape[1], b_up.shape[1]), a_down.shape[0]
    if not reduce or down > REDUCED_RANK:
        down = 0
    grid = (triton.cdiv(width, launch.columns), triton.cdiv(tokens, launch.tokens))
    shares = torch.empty(grid[0], tokens, down, dtype=torch.float32, device=gate.device)
    with on_device_of(gate):
        forward_kernel[grid](
            gate, up, h, p, b_gate, b_up, a_down, shares, tokens, width, p.stride(0), scale_gate, scale_up,
            *ranks, down, *_steps(gate.dtype, *ranks), _padded(down), activation, launch.tokens, launch.columns,
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
    return h, shares.sum(0).to(h.dtype) if down else h @ a_down.T


def backward(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    p: Tensor,
    b_gate: Tensor,
    b_up: Tensor,
    dp_down: Tensor,
    a_down: Tensor,
    scale_gate: float,
    scale_up: float,
    activation: str,
    with_h: bool,
    launch: Launch | None = None,
    reduce: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """du, h (no elements unless `with_h`), dP, dB of gate and up, dA of down; dg is written over dh (contiguous).

    `reduce`: sum the last three inside the kernel; by default where the ranks are small.
    """
    gate, up, p, b_gate, b_up, dp_down, a_down = (
        tensor.contiguous() for tensor in (gate, up, p, b_gate, b_up, dp_down, a_down)
    )
    ranks = b_gate.shape[1], b_up.shape[1], a_down.shape[0]
    if reduce is None:
        reduce = max(ranks) <= REDUCED_RANK
    if not gate.numel():
        empty = [torch.zeros(part.shape, dtype=torch.float32, device=gate.device) for part in (b_gate, b_up, a_down)]
        return torch.empty_like(up), gate if with_h else gate.new_empty(0), torch.zeros_like(p), *empty
    tensors = (gate, up, p, b_gate, b_up, dp_down, a_down)
    scales = (scale_gate, scale_up)
    launch = launch or default_launch("reduce" if reduce else "backward", gate.dtype)
    run = _reduced if reduce else _unreduced
    dup, h, *sums = run(dh, *tensors, scales, activation, with_h, ranks, launch)
    dp = torch.empty_like(p)
    dp[:, : ranks[0]].addmm_(dh, b_gate, beta=0, alpha=scale_gate)
    dp[:, ranks[0] :].addmm_(dup, b_up, beta=0, alpha=scale_up)
    return dup, h, dp, *sums


def _unreduced(
    dh, gate, up, p, b_gate, b_up, dp_down, a_down, scales, activation, with_h, ranks, launch
):  # type: ignore[no-untyped-def]  # fmt: skip
    tokens, width = gate.shape
    dup, h = torch.empty_like(up), torch.empty_like(gate)
    grid = (triton.cdiv(width, launch.columns), triton.cdiv(tokens, launch.tokens))
    with on_device_of(gate):
        backward_kernel[grid](
            dh, gate, up, dup, h, p, b_gate, b_up, dp_down, a_down, tokens, width, p.stride(0), dp_down.stride(0),
            *scales, *ranks, *_steps(gate.dtype, *ranks), activation, launch.tokens, launch.columns,
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
    db_gate = mm_wide(dh.T, p[:, : ranks[0]]).mul_(scales[0])
    db_up = mm_wide(dup.T, p[:, ranks[0] :]).mul_(scales[1])
    return dup, h if with_h else h.new_empty(0), db_gate, db_up, mm_wide(dp_down.T, h)


def _reduced(
    dh, gate, up, p, b_gate, b_up, dp_down, a_down, scales, activation, with_h, ranks, launch
):  # type: ignore[no-untyped-def]  # fmt: skip
    tokens, width = gate.shape
    chunk = triton.cdiv(triton.cdiv(tokens, launch.chunks), launch.tokens) * launch.tokens
    chunks = triton.cdiv(tokens, chunk)
    dup = torch.empty_like(up)
    h = torch.empty_like(gate) if with_h else gate.new_empty(0)
    shares = [torch.empty(chunks, width, rank, dtype=torch.float32, device=gate.device) for rank in ranks]
    with on_device_of(gate):
        reduce_kernel[triton.cdiv(width, launch.columns), chunks](
            dh, gate, up, dup, h, p, b_gate, b_up, dp_down, a_down, *shares, tokens, width, chunk, p.stride(0),
            dp_down.stride(0), *scales, *ranks, *(_padded(rank) for rank in ranks), activation, with_h,
            launch.tokens, launch.columns, num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
    db_gate, db_up, da_down = (share.sum(0) for share in shares)
    return dup, h, db_gate, db_up, da_down.T.contiguous()
