"""Rotary position embeddings of queries and keys in one launch, halves or interleaved, whole heads or parts of them.

    q, k = rope(q, k, cos, sin)                     # tables as transformers makes them, YaRN's scale included
    q, k = rope(q, k, cos, sin, rotary_dim=64)      # the first 64 numbers of each head are turned
    q, k = rope(q, k, cos, sin, interleaved=True)   # neighbours are a pair

The gradient is the transposed map of the same kernel, needs the tables alone, and can be differentiated again. CUDA
tensors (and CPU tensors under Triton's interpreter) take the kernel of `triton.py`, all others the plain PyTorch of
`reference.py`. Under torch.compile it is `torch.ops.pegbox_kernels.rope`, which is kept whole.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from pegbox_kernels.dispatch import runs_kernels
from pegbox_kernels.operators import differentiable, operator
from pegbox_kernels.rope import reference

__all__ = ["rope"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    heads_dim: int = 1,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Turn each pair of numbers of a head by the angle of its position, computed in fp32.

    Args:
        q: (B, Hq, T, D), fp32, bf16 or fp16, with any strides of rows, heads and tokens.
        k: (B, Hk, T, D), likewise.
        cos, sin: (B or 1, T, R) or (B or 1, T, R / 2), of any of these dtypes: one number for each turned element, or
            for each pair. They have no gradient.
        rotary_dim: R, how many numbers of each head are turned; all of them if not given.
        interleaved: a pair is two neighbours, not one of each half.
        heads_dim: 1 for (B, H, T, D), 2 for (B, T, H, D).
        inplace: write the results into q and k; only where autograd does not record.

    Returns:
        The turned q and k, in their own dtypes and with strides like theirs.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or autograd would have to follow a change in place.
    """
    rotary = q.shape[-1] if rotary_dim is None else rotary_dim
    _check(q, k, cos, sin, rotary, heads_dim)
    if inplace:
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
            raise ValueError("inplace=True, but q or k needs a gradient. Pass inplace=False, or use torch.no_grad().")
        _op_inplace(q, k, cos, sin, rotary, interleaved, heads_dim)
        return q, k
    found: tuple[Tensor, Tensor] = _op(q, k, cos, sin, rotary, interleaved, heads_dim, False)
    return found


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary: int, heads_dim: int) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"
    if heads_dim not in (1, 2):
        raise ValueError(f"heads_dim is {heads_dim}: write 1 for (B, H, T, D) or 2 for (B, T, H, D).")
    if q.ndim != 4 or k.ndim != 4 or cos.ndim != 3 or cos.shape != sin.shape:
        raise ValueError(f"{shapes}: q and k have four dimensions, cos and sin three and the same shape.")
    tokens = q.shape[3 - heads_dim]
    if (k.shape[0], k.shape[3 - heads_dim], k.shape[3]) != (q.shape[0], tokens, q.shape[3]):
        raise ValueError(f"{shapes}: q and k may differ in their heads only, dimension {heads_dim}.")
    if cos.shape[0] not in (1, q.shape[0]) or cos.shape[1] != tokens:
        raise ValueError(f"{shapes}: the tables need one row or {q.shape[0]}, and {tokens} tokens.")
    if rotary % 2 or not 2 <= rotary <= q.shape[3]:
        raise ValueError(f"rotary_dim is {rotary}: an even number from 2 to {q.shape[3]}, the size of a head.")
    if cos.shape[2] not in (rotary, rotary // 2):
        raise ValueError(f"{shapes}: tables are {rotary} or {rotary // 2} wide; for another part pass rotary_dim.")
    for name, tensor in {"q": q, "k": k, "cos": cos, "sin": sin}.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{name} is {tensor.dtype}: the kernels compute bf16, fp16 and fp32. Use {name}.float(), or "
                "pegbox_kernels.rope.reference for fp64."
            )
        if tensor.device != q.device:
            raise ValueError(f"q lies on {q.device} and {name} on {tensor.device}. Move one of them.")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos or sin needs a gradient, which this operation does not compute. Pass cos.detach().")


if importlib.util.find_spec("triton") is not None:
    from pegbox_kernels.rope import triton as kernels
else:
    kernels = None  # type: ignore[assignment]


def _adjacent(x: Tensor) -> Tensor:
    """With the numbers of a head side by side, and no memory that two of them share."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _forward(q, k, cos, sin, rotary, interleaved, heads_dim, transposed):  # type: ignore[no-untyped-def]
    """q and k, turned; `transposed`: their gradients, turned back."""
    q_out, k_out = _like(q), _like(k)
    if runs_kernels(q):
        parts = (_adjacent(q), _adjacent(k), q_out, k_out, cos, sin)
        kernels.turn(*parts, rotary, interleaved, heads_dim, transposed)
        return q_out, k_out
    found = reference.rope(q, k, cos, sin, rotary, interleaved, heads_dim, transposed)
    return q_out.copy_(found[0]), k_out.copy_(found[1])


def _like(x: Tensor) -> Tensor:
    """Memory for a result whose strides are ordered as those of x, the numbers of a head adjacent."""
    by_token = x.ndim == 4 and x.stride(1) < x.stride(2)
    shape = (x.shape[0], x.shape[2], x.shape[1], x.shape[3]) if by_token else x.shape
    made = torch.empty(shape, dtype=x.dtype, device=x.device)
    return made.transpose(1, 2) if by_token else made


def _fake(q, k, cos, sin, rotary, interleaved, heads_dim, transposed):  # type: ignore[no-untyped-def]
    return _like(q), _like(k)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, _, cos, sin, ctx.rotary, ctx.interleaved, ctx.heads_dim, ctx.transposed = inputs
    ctx.save_for_backward(cos, sin)


def _differentiate(ctx, grad_q, grad_k):  # type: ignore[no-untyped-def]
    """The operation itself, the other way."""
    cos, sin = ctx.saved_tensors
    turned = _op(grad_q, grad_k, cos, sin, ctx.rotary, ctx.interleaved, ctx.heads_dim, not ctx.transposed)
    return *turned, None, None, None, None, None, None


_op = differentiable(
    "rope",
    _forward,
    _fake,
    schema="(Tensor q, Tensor k, Tensor cos, Tensor sin, int rotary, bool interleaved, int heads_dim, "
    "bool transposed) -> (Tensor, Tensor)",
    save=_save,
    differentiate=_differentiate,
)


def _in_place(q, k, cos, sin, rotary, interleaved, heads_dim):  # type: ignore[no-untyped-def]
    if runs_kernels(q) and q.stride(-1) == 1 and k.stride(-1) == 1:
        kernels.turn(q, k, q, k, cos, sin, rotary, interleaved, heads_dim, False)
        return
    for part, turned in zip((q, k), _forward(q, k, cos, sin, rotary, interleaved, heads_dim, False), strict=True):
        part.copy_(turned)


def _fake_in_place(q, k, cos, sin, rotary, interleaved, heads_dim):  # type: ignore[no-untyped-def]
    return None


_op_inplace = operator(
    "rope_",
    _in_place,
    _fake_in_place,
    schema="(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, int rotary, bool interleaved, int heads_dim) -> ()",
    mutates=("q", "k"),
)
