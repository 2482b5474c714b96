"""Root-mean-square normalization of rows, with the weight, the gate and the residual that models put around it.

    y = rms_norm(x, weight, 1e-6)                              # Llama, Qwen, Mistral
    y = rms_norm(x, weight, 1e-6, offset=1.0, cast="gemma")    # Gemma: the weight is kept as its distance from 1
    y, total = rms_norm(x, weight, 1e-6, residual=residual)    # the sum x + residual is normalized, and given too
    y = rms_norm(x, weight, 1e-6, gate=gate)                   # Qwen3-Next: times silu(gate)

Differentiable once. CUDA tensors (and CPU tensors under Triton's interpreter) take the kernels of `triton.py`, all
others the plain PyTorch of `reference.py`. Under torch.compile it is `torch.ops.pegbox_kernels.rms_norm`, which is kept
whole.
"""

from __future__ import annotations

import importlib.util
from typing import Literal, overload

import torch
from torch import Tensor

from pegbox_kernels.dispatch import runs_kernels
from pegbox_kernels.operators import differentiable, operator
from pegbox_kernels.rms_norm import reference

__all__ = ["rms_norm"]

Cast = Literal["llama", "gemma"]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST = 16384


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    cast: Cast = "llama",
    gate: Tensor | None = None,
    residual: None = None,
) -> Tensor: ...


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    cast: Cast = "llama",
    gate: Tensor | None = None,
    residual: Tensor,
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    cast: Cast = "llama",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) times (offset + weight) times silu(gate), over the last dimension, in fp32.

    Args:
        x: (..., H), fp32, bf16 or fp16, H at most 16384; strided rows (heads of a packed projection) are not copied.
        weight: (H,) of any of these dtypes, or None. Its gradient is computed only if it is trained, always in the
            same order.
        eps: added to the mean of squares; at least 0.
        offset: added to the weight; 1 for models that keep it as its distance from 1.
        cast: `llama` rounds the normalized rows to the dtype of x before the weight multiplies them, and the result
            has the wider dtype of x and weight; `gemma` rounds once, at the end, to the dtype of x.
        gate: (..., H); silu(gate) multiplies the result, which then has the dtype of x.
        residual: (..., H) in the dtype of x; the sum x + residual, rounded to that dtype, is what is normalized.

    Returns:
        The result (..., H); with a residual a pair of it and the sum.

    Raises:
        ValueError: shapes, dtypes, devices or eps do not fit.
    """
    _check(x, weight, eps, cast, gate, residual)
    y, total, _ = _op(x, weight, gate, residual, eps, offset, cast == "gemma")
    return y if residual is None else (y, total)


def _check(
    x: Tensor, weight: Tensor | None, eps: float, cast: str, gate: Tensor | None, residual: Tensor | None
) -> None:
    if x.ndim == 0 or not 1 <= x.shape[-1] <= LARGEST:
        raise ValueError(f"x {tuple(x.shape)}: the last dimension must have 1 to {LARGEST} numbers.")
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)}: the weight must be ({x.shape[-1]},).")
    for name, other in (("gate", gate), ("residual", residual)):
        if other is not None and other.shape != x.shape:
            raise ValueError(f"x {tuple(x.shape)} and {name} {tuple(other.shape)} do not fit: give them one shape.")
    if residual is not None and residual.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype} and residual {residual.dtype}: convert one, e.g. residual.to(x.dtype).")
    for name, tensor in (("x", x), ("weight", weight), ("gate", gate)):
        if tensor is not None and tensor.dtype not in DTYPES:
            raise ValueError(
                f"{name} is {tensor.dtype}: the kernels compute bf16, fp16 and fp32. Use {name}.float(), or "
                "pegbox_kernels.rms_norm.reference for fp64."
            )
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"x lies on {x.device} and {name} on {tensor.device}. Move one of them.")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}: it is added to a mean of squares and must be at least 0.")
    if cast not in ("llama", "gemma"):
        raise ValueError(f"cast is {cast!r}: write 'llama' (round, then multiply) or 'gemma' (multiply, then round).")


if importlib.util.find_spec("triton") is not None:
    from pegbox_kernels.rms_norm import triton as kernels
else:
    kernels = None  # type: ignore[assignment]


def _dtype_of_result(x: Tensor, weight: Tensor | None, gate: Tensor | None, gemma: bool) -> torch.dtype:
    if gemma or gate is not None or weight is None:
        return x.dtype
    return torch.promote_types(x.dtype, weight.dtype)


def _forward(x, weight, gate, residual, eps, offset, gemma):  # type: ignore[no-untyped-def]
    """The result, the sum (no elements without a residual), and the reciprocal roots, which the backward needs."""
    dtype = _dtype_of_result(x, weight, gate, gemma)
    if runs_kernels(x):
        return kernels.forward(x, weight, gate, residual, eps, offset, gemma, dtype)
    cast = "gemma" if gemma else "llama"
    y, total = reference.rms_norm(x, weight, eps, offset, cast, gate, residual)
    rstd = reference.reciprocal_root(x if total is None else total, eps)
    return y.to(dtype).contiguous(), x.new_empty(0) if total is None else total.contiguous(), rstd.contiguous()


def _fake_forward(x, weight, gate, residual, eps, offset, gemma):  # type: ignore[no-untyped-def]
    y = torch.empty(x.shape, dtype=_dtype_of_result(x, weight, gate, gemma), device=x.device)
    total = torch.empty(x.shape if residual is not None else 0, dtype=x.dtype, device=x.device)
    return y, total, torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, gate, residual, _, ctx.offset, ctx.gemma = inputs
    y, total, rstd = output
    ctx.summed, ctx.dtype = residual is not None, y.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*((rstd,) if ctx.summed else (rstd, total)))
    ctx.save_for_backward(total if ctx.summed else x, weight, gate, rstd)


def _differentiate(ctx, grad_y, grad_total, _):  # type: ignore[no-untyped-def]
    h, weight, gate, rstd = ctx.saved_tensors
    if grad_y is None:
        grad_y = h.new_zeros(h.shape, dtype=ctx.dtype)
    trained = weight is not None and ctx.needs_input_grad[1]
    grad_h, grad_weight, grad_gate = _backward_op(
        grad_y, grad_total if ctx.summed else None, h, weight, gate, rstd, ctx.offset, ctx.gemma, trained
    )
    return (
        grad_h,
        grad_weight if trained else None,
        None if gate is None else grad_gate,
        grad_h if ctx.summed else None,
        None,
        None,
        None,
    )


_op = differentiable(
    "rms_norm",
    _forward,
    _fake_forward,
    schema="(Tensor x, Tensor? weight, Tensor? gate, Tensor? residual, float eps, float offset, bool gemma) "
    "-> (Tensor, Tensor, Tensor)",
    save=_save,
    differentiate=_differentiate,
)


def _backward(grad_y, grad_total, h, weight, gate, rstd, offset, gemma, trained):  # type: ignore[no-untyped-def]
    """Gradients of x (and residual), of the weight and of the gate; no elements where there is none."""
    if runs_kernels(h):
        return kernels.backward(grad_y, grad_total, h, weight, gate, rstd, offset, gemma, trained)
    cast = "gemma" if gemma else "llama"
    found = reference.rms_norm_backward(grad_y, grad_total, h, weight, gate, rstd, offset, cast)
    grad_h, grad_weight, grad_gate = (h.new_empty(0) if part is None else part.contiguous() for part in found)
    return grad_h, grad_weight if trained else h.new_empty(0, dtype=torch.float32), grad_gate


def _fake_backward(grad_y, grad_total, h, weight, gate, rstd, offset, gemma, trained):  # type: ignore[no-untyped-def]
    weight_like = weight if trained else torch.empty(0, dtype=torch.float32, device=h.device)
    gate_like = gate if gate is not None else torch.empty(0, dtype=h.dtype, device=h.device)
    like = (h, weight_like, gate_like)
    return tuple(torch.empty(one.shape, dtype=one.dtype, device=h.device) for one in like)


_backward_op = operator(
    "rms_norm_backward",
    _backward,
    _fake_backward,
    schema="(Tensor grad_y, Tensor? grad_total, Tensor h, Tensor? weight, Tensor? gate, Tensor rstd, float offset, "
    "bool gemma, bool trained) -> (Tensor, Tensor, Tensor)",
)
