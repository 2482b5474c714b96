"""The Triton kernels: softmax over a chunk of logits, whose gradient takes their place, and a scaling of rows.

A row is one program's: forward reads it once for the online softmax of `logprob` (its running maxima and sums are
imported), and a second time, from its end to its beginning, to write the gradient where the logits were. The second
read is to come from the L2 cache: a persistent grid has a program on each multiprocessor and no more, and what was read
last is read first. Where the loss allows, `one_pass.py` needs no second read.

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

import triton
import triton.language as tl
from torch import Tensor

from pegbox_kernels.dispatch import on_device_of
from pegbox_kernels.linear_logprob import one_pass
from pegbox_kernels.linear_logprob.launch import Launch, backward_launch, device_of, forward_launch
from pegbox_kernels.linear_logprob.rows import Coefficients, Objective, Rows, Rule
from pegbox_kernels.linear_logprob.tiles import _capped, _logit_of, _read, _slope_of_cap, _write_zeros
from pegbox_kernels.logprob.triton import LN2, LOG2E, LOWEST, NEVER, _accumulate, _rescaled, _rounded


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
        grad *= _slope_of_cap(x, inner)
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
    """Fill `rows` (slices of R) and, with `gradient`, replace the logits by the gradient of the objective.

    Where `rows` has room for factors, the gradient is what the logits become, times these (`one_pass.py`).
    """
    if rows.factors_N.numel():
        one_pass.forward(logits_RV, bias_V, targets_R, rule, objective, rows, launch)
        return
    count, vocab = logits_RV.shape
    itemsize = logits_RV.element_size()
    launch = launch or forward_launch(vocab * itemsize, itemsize, gradient, device_of(logits_RV))
    weights = objective.token_weights_N
    with on_device_of(logits_RV):
        forward_kernel[launch.grid(count)](
            logits_RV,
            logits_RV if bias_V is None else bias_V,
            targets_R,
            targets_R if weights is None else weights,
            *rows[:-1],
            count,
            vocab,
            logits_RV.stride(0),
            *rule.scales,
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
    with on_device_of(logits_RV):
        backward_kernel[launch.grid(count)](
            logits_RV,
            logits_RV if bias_V is None else bias_V,
            targets_R,
            *coefficients,
            count,
            vocab,
            logits_RV.stride(0),
            *rule.scales,
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
    with on_device_of(source):
        scale_kernel[(rows, triton.cdiv(columns, block))](
            source, factors, out, columns, factors.stride(0) if factors.ndim else 0, BLOCK=block, num_warps=8
        )
