"""The gated linear unit between the projections of an MLP: SwiGLU, GeGLU, and the clamped one of gpt-oss.

    y = glu(gate, up)                                                # silu(gate) * up
    y = glu(gate, up, activation="gelu_tanh")                        # Gemma
    y = glu(gate_up)                                                 # one tensor, its first half is the gate
    y = glu(gate_up, layout="interleaved", activation="clamped")     # gpt-oss: gate and up are neighbours

Differentiable once; nothing but the inputs is kept for it. CUDA tensors (and CPU tensors under Triton's interpreter)
take the kernels of `triton.py`, all others the plain PyTorch of `reference.py`. Under torch.compile it is
`torch.ops.pegbox_kernels.glu`, which is kept whole.
"""

from __future__ import annotations

import importlib.util
from typing import Literal, get_args

import torch
from torch import Tensor

from pegbox_kernels.dispatch import runs_kernels
from pegbox_kernels.glu import reference
from pegbox_kernels.operators import differentiable, operator

__all__ = ["Activation", "Layout", "glu"]

Activation = Literal["silu", "gelu", "gelu_tanh", "clamped"]
Layout = Literal["halves", "interleaved"]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def glu(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    activation: Activation = "silu",
    layout: Layout = "halves",
    alpha: float = 1.702,
    limit: float = 7.0,
) -> Tensor:
    """act(gate) * up, computed in fp32 and rounded once.

    Args:
        gate: (..., I), fp32, bf16 or fp16; without `up`, (..., 2 I) with both.
        up: (..., I) in the dtype of the gate.
        activation: `silu`, `gelu` (exact), `gelu_tanh`, or `clamped`: with g = min(gate, limit) and u = up between
            -limit and limit, g * sigmoid(alpha * g) * (u + 1).
        layout: how one tensor holds both: the gate in the first half, or at even places.
        alpha, limit: of `clamped`.

    Returns:
        (..., I) in the dtype of the gate.

    Raises:
        ValueError: shapes, dtypes, devices or settings do not fit.
    """
    _check(gate, up, activation, layout, alpha, limit)
    found: Tensor = _op(gate, up, layout, activation, alpha, limit)
    return found


def _check(gate: Tensor, up: Tensor | None, activation: str, layout: str, alpha: float, limit: float) -> None:
    if activation not in get_args(Activation):
        raise ValueError(f"activation is {activation!r}: write one of {', '.join(get_args(Activation))}.")
    if layout not in get_args(Layout):
        raise ValueError(f"layout is {layout!r}: write one of {', '.join(get_args(Layout))}.")
    if gate.ndim == 0 or gate.shape[-1] == 0:
        raise ValueError(f"gate {tuple(gate.shape)} needs a last dimension.")
    if up is None and gate.shape[-1] % 2:
        raise ValueError(f"gate {tuple(gate.shape)} holds gate and up: its last dimension must be even.")
    if up is not None and layout != "halves":
        raise ValueError(f"layout is {layout!r}, but gate and up are two tensors. Pass one, or leave layout out.")
    if up is not None and up.shape != gate.shape:
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} do not fit: give them one shape.")
    if up is not None and (up.dtype, up.device) != (gate.dtype, gate.device):
        raise ValueError(f"gate is {gate.dtype} on {gate.device}, up {up.dtype} on {up.device}. Convert one of them.")
    if gate.dtype not in DTYPES:
        raise ValueError(
            f"gate is {gate.dtype}: the kernels compute bf16, fp16 and fp32. Use gate.float(), or "
            "pegbox_kernels.glu.reference for fp64."
        )
    if not (limit > 0 and alpha > 0):
        raise ValueError(f"alpha is {alpha} and limit {limit}: both must be above 0.")


if importlib.util.find_spec("triton") is not None:
    from pegbox_kernels.glu import triton as kernels
else:
    kernels = None  # type: ignore[assignment]


def parts(gate_up: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Gate and up of one tensor that holds both, as views."""
    half = gate_up.shape[-1] // 2
    if layout == "interleaved":
        return gate_up[..., ::2], gate_up[..., 1::2]
    return gate_up[..., :half], gate_up[..., half:]


def _forward(gate, up, layout, activation, alpha, limit):  # type: ignore[no-untyped-def]
    if runs_kernels(gate):
        return kernels.forward(gate, up, layout, activation, alpha, limit)
    gate, up = parts(gate, layout) if up is None else (gate, up)
    return reference.glu(gate, up, activation, alpha, limit).contiguous()


def _fake_forward(gate, up, *_):  # type: ignore[no-untyped-def]
    columns = gate.shape[-1] if up is not None else gate.shape[-1] // 2
    return torch.empty((*gate.shape[:-1], columns), dtype=gate.dtype, device=gate.device)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    gate, up, *ctx.kind = inputs
    ctx.save_for_backward(gate, up)


def _differentiate(ctx, grad):  # type: ignore[no-untyped-def]
    gate, up = ctx.saved_tensors
    grad_gate, grad_up = _backward_op(grad, gate, up, *ctx.kind)
    return grad_gate, None if up is None else grad_up, None, None, None, None


_op = differentiable(
    "glu",
    _forward,
    _fake_forward,
    schema="(Tensor gate, Tensor? up, str layout, str activation, float alpha, float limit) -> Tensor",
    save=_save,
    differentiate=_differentiate,
)


def _backward(grad, gate, up, layout, activation, alpha, limit):  # type: ignore[no-untyped-def]
    """Gradients of gate and up; of the tensor that holds both and no elements, if there is one."""
    if runs_kernels(gate):
        return kernels.backward(grad, gate, up, layout, activation, alpha, limit)
    if up is not None:
        found = reference.glu_backward(grad, gate, up, activation, alpha, limit)
        return found[0].contiguous(), found[1].contiguous()
    packed = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    found = reference.glu_backward(grad, *parts(gate, layout), activation, alpha, limit)
    for sink, part in zip(parts(packed, layout), found, strict=True):
        sink.copy_(part)
    return packed, gate.new_empty(0)


def _fake_backward(grad, gate, up, *_):  # type: ignore[no-untyped-def]
    shapes = (gate.shape, 0 if up is None else up.shape)
    return tuple(torch.empty(shape, dtype=gate.dtype, device=gate.device) for shape in shapes)


_backward_op = operator(
    "glu_backward",
    _backward,
    _fake_backward,
    schema="(Tensor grad, Tensor gate, Tensor? up, str layout, str activation, float alpha, float limit) "
    "-> (Tensor, Tensor)",
)
