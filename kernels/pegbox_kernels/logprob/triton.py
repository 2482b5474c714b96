"""The Triton kernels: one program per row, one read of the logits forward, one read and one write backward.

Forward keeps, per row, the running maximum m (in raw logits), s = sum 2^d and a = sum 2^d d, where d = (z -
m) scale and scale = log2(e) / temperature; when m grows by -r / scale (r <= 0), every d shifts by r, so s
becomes 2^r s and a becomes 2^r (a + r s) (the online softmax of Milakov and Gimelshein, arXiv:1805.02867,
extended by the entropy). A tile is (GROUPS, LANES) and every lane of a thread keeps m, s and a of its own:
maxima and sums run over the groups, which one thread holds, so nothing is exchanged between threads until the
row ends. In the end

    logp = ln2 ((z_t - m) scale - log2 s)     H = ln2 (log2 s - a / s)     lse = ln2 (m scale + log2 s)

H is small when the distribution is sharp and both of its terms are small then, so nothing cancels; lse - sum
p z, the formula of most implementations, subtracts two numbers of the size of the logits.

Vector loads. A row of an odd vocabulary does not begin on 16 bytes, and a mask that may end anywhere makes
Triton load element by element. So each row is read from the 16-byte boundary before it (ALIGN), only its
first and last block are masked, and the blocks between them are read whole. Rows need not be adjacent: row r
begins at (r // inner) outer_stride + (r % inner) inner_stride, which covers `logits[:, :-1]` without a copy.

Shapes: `rows` flattened leading dimensions, V vocabulary. Addresses are 64-bit.
"""

from __future__ import annotations

from math import log
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pegbox_kernels.dispatch import on_device_of
from pegbox_kernels.launching import repeatable

# Whether Triton's interpreter runs the kernels: TRITON_INTERPRET=1 was set when this module was imported.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)
# Stands for -inf in an exponent that is also a factor beside a zero probability: 0 * -inf would be NaN.
NEVER = tl.constexpr(-1e20)


class Launch(NamedTuple):
    """How a kernel is launched: warps per row, and 16-byte loads that each thread has in flight."""

    warps: int
    loads: int

    def lanes(self, itemsize: int) -> int:
        """Columns that the warps of a row read with one load each."""
        return self.warps * 32 * (16 // itemsize)


class Rows(NamedTuple):
    """Where the rows of a tensor of logits lie, in elements."""

    count: int
    inner: int
    outer_stride: int
    inner_stride: int
    column_stride: int


def rows_of(logits: Tensor) -> Rows | None:
    """The geometry of the rows, or None if more than two strides are needed to describe it."""
    dims: list[tuple[int, int]] = []
    for length, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True):
        if length == 1:
            continue
        if dims and dims[-1][1] == length * stride:
            dims[-1] = (dims[-1][0] * length, stride)
        else:
            dims.append((length, stride))
    if len(dims) > 2:
        return None
    outer, inner = [(1, 0), (1, 0), *dims][-2:]
    return Rows(outer[0] * inner[0], inner[0], outer[1], inner[1], logits.stride(-1))


def _adjacent(logits: Tensor) -> Rows:
    vocab = logits.shape[-1]
    return Rows(logits.numel() // vocab, logits.numel() // vocab, 0, vocab, 1)


def _alignment(logits: Tensor, rows: Rows) -> int:
    """Elements per 16 bytes if rows begin anywhere; 1 if all begin on 16 bytes, or wide loads cannot be."""
    wide = 16 // logits.element_size()
    unaligned = logits.shape[-1] % wide or rows.inner_stride % wide or rows.outer_stride % wide
    return wide if unaligned and rows.column_stride == 1 and logits.data_ptr() % 16 == 0 else 1


FORWARD_LOADS, BACKWARD_LOADS = 4, 2
"""16-byte loads per thread in flight. Backward holds results too: with fewer, more programs fit an SM."""


def default_launch(vocab: int, itemsize: int, loads: int) -> Launch:
    """Eight warps per row, fewer for a small vocabulary; 16 KiB of a row in flight forward, 8 backward."""
    warps = 8
    while warps > 1 and Launch(warps, loads).lanes(itemsize) > vocab:
        warps //= 2
    return Launch(warps, loads)


@triton.jit
def _row_start(row, inner, outer_stride, inner_stride, ALIGN: tl.constexpr):
    """The element to read first, on a boundary of ALIGN elements, and how many lie between it and the row."""
    begin = (row // inner) * outer_stride + (row % inner) * inner_stride
    start = begin // ALIGN * ALIGN
    return start, (begin - start).to(tl.int32)


@triton.jit
def _rescaled(m, s, a, top, scale, ENTROPY: tl.constexpr):
    """The sums of a part with maximum m, referred to the larger maximum `top`."""
    shift = tl.maximum(m - top, NEVER) * scale
    decay = tl.exp2(shift)
    if ENTROPY:
        a = (a + shift * s) * decay
    return s * decay, a


@triton.jit
def _accumulate(z, m, s, a, scale, ENTROPY: tl.constexpr):
    """Take a tile of logits (GROUPS, LANES) into the running maxima and sums (LANES) of a row."""
    top = tl.maximum(m, tl.max(z, 0))
    s, a = _rescaled(m, s, a, top, scale, ENTROPY)
    below = z - top[None, :]
    if ENTROPY:
        below = tl.maximum(below, NEVER, propagate_nan=tl.PropagateNan.ALL)
    d = below * scale
    weight = tl.exp2(d)
    if ENTROPY:
        a += tl.sum(weight * d, 0)
    return top, s + tl.sum(weight, 0), a


@repeatable
@triton.jit(do_not_specialize=["ignore_index", "inner", "column_stride"])
def forward_kernel(
    logits,
    targets,
    logps,
    entropy,
    logsumexp,
    largest,
    log_total,
    vocab,
    inner,
    outer_stride,
    inner_stride,
    column_stride,
    scale,
    ignore_index,
    ALIGN: tl.constexpr,
    UNIT: tl.constexpr,
    ENTROPY: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row).to(tl.int64)
    if target == ignore_index:
        tl.store(logps + row, 0.0)
        tl.store(logsumexp + row, 0.0)
        tl.store(largest + row, 0.0)
        tl.store(log_total + row, 0.0)
        if ENTROPY:
            tl.store(entropy + row, 0.0)
        return

    start, lead = _row_start(row, inner, outer_stride, inner_stride, ALIGN)
    end = lead + vocab
    TILE: tl.constexpr = GROUPS * LANES
    i = tl.arange(0, GROUPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    stride = 1 if UNIT else column_stride.to(tl.int64)
    source = logits + start + i * stride
    m = tl.full([LANES], LOWEST, tl.float32)
    s = tl.zeros([LANES], tl.float32)
    a = tl.zeros([LANES], tl.float32)
    whole = end // TILE * TILE
    begin = 0
    if ALIGN > 1:
        z = tl.load(source, mask=(i >= lead) & (i < end), other=-float("inf")).to(tl.float32)
        m, s, a = _accumulate(z, m, s, a, scale, ENTROPY)
        source += TILE * stride
        begin = TILE
    for _ in range(begin, whole, TILE):
        z = tl.load(source).to(tl.float32)
        m, s, a = _accumulate(z, m, s, a, scale, ENTROPY)
        source += TILE * stride
    if tl.maximum(whole, begin) < end:
        z = tl.load(source, mask=whole + i < end, other=-float("inf")).to(tl.float32)
        m, s, a = _accumulate(z, m, s, a, scale, ENTROPY)

    top = tl.max(m, 0)
    s, a = _rescaled(m, s, a, top, scale, ENTROPY)
    total = tl.sum(s, 0)
    log2_s = tl.log2(total)
    known = (target >= 0) & (target < vocab)
    z_t = tl.load(logits + start + (lead + target) * stride, mask=known, other=float("nan")).to(tl.float32)
    tl.store(logps + row, ((z_t - top) * scale - log2_s) * LN2)
    tl.store(logsumexp + row, (top * scale + log2_s) * LN2)
    tl.store(largest + row, top)
    tl.store(log_total + row, log2_s * LN2)
    if ENTROPY:
        tl.store(entropy + row, (log2_s - tl.sum(a, 0) / total) * LN2)


@triton.jit
def _rounded(value, pointer):
    """In the dtype of the pointer, to nearest even, as a GPU does by itself; the interpreter truncates."""
    if INTERPRETED and pointer.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        value = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return value.to(pointer.dtype.element_ty)


@triton.jit
def _gradient(z, hit, top, log2_s, at_target, constant, slope, scale, ENTROPY: tl.constexpr):
    """p (constant + slope log2 p), plus the target's own share where `hit`."""
    d = (z - top) * scale - log2_s
    if ENTROPY:
        d = tl.maximum(d, NEVER, propagate_nan=tl.PropagateNan.ALL)
        grad = tl.exp2(d) * (constant + slope * d)
    else:
        grad = tl.exp2(d) * constant
    return grad + tl.where(hit, at_target, 0.0)


@repeatable
@triton.jit(do_not_specialize=["ignore_index", "inner", "column_stride"])
def backward_kernel(
    logits,
    grad_logits,
    targets,
    largest,
    log_total,
    entropy,
    grad_logps,
    grad_entropy,
    grad_logsumexp,
    vocab,
    inner,
    outer_stride,
    inner_stride,
    column_stride,
    scale,
    ignore_index,
    ALIGN: tl.constexpr,
    UNIT: tl.constexpr,
    ALIKE: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ALIKE: the gradient lies in memory as the logits do (perhaps in their place); else it is contiguous."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row).to(tl.int64)
    start, lead = _row_start(row, inner, outer_stride, inner_stride, ALIGN)
    end = lead + vocab
    i = tl.arange(0, BLOCK)
    stride = 1 if UNIT else column_stride.to(tl.int64)
    out_stride = stride if ALIKE else 1
    source = logits + start + i * stride
    sink = grad_logits + (start if ALIKE else row * vocab - lead) + i * out_stride
    zero = tl.zeros([BLOCK], grad_logits.dtype.element_ty)

    if target == ignore_index:
        for block in range(0, end, BLOCK):
            inside = (block + i >= lead) & (block + i < end)
            tl.store(sink, zero, mask=inside)
            sink += BLOCK * out_stride
        return

    top = tl.load(largest + row)
    log2_s = tl.load(log_total + row) * LOG2E
    g = tl.load(grad_logps + row)
    constant = tl.load(grad_logsumexp + row) - g
    slope = 0.0
    if ENTROPY:
        h = tl.load(grad_entropy + row)
        constant -= h * tl.load(entropy + row)
        slope = -h * LN2
    # 1 / temperature, which `scale` holds, belongs to the gradient too.
    share = scale * LN2
    known = (target >= 0) & (target < vocab)
    constant = tl.where(known, constant * share, float("nan"))
    slope *= share
    at_target = g * share
    hit_at = lead + target.to(tl.int32)

    whole = end // BLOCK * BLOCK
    begin = 0
    if ALIGN > 1:
        inside = (i >= lead) & (i < end)
        z = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        grad = _gradient(z, i == hit_at, top, log2_s, at_target, constant, slope, scale, ENTROPY)
        tl.store(sink, _rounded(grad, grad_logits), mask=inside)
        source += BLOCK * stride
        sink += BLOCK * out_stride
        begin = BLOCK
    for block in range(begin, whole, BLOCK):
        z = tl.load(source).to(tl.float32)
        grad = _gradient(z, block + i == hit_at, top, log2_s, at_target, constant, slope, scale, ENTROPY)
        tl.store(sink, _rounded(grad, grad_logits))
        source += BLOCK * stride
        sink += BLOCK * out_stride
    if tl.maximum(whole, begin) < end:
        inside = whole + i < end
        z = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        grad = _gradient(z, whole + i == hit_at, top, log2_s, at_target, constant, slope, scale, ENTROPY)
        tl.store(sink, _rounded(grad, grad_logits), mask=inside)


def forward(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    ignore_index: int,
    entropy: bool,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logps, entropy (no elements unless asked for), logsumexp (...), and its parts (2, ...), all fp32."""
    rows = rows_of(logits)
    if rows is None:
        logits = logits.contiguous()
        rows = _adjacent(logits)
    logps, logsumexp = (torch.empty(targets.shape, dtype=torch.float32, device=logits.device) for _ in range(2))
    entropies = torch.empty(targets.shape if entropy else 0, dtype=torch.float32, device=logits.device)
    parts = torch.empty((2, *targets.shape), dtype=torch.float32, device=logits.device)
    launch = launch or default_launch(logits.shape[-1], logits.element_size(), FORWARD_LOADS)
    if rows.count:
        with on_device_of(logits):
            forward_kernel[(rows.count,)](
                logits,
                targets.contiguous(),
                logps,
                entropies,
                logsumexp,
                *parts,
                logits.shape[-1],
                *rows[1:],
                1 / (temperature * log(2)),
                ignore_index,
                ALIGN=_alignment(logits, rows),
                UNIT=rows.column_stride == 1,
                ENTROPY=entropy,
                GROUPS=launch.loads,
                LANES=launch.lanes(logits.element_size()),
                num_warps=launch.warps,
                enable_fp_fusion=True,
            )
    return logps, entropies, logsumexp, parts


def backward(
    logits: Tensor,
    targets: Tensor,
    parts: Tensor,
    entropy: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    temperature: float,
    ignore_index: int,
    out: Tensor | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """The gradient of the logits; written into `out`, if given: the logits themselves, or contiguous."""
    rows = rows_of(logits)
    if rows is None:
        logits = logits.contiguous()
        rows = _adjacent(logits)
    if out is None:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    launch = launch or default_launch(logits.shape[-1], logits.element_size(), BACKWARD_LOADS)
    if rows.count:
        with on_device_of(logits):
            backward_kernel[(rows.count,)](
                logits,
                out,
                targets.contiguous(),
                *parts,
                entropy,
                *(grad.contiguous() for grad in grads),
                logits.shape[-1],
                *rows[1:],
                1 / (temperature * log(2)),
                ignore_index,
                ALIGN=_alignment(logits, rows),
                UNIT=rows.column_stride == 1,
                ALIKE=out.stride() == logits.stride(),
                ENTROPY=entropy.numel() > 0,
                BLOCK=launch.loads * launch.lanes(logits.element_size()),
                num_warps=launch.warps,
                enable_fp_fusion=True,
            )
    return out
