"""The Triton kernels: softmax over a chunk of logits, whose gradient takes their place, and a scaling of rows.

A row is one program's: forward reads it once for the online softmax of `logprob` (its running maxima and sums are
imported), and a second time, from its end to its beginning, to write the gradient where the logits were. The second
read is to come from the L2 cache: a persistent grid keeps few enough rows under way that all of them fit in half of
it, and what was read last is read first. Few programs are enough for the memory and leave multiprocessors to the
matrix products that run beside (`chunks.py`).

For a logit x of the projection (the bias is added here, in fp32):

    v = cap tanh(x scale / cap)  or  v = x        d = (v - max v) k - log2 s        p = 2^d

with k = log2(e) / temperature (times `scale` where there is no cap), s = sum 2^((v - max v) k). The gradient of a row
is p (constant + slope d) + uniform, plus `at_target` at the target, times dv/dx and scale / temperature, which the
coefficients hold already. In place is safe: a barrier divides the first pass, and the reading of the target's logit,
from the second, in which each element is one thread's; another one comes before the target's own gradient.

R  rows of a chunk    V  vocabulary. Rows begin on whole cache lines (`pitch`), so loads are 16 bytes wide. Addresses
are 64-bit.
"""

from __future__ import annotations

from math import log
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pegbox_kernels.linear_logprob.rows import Coefficients, Objective, Rows, Rule
from pegbox_kernels.logprob.triton import LN2, LOG2E, LOWEST, NEVER, _accumulate, _rescaled, _rounded


class Launch(NamedTuple):
    """Warps of a program, 16-byte loads that each thread has in flight, and programs of the grid at most."""

    warps: int
    loads: int
    programs: int

    def lanes(self, itemsize: int) -> int:
        """Columns that the warps of a row read with one load each."""
        return self.warps * 32 * (16 // itemsize)


GRADIENT_WARPS, GRADIENT_LOADS = 16, 4
"""Two reads and one write: 32 KiB of a row in flight, so that 64 programs cover the latency of an H100's memory."""
READ_WARPS, READ_LOADS = 8, 4
"""One read, without a gradient: what `logprob` measured best."""
BACKWARD_WARPS, BACKWARD_LOADS = 8, 2
"""One read and one write, as there: many programs with little each."""
RESIDENT_WARPS = 64
"""Warps that a multiprocessor holds."""


class Device(NamedTuple):
    """What a launch depends on; the defaults are an H100's, for kernels that are only compiled or interpreted."""

    multiprocessors: int = 132
    cache_bytes: int = 50 << 20


def device_of(tensor: Tensor) -> Device:
    if not tensor.is_cuda:
        return Device()
    found = torch.cuda.get_device_properties(tensor.device)
    return Device(found.multi_processor_count, found.L2_cache_size)


def forward_launch(row_bytes: int, itemsize: int, gradient: bool, device: Device) -> Launch:
    """With a gradient, rows under way fill half of the L2 cache, on a third of the multiprocessors at least."""
    if not gradient:
        return _streaming(READ_WARPS, READ_LOADS, row_bytes // itemsize, itemsize, device)
    launch = _streaming(GRADIENT_WARPS, GRADIENT_LOADS, row_bytes // itemsize, itemsize, device)
    cached = max(device.cache_bytes // 2 // row_bytes, device.multiprocessors // 3)
    return launch._replace(programs=min(cached, launch.programs))


def backward_launch(row_bytes: int, itemsize: int, device: Device) -> Launch:
    """As many programs as fit: nothing is read twice."""
    return _streaming(BACKWARD_WARPS, BACKWARD_LOADS, row_bytes // itemsize, itemsize, device)


def _streaming(warps: int, loads: int, vocab: int, itemsize: int, device: Device) -> Launch:
    """As many programs as multiprocessors hold; fewer warps for a small vocabulary."""
    while warps > 1 and Launch(warps, loads, 0).lanes(itemsize) > vocab:
        warps //= 2
    return Launch(warps, loads, device.multiprocessors * RESIDENT_WARPS // warps)


@triton.jit
def _tanh(y):
    """Exact to fp32 rounding: a series where 1 - 2^.. would cancel, (1 - t) / (1 + t) elsewhere."""
    t = tl.exp2(tl.abs(y) * (-2 * LOG2E))
    far = (1 - t) / (1 + t)
    far = tl.where(y < 0, -far, far)
    q = y * y
    near = y * (1 + q * (-0.3333333333 + q * (0.1333333333 + q * (-0.0539682540 + q * 0.0218694885))))
    return tl.where(q < 0.0625, near, far)


@triton.jit
def _capped(x, inner, cap, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        x = cap * _tanh(x * inner)
    return x


@triton.jit
def _read(
    source,
    bias,
    mask,
    inner,
    cap,
    MASKED: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    KEEP: tl.constexpr,
):
    """A tile of v; masked elements are -inf. KEEP: it will be read again, leave it in the cache."""
    EVICT: tl.constexpr = "evict_last" if KEEP else "evict_first"
    if MASKED:
        x = tl.load(source, mask=mask, other=0.0, eviction_policy=EVICT).to(tl.float32)
        if BIAS:
            x += tl.load(bias, mask=mask, other=0.0).to(tl.float32)
        v = tl.where(mask, _capped(x, inner, cap, SOFTCAP), -float("inf"))
    else:
        x = tl.load(source, eviction_policy=EVICT).to(tl.float32)
        if BIAS:
            x += tl.load(bias).to(tl.float32)
        v = _capped(x, inner, cap, SOFTCAP)
    return v


@triton.jit
def _gradient(
    x,
    at,
    top,
    log2_s,
    constant,
    slope,
    k,
    inner,
    cap,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    SHIFTED: tl.constexpr,
):
    """The gradient of logits x (bias included); SHIFTED: `at` is added to that of z."""
    d = (_capped(x, inner, cap, SOFTCAP) - top) * k - log2_s
    if ENTROPY:
        d = tl.maximum(d, NEVER, propagate_nan=tl.PropagateNan.ALL)
        grad = tl.exp2(d) * (constant + slope * d)
    else:
        grad = tl.exp2(d) * constant
    if SHIFTED:
        grad += at
    if SOFTCAP:
        t = tl.exp2(tl.abs(x * inner) * (-2 * LOG2E))
        grad *= 4 * t / ((1 + t) * (1 + t))
    return grad


@triton.jit
def _write_gradient(
    start,
    bias,
    vocab,
    target,
    x_t,
    top,
    log2_s,
    constant,
    slope,
    uniform,
    at_target,
    k,
    inner,
    cap,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    SMOOTHED: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Replace the logits of a row by their gradient, from the end of the row to its beginning; the target's last."""
    TILE: tl.constexpr = GROUPS * LANES
    i = tl.arange(0, GROUPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    whole = vocab // TILE * TILE
    # No warp may write before each has read the target's logit.
    tl.debug_barrier()
    if whole < vocab:
        columns = whole + i
        inside = columns < vocab
        x = tl.load(start + columns, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            x += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
        grad = _gradient(x, uniform, top, log2_s, constant, slope, k, inner, cap, SOFTCAP, ENTROPY, SMOOTHED)
        tl.store(start + columns, _rounded(grad, start), mask=inside)
    for done in range(0, whole, TILE):
        columns = whole - TILE - done + i
        x = tl.load(start + columns, eviction_policy="evict_first").to(tl.float32)
        if BIAS:
            x += tl.load(bias + columns).to(tl.float32)
        grad = _gradient(x, uniform, top, log2_s, constant, slope, k, inner, cap, SOFTCAP, ENTROPY, SMOOTHED)
        tl.store(start + columns, _rounded(grad, start), eviction_policy="evict_first")
    # Cheaper than to compare every column with the target.
    tl.debug_barrier()
    grad = _gradient(x_t, uniform + at_target, top, log2_s, constant, slope, k, inner, cap, SOFTCAP, ENTROPY, True)
    tl.store(start + target, _rounded(grad, start), mask=(target >= 0) & (target < vocab))


@triton.jit
def _logit_of(start, bias, target, known, BIAS: tl.constexpr):
    """The target's logit, bias included; NaN if there is no such token."""
    x = tl.load(start + target, mask=known, other=float("nan")).to(tl.float32)
    if BIAS:
        x += tl.load(bias + target, mask=known, other=0.0).to(tl.float32)
    return x


@triton.jit
def _write_zeros(start, vocab, TILE: tl.constexpr):
    i = tl.arange(0, TILE)
    zero = tl.zeros([TILE], start.dtype.element_ty)
    for offset in range(0, vocab, TILE):
        tl.store(start + offset + i, zero, mask=offset + i < vocab)


@triton.jit
def _softmax(
    start,
    bias,
    vocab,
    k,
    inner,
    cap,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    SMOOTHED: tl.constexpr,
    KEEP: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
):
    """The largest v of a row, log2 of sum 2^((v - largest) k), that sum's entropy part, and the sum of v."""
    TILE: tl.constexpr = GROUPS * LANES
    i = tl.arange(0, GROUPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    m = tl.full([LANES], LOWEST, tl.float32)
    s = tl.zeros([LANES], tl.float32)
    a = tl.zeros([LANES], tl.float32)
    b = tl.zeros([LANES], tl.float32)
    whole = vocab // TILE * TILE
    for offset in range(0, whole, TILE):
        v = _read(start + offset + i, bias + offset + i, i, inner, cap, False, BIAS, SOFTCAP, KEEP)
        m, s, a = _accumulate(v, m, s, a, k, ENTROPY)
        if SMOOTHED:
            b += tl.sum(v, 0)
    if whole < vocab:
        inside = whole + i < vocab
        v = _read(start + whole + i, bias + whole + i, inside, inner, cap, True, BIAS, SOFTCAP, KEEP)
        m, s, a = _accumulate(v, m, s, a, k, ENTROPY)
        if SMOOTHED:
            b += tl.sum(tl.where(inside, v, 0.0), 0)
    top = tl.max(m, 0)
    s, a = _rescaled(m, s, a, top, k, ENTROPY)
    total = tl.sum(s, 0)
    return top, tl.log2(total), tl.sum(a, 0) / total, tl.sum(b, 0)


@triton.jit(do_not_specialize=["ignore_index", "rows"])
def forward_kernel(
    logits,
    bias,
    targets,
    token_weights,
    logps,
    entropy,
    logsumexp,
    largest,
    log_total,
    mean_logp,
    hits,
    rows,
    vocab,
    pitch,
    k,
    inner,
    cap,
    share,
    factor,
    smoothing,
    z_loss,
    ignore_index,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ENTROPY: tl.constexpr,
    SMOOTHED: tl.constexpr,
    HITS: tl.constexpr,
    GRADIENT: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
):
    """All of a row; with GRADIENT the logits become the gradient of `factor` times the loss of the row."""
    distance = pitch.to(tl.int64)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        target = tl.load(targets + row).to(tl.int64)
        start = logits + row * distance
        if target == ignore_index:
            tl.store(logps + row, 0.0)
            tl.store(logsumexp + row, 0.0)
            tl.store(largest + row, 0.0)
            tl.store(log_total + row, 0.0)
            if ENTROPY:
                tl.store(entropy + row, 0.0)
            if SMOOTHED:
                tl.store(mean_logp + row, 0.0)
            if HITS:
                tl.store(hits + row, 0.0)
            if GRADIENT:
                _write_zeros(start, vocab, GROUPS * LANES)
        else:
            known = (target >= 0) & (target < vocab)
            x_t = _logit_of(start, bias, target, known, BIAS)
            v_t = _capped(x_t, inner, cap, SOFTCAP)
            top, log2_s, a, b = _softmax(
                start, bias, vocab, k, inner, cap, BIAS, SOFTCAP, ENTROPY, SMOOTHED, GRADIENT, GROUPS, LANES
            )
            lse = (top * k + log2_s) * LN2
            tl.store(logps + row, ((v_t - top) * k - log2_s) * LN2)
            tl.store(logsumexp + row, lse)
            tl.store(largest + row, top)
            tl.store(log_total + row, log2_s * LN2)
            if ENTROPY:
                tl.store(entropy + row, (log2_s - a) * LN2)
            if SMOOTHED:
                tl.store(mean_logp + row, ((b / vocab - top) * k - log2_s) * LN2)
            if HITS:
                tl.store(hits + row, (v_t >= top).to(tl.float32))
            if GRADIENT:
                weight = factor * share
                if WEIGHTED:
                    weight *= tl.load(token_weights + row).to(tl.float32)
                weight = tl.where(known, weight, float("nan"))
                _write_gradient(
                    start, bias, vocab, target, x_t, top, log2_s,
                    weight * (1 + 2 * z_loss * lse), 0.0, -weight * smoothing / vocab, weight * (smoothing - 1),
                    k, inner, cap, BIAS, SOFTCAP, False, SMOOTHED, GROUPS, LANES,
                )  # fmt: skip


@triton.jit(do_not_specialize=["ignore_index", "rows"])
def backward_kernel(
    logits,
    bias,
    targets,
    largest,
    log_total,
    constants,
    slopes,
    at_targets,
    rows,
    vocab,
    pitch,
    k,
    inner,
    cap,
    share,
    ignore_index,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
):
    """The logits, computed again, become the gradient that the coefficients of each row say."""
    distance = pitch.to(tl.int64)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        target = tl.load(targets + row).to(tl.int64)
        start = logits + row * distance
        if target == ignore_index:
            _write_zeros(start, vocab, GROUPS * LANES)
        else:
            known = (target >= 0) & (target < vocab)
            slope = 0.0
            if ENTROPY:
                slope = tl.load(slopes + row) * share * LN2
            constant = tl.where(known, tl.load(constants + row) * share, float("nan"))
            x_t = _logit_of(start, bias, target, known, BIAS)
            top, log2_s = tl.load(largest + row), tl.load(log_total + row) * LOG2E
            _write_gradient(
                start, bias, vocab, target, x_t, top, log2_s,
                constant, slope, 0.0, tl.load(at_targets + row) * share,
                k, inner, cap, BIAS, SOFTCAP, ENTROPY, False, GROUPS, LANES,
            )  # fmt: skip


@triton.jit
def scale_kernel(source, factors, out, columns, factor_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(factors + row * factor_stride).to(tl.float32)
    value = tl.load(source + row * columns + i, mask=i < columns, other=0.0).to(tl.float32) * factor
    tl.store(out + row * columns + i, _rounded(value, out), mask=i < columns)


def forward(
    logits_RV: Tensor,
    bias_V: Tensor | None,
    targets_R: Tensor,
    rule: Rule,
    objective: Objective,
    rows: Rows,
    gradient: bool,
    launch: Launch | None = None,
) -> None:
    """Fill `rows` (slices of R) and, with `gradient`, replace the logits by the gradient of the objective."""
    count, vocab = logits_RV.shape
    itemsize = logits_RV.element_size()
    launch = launch or forward_launch(vocab * itemsize, itemsize, gradient, device_of(logits_RV))
    weights = objective.token_weights_N
    with torch.cuda.device_of(logits_RV):
        forward_kernel[(min(count, launch.programs),)](
            logits_RV,
            logits_RV if bias_V is None else bias_V,
            targets_R,
            targets_R if weights is None else weights,
            *rows,
            count,
            vocab,
            logits_RV.stride(0),
            *_scales(rule),
            objective.factor,
            objective.smoothing,
            objective.z_loss,
            rule.ignore_index,
            BIAS=bias_V is not None,
            SOFTCAP=rule.softcap > 0,
            WEIGHTED=weights is not None,
            ENTROPY=rows.entropy_N.numel() > 0,
            SMOOTHED=rows.mean_logp_N.numel() > 0,
            HITS=rows.hits_N.numel() > 0,
            GRADIENT=gradient,
            GROUPS=launch.loads,
            LANES=launch.lanes(itemsize),
            num_warps=launch.warps,
            enable_fp_fusion=True,
        )


def backward(
    logits_RV: Tensor,
    bias_V: Tensor | None,
    targets_R: Tensor,
    rule: Rule,
    coefficients: Coefficients,
    launch: Launch | None = None,
) -> None:
    """Replace the logits by the gradient that the coefficients (slices of R) say."""
    count, vocab = logits_RV.shape
    itemsize = logits_RV.element_size()
    launch = launch or backward_launch(vocab * itemsize, itemsize, device_of(logits_RV))
    with torch.cuda.device_of(logits_RV):
        backward_kernel[(min(count, launch.programs),)](
            logits_RV,
            logits_RV if bias_V is None else bias_V,
            targets_R,
            *coefficients,
            count,
            vocab,
            logits_RV.stride(0),
            *_scales(rule),
            rule.ignore_index,
            BIAS=bias_V is not None,
            SOFTCAP=rule.softcap > 0,
            ENTROPY=coefficients.slope_N.numel() > 0,
            GROUPS=launch.loads,
            LANES=launch.lanes(itemsize),
            num_warps=launch.warps,
            enable_fp_fusion=True,
        )


def scale(source: Tensor, factors: Tensor, out: Tensor) -> None:
    """`out` = each row of `source` (contiguous, two dimensions) times its factor; `out` may be `source`."""
    rows, columns = source.shape
    if not source.numel():
        return
    block = min(triton.next_power_of_2(columns), 4096)
    with torch.cuda.device_of(source):
        scale_kernel[(rows, triton.cdiv(columns, block))](
            source, factors, out, columns, factors.stride(0) if factors.ndim else 0, BLOCK=block, num_warps=8
        )


def _scales(rule: Rule) -> tuple[float, float, float, float]:
    """k, inner, cap and share of the kernels."""
    share = rule.scale / rule.temperature
    if rule.softcap > 0:
        return 1 / (rule.temperature * log(2)), rule.scale / rule.softcap, rule.softcap, share
    return share / log(2), 1.0, 1.0, share
