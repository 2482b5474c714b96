"""Causal attention inside the documents of a flattened batch: one function for each backend, all of one meaning.

A token sees itself and what stands before it in its own document, in window layers at most `window` tokens, itself
among them. A sink is one more logit of each head that takes probability and has no value (gpt-oss), so that with the
log-sum-exp L of a row and its sink s the output is the one without sinks times sigmoid(L - s).

    flash-attn-4  the CuTe kernels of the package flash-attn-4, varlen (Dao 2023, arXiv:2307.08691, and successors)
    pegbox        the Triton kernel of pegbox-kernels; on the CPU its plain reference
    flex          torch's flex attention, compiled on CUDA, with a block mask made once per batch
    eager         every pair of tokens, in plain torch

The plugins `attention` and `gpt-oss-attention` hold this file in the same words, because no plugin imports another; a
test keeps them equal.

    T  tokens of the flattened batch    H  heads    K  heads of keys and values    D  size of a head
    B  rows    Q  queries of a row    U  keys of a row    S  document borders
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

if TYPE_CHECKING:
    from pegbox_kernels.attention import BlockTable
    from torch import Tensor
    from torch.nn.attention.flex_attention import BlockMask

Backend = Literal["flash-attn-4", "pegbox", "flex", "eager"]
KEPT_MASKS = 8
"""Masks kept at once: two kinds of layers, for micro-batches whose backward has not run."""


@dataclass(frozen=True)
class Borders:
    """Where documents begin and end in a flattened batch, from 0 to T, int32; and the tokens of the longest one."""

    cu_seqlens_S: Tensor
    longest: int


@dataclass(frozen=True)
class Rule:
    """What a layer's attention does beside being causal: `window` counts the token itself; None: no such thing."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    deterministic: bool = False


class Attend(Protocol):
    """One backend: queries `_THD`, keys and values `_TKD` to attended values `_THD`."""

    def __call__(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, sinks_H: Tensor | None, borders: Borders, rule: Rule
    ) -> Tensor: ...


class Masks:
    """Masks and tables of the last batches, each made once for all layers of its kind."""

    def __init__(self) -> None:
        self._kept: list[tuple[weakref.ref[Tensor], tuple[object, ...], Any]] = []

    def block(self, borders: Borders, tokens: int, window: int | None) -> BlockMask:
        """What flex attention computes: the blocks in which some token sees some other."""
        return self._once(borders, ("block", tokens, window), lambda: _block_mask(borders, tokens, window))

    def dense(self, borders: Borders, tokens: int, window: int | None) -> Tensor:
        """Who sees whom, `_TT`, boolean."""
        return self._once(borders, ("dense", tokens, window), lambda: _dense_mask(borders, tokens, window))

    def table(self, borders: Borders, tokens: int) -> BlockTable:
        """Where the kernel's blocks lie, those with the most work first."""
        from pegbox_kernels.attention import block_table

        return self._once(borders, ("table", tokens), lambda: block_table(borders.cu_seqlens_S, tokens))

    @torch.compiler.disable
    def _once(self, borders: Borders, key: tuple[object, ...], make: Any) -> Any:
        for of, known, mask in self._kept:
            if of() is borders.cu_seqlens_S and known == key:
                return mask
        with torch.inference_mode(False):  # a mask made in generation may serve training too
            mask = make()
        alive = [entry for entry in self._kept if entry[0]() is not None]
        self._kept = [*alive, (weakref.ref(borders.cu_seqlens_S), key, mask)][-KEPT_MASKS:]
        return mask


def backend(name: Backend, masks: Masks) -> Attend:
    """The function of a backend; `masks` is kept by who calls it."""
    functions: dict[str, Attend] = {
        "flash-attn-4": _flash_attn_4,
        "pegbox": partial(_pegbox, masks),
        "flex": partial(_flex, masks),
        "eager": partial(_eager, masks),
    }
    return functions[name]


def dense_attention(
    q_BHQD: Tensor,
    k_BKUD: Tensor,
    v_BKUD: Tensor,
    sees: Tensor | None,
    *,
    scale: float,
    sinks_H: Tensor | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention as it is written down: every query with every key; the softmax is taken in float32 or more.

    Args:
        sees: broadcast to `_BHQU`: boolean, or added to the logits; None: every query sees every key.
        dropout: probability that a weight is dropped.

    Returns:
        Attended values `_BHQD`.
    """
    groups = q_BHQD.shape[1] // k_BKUD.shape[1]
    k_BHUD, v_BHUD = (part.repeat_interleave(groups, dim=1) for part in (k_BKUD, v_BKUD))
    logits_BHQU = (q_BHQD @ k_BHUD.transpose(2, 3)) * scale
    if softcap is not None:
        logits_BHQU = softcap * torch.tanh(logits_BHQU / softcap)
    if sees is not None and sees.dtype == torch.bool:
        logits_BHQU = logits_BHQU.masked_fill(~sees, torch.finfo(logits_BHQU.dtype).min)
    elif sees is not None:
        logits_BHQU = logits_BHQU + sees
    if sinks_H is not None:
        sinks = sinks_H.to(logits_BHQU.dtype)[None, :, None, None].expand(*logits_BHQU.shape[:3], 1)
        logits_BHQU = torch.cat([logits_BHQU, sinks], dim=-1)
    exact = torch.promote_types(logits_BHQU.dtype, torch.float32)
    weights = logits_BHQU.softmax(-1, dtype=exact)[..., : k_BHUD.shape[2]]
    weights = torch.nn.functional.dropout(weights, dropout) if dropout else weights
    return weights.to(v_BHUD.dtype) @ v_BHUD


def _flash_attn_4(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, sinks_H: Tensor | None, borders: Borders, rule: Rule
) -> Tensor:
    from flash_attn.cute.interface import flash_attn_varlen_func

    attended = flash_attn_varlen_func(
        q_THD,
        k_TKD,
        v_TKD,
        cu_seqlens_q=borders.cu_seqlens_S,
        cu_seqlens_k=borders.cu_seqlens_S,
        max_seqlen_q=borders.longest,
        max_seqlen_k=borders.longest,
        softmax_scale=rule.scale,
        causal=True,
        window_size=(None, None) if rule.window is None else (rule.window - 1, 0),
        learnable_sink=sinks_H,
        softcap=rule.softcap or 0.0,
        deterministic=rule.deterministic,
    )
    return attended[0] if isinstance(attended, tuple) else attended


def _pegbox(
    masks: Masks,
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    sinks_H: Tensor | None,
    borders: Borders,
    rule: Rule,
) -> Tensor:
    from pegbox_kernels.attention import attention

    compiling = torch.compiler.is_compiling()  # a table from outside would break the graph
    one = borders.cu_seqlens_S.shape[0] == 2  # one document is all tokens, for which there are faster kernels
    documents = borders.cu_seqlens_S if compiling else None if one else masks.table(borders, q_THD.shape[0])
    attended = attention(
        q_THD,
        k_TKD,
        v_TKD,
        sinks_H=sinks_H,
        cu_seqlens_S=documents,
        max_seqlen=borders.longest,
        scale=rule.scale,
        causal=True,
        window=rule.window,
        deterministic=rule.deterministic,
    )
    return attended.out_THD


def _flex(
    masks: Masks,
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    sinks_H: Tensor | None,
    borders: Borders,
    rule: Rule,
) -> Tensor:
    heads, groups = q_THD.shape[1], q_THD.shape[1] // k_TKD.shape[1]
    if heads & (heads - 1):  # its kernels group a power of two of heads
        k_TKD, v_TKD = (part.repeat_interleave(groups, dim=1) for part in (k_TKD, v_TKD))
    q_1HTD, k_1KTD, v_1KTD = (part.transpose(0, 1)[None] for part in (q_THD, k_TKD, v_TKD))
    options: dict[str, object] = {
        "score_mod": None if rule.softcap is None else _capped(rule.softcap),
        "block_mask": masks.block(borders, q_THD.shape[0], rule.window),
        "scale": rule.scale,
        "enable_gqa": k_1KTD.shape[1] != heads,
    }
    attend = _flex_attention(q_THD.is_cuda)
    if sinks_H is None:
        return attend(q_1HTD, k_1KTD, v_1KTD, **options)[0].transpose(0, 1)
    out_1HTD, lse_1HT = _with_lse(attend, q_1HTD, k_1KTD, v_1KTD, options)
    kept_1HT = torch.sigmoid(lse_1HT - sinks_H.to(lse_1HT.dtype)[None, :, None])
    return (out_1HTD * kept_1HT[..., None].to(out_1HTD.dtype))[0].transpose(0, 1)


@cache
def _flex_attention(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if compiled else flex_attention


def _with_lse(attend: Any, q: Tensor, k: Tensor, v: Tensor, options: dict[str, object]) -> tuple[Tensor, Tensor]:
    """Attended values and log-sum-exp, in the words of this torch."""
    from torch.nn.attention import flex_attention

    request = getattr(flex_attention, "AuxRequest", None)
    if request is None:
        out, lse = attend(q, k, v, **options, return_lse=True)
        return out, lse
    out, auxiliary = attend(q, k, v, **options, return_aux=request(lse=True))
    return out, auxiliary.lse


def _capped(softcap: float) -> Any:
    def capped(score: Tensor, *_: object) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


def _eager(
    masks: Masks,
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    sinks_H: Tensor | None,
    borders: Borders,
    rule: Rule,
) -> Tensor:
    q_1HTD, k_1KTD, v_1KTD = (part.transpose(0, 1)[None] for part in (q_THD, k_TKD, v_TKD))
    sees_TT = masks.dense(borders, q_THD.shape[0], rule.window)
    options = {"scale": rule.scale, "sinks_H": sinks_H, "softcap": rule.softcap}
    return dense_attention(q_1HTD, k_1KTD, v_1KTD, sees_TT, **options)[0].transpose(0, 1)


def _documents(borders: Borders, tokens: int) -> Tensor:
    """The number of each token's document, `_T`."""
    where = torch.arange(tokens, device=borders.cu_seqlens_S.device, dtype=torch.int32)
    return torch.searchsorted(borders.cu_seqlens_S, where, right=True)


def _dense_mask(borders: Borders, tokens: int, window: int | None) -> Tensor:
    document_T = _documents(borders, tokens)
    at = torch.arange(tokens, device=document_T.device)
    back_TT = at[:, None] - at[None, :]
    sees_TT = (back_TT >= 0) & (document_T[:, None] == document_T[None, :])
    return sees_TT if window is None else sees_TT & (back_TT < window)


def _block_mask(borders: Borders, tokens: int, window: int | None) -> BlockMask:
    from torch.nn.attention.flex_attention import create_block_mask

    document_T = _documents(borders, tokens)

    def sees(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        inside = (query >= key) & (document_T[query] == document_T[key])
        return inside if window is None else inside & (query - key < window)

    device = document_T.device
    compiled = device.type == "cuda"  # uncompiled it would lay out every pair of tokens
    return create_block_mask(sees, None, None, tokens, tokens, device=str(device), _compile=compiled)
