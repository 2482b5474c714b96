"""Attention with sinks in plain PyTorch, one document after another, and its gradient by formula.

    s_ij = scale q_i . k_j    lse_i = log(exp(sink) + sum_j exp(s_ij))    p_ij = exp(s_ij - lse_i)
    o_i = sum_j p_ij v_j

A sink is one more score per head, without a value: it takes its share of a row and gives nothing (gpt-oss), so the
outputs without it, times sigmoid(lse - sink), are those with it. With P's gradient dP = dO V^T and
D_i = dO_i . o_i - dlse_i, the chain rule leaves (FlashAttention-2, arXiv:2307.08691, section 3.2; a sink is a column
whose dP is zero)

    ds_ij = p_ij (dP_ij - D_i)    dq = scale ds K    dk = scale ds^T Q    dv = P^T dO
    dsink = -sum_i exp(sink - lse_i) D_i

Forward products are in the dtype of the inputs and softmax in fp32 (fp64 for fp64), as plain PyTorch would.
Shapes: q (T, H, D), k and v (T, K, D) with H a multiple of K, sinks (H), borders (documents + 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor


def attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    sinks_H: Tensor | None,
    cu_seqlens_S: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Outputs (T, H, D) in the dtype of q and lse (H, T) in fp32 (fp64 for fp64)."""
    outputs, lses = [], []
    for rows in documents(q_THD, cu_seqlens_S):
        q, k, v = (_heads_first(tensor[rows], q_THD.shape[1]) for tensor in (q_THD, k_TKD, v_TKD))
        scores = _scores(q, k, scale, causal, window)
        lse = scores.logsumexp(-1)
        out = (scores - lse.unsqueeze(-1)).exp().to(v.dtype) @ v
        if sinks_H is not None:
            sinks = sinks_H.to(lse.dtype).unsqueeze(-1)
            out = out * torch.sigmoid(lse - sinks).unsqueeze(-1).to(out.dtype)
            lse = torch.logaddexp(lse, sinks)
        outputs.append(out.transpose(0, 1))
        lses.append(lse)
    if not outputs:
        return torch.empty_like(q_THD), q_THD.new_empty(q_THD.shape[1], 0, dtype=_wide(q_THD))
    return torch.cat(outputs), torch.cat(lses, 1)


def attention_backward(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    sinks_H: Tensor | None,
    cu_seqlens_S: Tensor | None,
    out_THD: Tensor,
    lse_HT: Tensor,
    dout_THD: Tensor,
    dlse_HT: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v (contiguous) and sinks (None: they are frozen), for those of the outputs and of lse."""
    dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q_THD, k_TKD, v_TKD))
    wide = _wide(q_THD)
    dsinks = None if sinks_H is None else torch.zeros_like(sinks_H, dtype=wide)
    heads, kv_heads = q_THD.shape[1], k_TKD.shape[1]
    for rows in documents(q_THD, cu_seqlens_S):
        tensors = (q_THD, k_TKD, v_TKD, out_THD, dout_THD)
        q, k, v, out, dout = (_heads_first(tensor[rows], heads).to(wide) for tensor in tensors)
        lse = lse_HT[:, rows].to(wide)
        p = (_scores(q, k, scale, causal, window) - lse.unsqueeze(-1)).exp()
        delta = (out * dout).sum(-1)
        if dlse_HT is not None:
            delta = delta - dlse_HT[:, rows].to(wide)
        ds = p * (dout @ v.transpose(1, 2) - delta.unsqueeze(-1)) * scale
        dq[rows] = (ds @ k).transpose(0, 1).to(dq.dtype)
        for gradient, each in ((dk, ds.transpose(1, 2) @ q), (dv, p.transpose(1, 2) @ dout)):
            of_group = each.unflatten(0, (kv_heads, heads // kv_heads)).sum(1)
            gradient[rows] = of_group.transpose(0, 1).to(gradient.dtype)
        if sinks_H is not None and dsinks is not None:
            dsinks -= ((sinks_H.to(wide).unsqueeze(-1) - lse).exp() * delta).sum(-1)
    return dq, dk, dv, None if sinks_H is None or dsinks is None else dsinks.to(sinks_H.dtype)


def documents(q_THD: Tensor, cu_seqlens_S: Tensor | None) -> Iterator[slice]:
    """The rows of each document that has any."""
    borders = [0, q_THD.shape[0]] if cu_seqlens_S is None else cu_seqlens_S.tolist()
    for begin, end in pairwise(borders):
        if end > begin:
            yield slice(begin, end)


def visible(tokens: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """(tokens, tokens), whether the token of the row sees that of the column: itself and window - 1 before it."""
    i = torch.arange(tokens, device=device)
    behind = i[:, None] - i[None, :]
    seen = behind >= 0 if causal else torch.ones_like(behind, dtype=torch.bool)
    return seen if window is None else seen & (behind < window)


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool, window: int | None) -> Tensor:
    """(H, t, t) of one document, fp32 or fp64; -inf where the key is not seen."""
    scores = (q @ k.transpose(1, 2) * scale).to(_wide(q))
    return scores.masked_fill(~visible(q.shape[1], causal, window, q.device), -torch.inf)


def _heads_first(tensor: Tensor, heads: int) -> Tensor:
    """(t, K, D) as (H, t, D), each head of keys repeated for its group of queries."""
    return tensor.transpose(0, 1).repeat_interleave(heads // tensor.shape[1], 0)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
