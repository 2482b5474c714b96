"""Attention with sinks over packed documents: causal or full, sliding window, grouped queries, differentiable.

    out, lse = attention(q, k, v, sinks_H=sinks, cu_seqlens_S=borders, window=128)

Tokens of all documents lie in one row, `cu_seqlens_S` says where each begins, and no token ever meets another document.
Gradients for q, k, v and sinks, of the outputs and of lse (which is the z-loss, and what joins parts of
a longer context). CUDA tensors (and CPU tensors under Triton's interpreter) take the kernels, all others the plain
PyTorch of `reference.py`. Registered as `torch.ops.pegbox_kernels.attention`, so that torch.compile keeps it whole.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from pegbox_kernels.attention import reference
from pegbox_kernels.dispatch import runs_kernels, values_at_hand
from pegbox_kernels.operators import differentiable, operator

if importlib.util.find_spec("triton") is not None:
    from pegbox_kernels.attention import launch as kernels
else:
    kernels = None  # type: ignore[assignment]

__all__ = ["Attended", "BlockTable", "attention", "block_table"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_HEAD_DIM = 256
FARTHEST = 2**31 // 256
"""Elements between tokens, or between heads, that are read in place: a tile has up to 256 of them."""


class Attended(NamedTuple):
    """`out_THD` in the dtype of q, contiguous; `lse_HT` fp32: log of the sum of exponentials, the sink included."""

    out_THD: Tensor
    lse_HT: Tensor


@dataclass(frozen=True)
class BlockTable:
    """Where the blocks of a packed batch lie, made once and shared by all layers of a step; see `block_table`."""

    cu_seqlens_S: Tensor
    tokens: int
    rows: Tensor


def block_table(cu_seqlens_S: Tensor, tokens: int) -> BlockTable:
    """The plan of a packed batch, on its device, without waiting for it; the longest blocks of work come first.

    Args:
        cu_seqlens_S: (documents + 1), int32, borders from 0 to `tokens`.
        tokens: of all documents together.
    """
    _check_borders(cu_seqlens_S)
    rows = _table(cu_seqlens_S, tokens)
    start, begin, end, _ = rows.unbind(-1)
    work = torch.stack([start[0] - begin[0], end[1] - start[1]]).masked_fill(start >= end, -1)
    order = work.argsort(dim=1, descending=True, stable=True)
    return BlockTable(cu_seqlens_S, tokens, rows.gather(1, order.unsqueeze(-1).expand_as(rows)))


def attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    *,
    sinks_H: Tensor | None = None,
    cu_seqlens_S: Tensor | BlockTable | None = None,
    max_seqlen: int | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    deterministic: bool = False,
) -> Attended:
    """Softmax attention within each document, accumulated in fp32, on tensor cores for bf16 and fp16.

    Args:
        q_THD: (T, H, D); read in place whatever the strides, if the last is 1 (a slice of a fused projection, a
            transposed view).
        k_TKD: (T, K, D), H a multiple of K: query head h reads key head h // (H / K).
        v_TKD: (T, K, D).
        sinks_H: (H), any float dtype: one more score per head, without a value; -inf is no sink. Its gradient is
            skipped if it is not asked for.
        cu_seqlens_S: (documents + 1), int32, on the device of q: borders from 0 to T, empty documents allowed; or the
            `block_table` of them, which saves its making in every layer. None: one document. On a GPU the values are
            not looked at, because that would make it wait: rows outside the borders are undefined.
        max_seqlen: tokens of the longest document, if the host knows it: a window that no document exceeds is dropped.
        scale: of the scores; 1 / sqrt(D) if None.
        causal: a token sees itself and those before it; False: its whole document.
        window: a token sees itself and the `window` - 1 tokens before it; causal only.
        deterministic: the same bits in every run. Otherwise the gradient of q may be added in no certain order, where
            that is faster (README.md); outputs, the other gradients, and short windows have the same bits always.

    Returns:
        `Attended`: outputs (T, H, D) and lse (H, T) fp32, natural logarithm, both differentiable once.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit.
    """
    if scale is None and q_THD.ndim == 3 and q_THD.shape[-1]:
        scale = q_THD.shape[-1] ** -0.5
    _check(q_THD, k_TKD, v_TKD, sinks_H, scale, causal, window)
    tokens = q_THD.shape[0]
    longest = tokens if max_seqlen is None else min(max_seqlen, tokens)
    if window is not None and window >= longest:
        window = None
    borders, rows = None, None
    if isinstance(cu_seqlens_S, BlockTable):
        if cu_seqlens_S.tokens != tokens:
            raise ValueError(f"the block table is for {cu_seqlens_S.tokens} tokens, q has {tokens}. Make it anew.")
        borders, rows = cu_seqlens_S.cu_seqlens_S, cu_seqlens_S.rows
    elif cu_seqlens_S is not None:
        _check_borders(cu_seqlens_S)
        borders = cu_seqlens_S
        rows = _table(borders, tokens)
    if borders is not None and borders.device != q_THD.device:
        raise ValueError(f"cu_seqlens lie on {borders.device} and q on {q_THD.device}. Move them once per batch.")
    q, k, v = _rows_in_place(q_THD), _rows_in_place(k_TKD), _rows_in_place(v_TKD)
    # Kernels read adjacent numbers; of a parameter this is the tensor itself.
    sinks = None if sinks_H is None else sinks_H.contiguous()
    return Attended(*_op(q, k, v, sinks, borders, rows, scale, causal, window, deterministic))


def _rows_in_place(tensor: Tensor) -> Tensor:
    """As it is, or a copy if its rows are not adjacent numbers, or a tile of them does not fit 32-bit offsets."""
    token, head, number = tensor.stride()
    if token <= FARTHEST and head <= FARTHEST and (number == 1 or tensor.shape[-1] == 1):
        return tensor
    return tensor.contiguous()


def _check(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float | None, causal: bool, window: int | None
) -> None:
    shape, keys, values, dtype, device = q.shape, k.shape, v.shape, q.dtype, q.device
    if len(shape) != 3 or len(keys) != 3 or keys != values or shape[0] != keys[0] or shape[2] != keys[2]:
        raise ValueError(
            f"{_shapes(q, k, v)} do not fit: q is (tokens, heads, head_dim), k and v (tokens, key heads, head_dim)."
        )
    heads, kv_heads = shape[1], keys[1]
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(f"{_shapes(q, k, v)}: the {heads} query heads must be a multiple of the {kv_heads} key heads.")
    if not 0 < shape[2] <= LARGEST_HEAD_DIM:
        raise ValueError(f"{_shapes(q, k, v)}: head_dim is {shape[2]}, the kernels take 1 to {LARGEST_HEAD_DIM}.")
    if dtype not in DTYPES or k.dtype != dtype or v.dtype != dtype:
        raise ValueError(
            f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: they must be the same, bf16, fp16 or fp32. Cast them, or use "
            "pegbox_kernels.attention.reference for fp64."
        )
    if k.device != device or v.device != device:
        raise ValueError(f"q lies on {q.device}, k on {k.device}, v on {v.device}. Move them to one device.")
    if sinks is not None and (sinks.shape != (heads,) or not sinks.is_floating_point()):
        raise ValueError(f"sinks are {tuple(sinks.shape)} {sinks.dtype}: one float per query head, ({heads},).")
    if sinks is not None and sinks.device != device:
        raise ValueError(f"sinks lie on {sinks.device} and q on {q.device}. Move them to one device.")
    if scale is None or not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}: scores are multiplied by it, so it must be above 0; None is 1 / sqrt(D).")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}: a token sees at least itself, window=1; None is no window.")
    if window is not None and not causal:
        raise ValueError(f"window={window} with causal=False: a window reaches back only. Pass causal=True.")


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"


def _check_borders(cu_seqlens: Tensor) -> None:
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"cu_seqlens are {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}: (documents + 1) borders in int32. "
            "Use cu_seqlens.to(torch.int32)."
        )


def _check_values(cu_seqlens: Tensor, tokens: int) -> None:
    borders = cu_seqlens.tolist()
    if borders[0] != 0 or borders[-1] != tokens or any(before > after for before, after in pairwise(borders)):
        raise ValueError(f"cu_seqlens are {borders}: they must rise from 0 to the number of tokens, {tokens}.")


def _shape(q: Tensor, k: Tensor, scale: float, causal: bool, window: int | None):  # type: ignore[no-untyped-def]
    return _made_once(*q.shape, k.shape[1], q.dtype, scale, causal, window)


@lru_cache(maxsize=256)
def _made_once(tokens, heads, head_dim, kv_heads, dtype, scale, causal, window):  # type: ignore[no-untyped-def]
    """All layers of a step have few shapes between them."""
    return kernels.Shape(
        tokens=tokens,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        scale=scale,
        causal=causal,
        window=window,
    )


def _make_table(cu_seqlens, tokens):  # type: ignore[no-untyped-def]
    if values_at_hand(cu_seqlens):
        _check_values(cu_seqlens, tokens)
    if runs_kernels(cu_seqlens):
        return kernels.make_table(cu_seqlens.contiguous(), tokens)
    return cu_seqlens.new_empty(2, 0, 4)


def _fake_table(cu_seqlens, tokens):  # type: ignore[no-untyped-def]
    if kernels is None:
        return cu_seqlens.new_empty(2, 0, 4)
    return cu_seqlens.new_empty(2, tokens // kernels.GRANULE + cu_seqlens.shape[0] - 1, 4)


_table = operator("attention_table", _make_table, _fake_table, schema="(Tensor cu_seqlens, SymInt tokens) -> Tensor")


def _forward(q, k, v, sinks, cu_seqlens, table, scale, causal, window, deterministic):  # type: ignore[no-untyped-def]
    if runs_kernels(q):
        shape = _shape(q, k, scale, causal, window)
        return kernels.forward(q, k, v, sinks, table, shape, kernels.default_launch(shape, deterministic))
    out, lse = reference.attention(q, k, v, sinks, cu_seqlens, scale, causal, window)
    return out.contiguous(), lse.contiguous()


def _fake_forward(q, k, v, sinks, cu_seqlens, table, scale, causal, window, deterministic):  # type: ignore[no-untyped-def]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, sinks, cu_seqlens, table, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, sinks, cu_seqlens, table, *output)


def _differentiate(ctx, dout, dlse):  # type: ignore[no-untyped-def]
    q, k, v, sinks, cu_seqlens, table, out, lse = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    trained = sinks is not None and ctx.needs_input_grad[3]
    saved = (q, k, v, sinks, cu_seqlens, table, out, lse, dout, dlse)
    dq, dk, dv, dsinks = _backward(*saved, trained, *ctx.options)
    return dq, dk, dv, dsinks if trained else None, None, None, None, None, None, None


_op = differentiable(
    "attention",
    _forward,
    _fake_forward,
    schema="(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? cu_seqlens, Tensor? table, float scale, bool causal, "
    "int? window, bool deterministic) -> (Tensor, Tensor)",
    save=_save,
    differentiate=_differentiate,
)


def _gradients(  # type: ignore[no-untyped-def]
    q, k, v, sinks, cu_seqlens, table, out, lse, dout, dlse, sinks_too, scale, causal, window, deterministic
):
    if runs_kernels(q):
        shape = _shape(q, k, scale, causal, window)
        saved = kernels.Saved(
            q=q,
            k=k,
            v=v,
            sinks=sinks if sinks_too else None,
            out=out,
            lse=lse,
            dout=_rows_in_place(dout),
            dlse=None if dlse is None else dlse.contiguous(),
            table=table,
        )
        dq, dk, dv, dsinks = kernels.backward(saved, shape, kernels.default_launch(shape, deterministic))
    else:
        dq, dk, dv, dsinks = reference.attention_backward(
            q, k, v, sinks if sinks_too else None, cu_seqlens, out, lse, dout, dlse, scale, causal, window
        )
    return dq, dk, dv, q.new_empty(0) if dsinks is None else dsinks


def _fake_gradients(q, k, v, sinks, cu_seqlens, table, out, lse, dout, dlse, sinks_too, *_):  # type: ignore[no-untyped-def]
    dq, dk, dv = (torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (q, k, v))
    return dq, dk, dv, torch.empty_like(sinks) if sinks_too else q.new_empty(0)


_backward = operator(
    "attention_backward",
    _gradients,
    _fake_gradients,
    schema="(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? cu_seqlens, Tensor? table, Tensor out, Tensor lse, "
    "Tensor dout, Tensor? dlse, bool sinks_too, float scale, bool causal, int? window, bool deterministic) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
