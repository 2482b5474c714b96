"""What all kernels do to a tile of a row: read logits, cap them, find the target's, write zeros."""

from __future__ import annotations

import triton
import triton.language as tl

from pegbox_kernels.logprob.triton import LOG2E


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
def _slope_of_cap(x, inner):
    """1 - tanh^2 of x inner, without cancellation."""
    t = tl.exp2(tl.abs(x * inner) * (-2 * LOG2E))
    return 4 * t / ((1 + t) * (1 + t))


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
