"""The softmax of a row and its gradient in one read and one write, up to a factor of the row.

The gradient of the plain loss, weight (p - [j = t]), needs the sum of a row before the first element is written. Its
multiple s (p - [j = t]) does not: u = 2^((v - r) k) may be written as it is read, for any r that is near enough to the
largest v; at the target u - s is written once s, the sum of u, is known, and weight / s goes to `factors`, by which the
rows of the product with the head are multiplied in fp32 (`chunks.py`). Against two passes that is one read, and one
exponential of two, less for each logit, and nothing has to stay in a cache.

r is the largest v of the first tile, and of a tile that exceeds it by ROOM; what was written of the row before that is
read once more and scaled. That is rare, since 2^ROOM is a factor of e^33 between two probabilities.

Rounding. u has the relative error of p in the dtype of the logits, as an own write of p would. u - s at a target of
small p is near -s, which the dtype rounds, where p - 1 would be near -1, which it holds: the factor makes up for that,
so the target's share, the largest of such a row, is exact. fp16 has no range for u and takes two passes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pegbox_kernels.dispatch import on_device_of
from pegbox_kernels.linear_logprob.launch import Launch, device_of, one_pass_launch
from pegbox_kernels.linear_logprob.rows import Objective, Rows, Rule
from pegbox_kernels.linear_logprob.tiles import _capped, _logit_of, _slope_of_cap, _write_zeros
from pegbox_kernels.logprob.triton import LN2, LOWEST, _rounded

ROOM = tl.constexpr(48.0)
"""Powers of two that u may exceed 1: sums, and products with them, stay far below 2^127."""


@triton.jit
def _shrink(start, end, decay, BLOCK: tl.constexpr):
    """Multiply what was written of a row before column `end`. A quarter of a tile at once: registers are for tiles."""
    i = tl.arange(0, BLOCK)
    tl.debug_barrier()
    for offset in range(0, end, BLOCK):
        u = tl.load(start + offset + i).to(tl.float32) * decay
        tl.store(start + offset + i, _rounded(u, start))
    tl.debug_barrier()


@triton.jit
def _take(
    start,
    bias,
    offset,
    vocab,
    i,
    top,
    r,
    s,
    k,
    inner,
    cap,
    MASKED: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Replace a tile of logits by u (times the slope of the cap); the new largest v, r and sums."""
    columns = offset + i
    inside = columns < vocab
    if MASKED:
        x = tl.load(start + columns, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if BIAS:
            x += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
        v = tl.where(inside, _capped(x, inner, cap, SOFTCAP), -float("inf"))
    else:
        x = tl.load(start + columns, eviction_policy="evict_first").to(tl.float32)
        if BIAS:
            x += tl.load(bias + columns).to(tl.float32)
        v = _capped(x, inner, cap, SOFTCAP)
    highest = tl.max(tl.max(v, 0), 0)
    top = tl.maximum(top, highest)
    if (highest - r) * k > ROOM:
        decay = tl.exp2((r - highest) * k)
        _shrink(start, offset, decay, TILE // 4)
        s *= decay
        r = highest
    u = tl.exp2((v - r) * k)
    s += tl.sum(u, 0)
    if SOFTCAP:
        u *= _slope_of_cap(x, inner)
    if MASKED:
        tl.store(start + columns, _rounded(u, start), mask=inside)
    else:
        tl.store(start + columns, _rounded(u, start), eviction_policy="evict_first")
    return top, r, s


@triton.jit(do_not_specialize=["ignore_index", "rows"])
def one_pass_kernel(
    logits,
    bias,
    targets,
    token_weights,
    logps,
    logsumexp,
    largest,
    log_total,
    hits,
    factors,
    rows,
    vocab,
    pitch,
    k,
    inner,
    cap,
    share,
    factor,
    ignore_index,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HITS: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
):
    """All of a row; times `factors` the logits are the gradient of `factor` times its negative log-probability."""
    TILE: tl.constexpr = GROUPS * LANES
    i = tl.arange(0, GROUPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    distance = pitch.to(tl.int64)
    whole = vocab // TILE * TILE
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        target = tl.load(targets + row).to(tl.int64)
        start = logits + row * distance
        if target == ignore_index:
            tl.store(logps + row, 0.0)
            tl.store(logsumexp + row, 0.0)
            tl.store(largest + row, 0.0)
            tl.store(log_total + row, 0.0)
            tl.store(factors + row, 0.0)
            if HITS:
                tl.store(hits + row, 0.0)
            _write_zeros(start, vocab, TILE)
        else:
            known = (target >= 0) & (target < vocab)
            x_t = _logit_of(start, bias, target, known, BIAS)
            v_t = _capped(x_t, inner, cap, SOFTCAP)
            # No warp may write before each has read the target's logit.
            tl.debug_barrier()
            top = tl.full([], LOWEST, tl.float32)
            r = tl.full([], LOWEST, tl.float32)
            s = tl.zeros([LANES], tl.float32)
            for offset in range(0, whole, TILE):
                top, r, s = _take(
                    start, bias, offset, vocab, i, top, r, s, k, inner, cap, False, BIAS, SOFTCAP, TILE
                )  # fmt: skip
            if whole < vocab:
                top, r, s = _take(
                    start, bias, whole, vocab, i, top, r, s, k, inner, cap, True, BIAS, SOFTCAP, TILE
                )  # fmt: skip
            total = tl.sum(s, 0)
            # Referred to the largest logit the sum is at least 1, but for rounding: no log-probability is above 0.
            below = tl.maximum(total * tl.exp2((r - top) * k), 1.0, propagate_nan=tl.PropagateNan.ALL)
            log2_s = tl.log2(below)
            tl.store(logps + row, ((v_t - top) * k - log2_s) * LN2)
            tl.store(logsumexp + row, (top * k + log2_s) * LN2)
            tl.store(largest + row, top)
            tl.store(log_total + row, log2_s * LN2)
            if HITS:
                tl.store(hits + row, (v_t >= top).to(tl.float32))
            weight = factor * share
            if WEIGHTED:
                weight *= tl.load(token_weights + row).to(tl.float32)
            exact = tl.exp2((v_t - r) * k) - total
            if SOFTCAP:
                exact *= _slope_of_cap(x_t, inner)
            written = _rounded(exact, start)
            held = written.to(tl.float32)
            weight *= tl.where(held == 0, 1.0, exact / held) / total
            tl.store(factors + row, tl.where(known, weight, float("nan")))
            # After all of u; cheaper than to compare every column with the target.
            tl.debug_barrier()
            tl.store(start + target, written, mask=known)


def serves(dtype: torch.dtype, objective: Objective) -> bool:
    """Whether a row can be written as it is read: the plain loss, and a dtype with the range of fp32."""
    return dtype != torch.float16 and not objective.smoothing and not objective.z_loss


def forward(
    logits_RV: Tensor,
    bias_V: Tensor | None,
    targets_R: Tensor,
    rule: Rule,
    objective: Objective,
    rows: Rows,
    launch: Launch | None,
) -> None:
    """Fill `rows` (slices of R), its factors too, and replace the logits by the gradient of the loss over these."""
    count, vocab = logits_RV.shape
    itemsize = logits_RV.element_size()
    launch = launch or one_pass_launch(vocab * itemsize, itemsize, device_of(logits_RV))
    weights = objective.token_weights_N
    with on_device_of(logits_RV):
        one_pass_kernel[launch.grid(count)](
            logits_RV,
            logits_RV if bias_V is None else bias_V,
            targets_R,
            targets_R if weights is None else weights,
            rows.logps_N,
            rows.logsumexp_N,
            rows.largest_N,
            rows.log_total_N,
            rows.hits_N,
            rows.factors_N,
            count,
            vocab,
            logits_RV.stride(0),
            *rule.scales,
            objective.factor,
            rule.ignore_index,
            BIAS=bias_V is not None,
            SOFTCAP=rule.softcap > 0,
            WEIGHTED=weights is not None,
            HITS=rows.hits_N.numel() > 0,
            GROUPS=launch.loads,
            LANES=launch.lanes(itemsize),
            num_warps=launch.warps,
            enable_fp_fusion=True,
        )
