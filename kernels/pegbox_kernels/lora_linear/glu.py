"""h = act(g) u with the rank products of g and u inside, and its gradient, as two operators of `torch.library`.

CUDA tensors (and CPU tensors under Triton's interpreter) take the kernels of `triton.py`, all others, and fp64, the
plain PyTorch of `reference.py`. The operators know no autograd: `mlp.py` calls them inside a gradient by hand; being
operators, they stay whole in the graphs of torch.compile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pegbox_kernels import dispatch
from pegbox_kernels.lora_linear import reference
from pegbox_kernels.lora_linear.reference import GluGradients
from pegbox_kernels.operators import operator

_INPUTS = "Tensor gate, Tensor up, Tensor p, Tensor b_gate, Tensor b_up"
_NUMBERS = "float scale_gate, float scale_up, str activation"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _runs_kernels(tensor: Tensor) -> bool:
    return tensor.dtype in DTYPES and dispatch.runs_kernels(tensor)


def _glu(gate, up, p, b_gate, b_up, a_down, scale_gate, scale_up, activation):  # type: ignore[no-untyped-def]
    if _runs_kernels(gate):
        from pegbox_kernels.lora_linear import triton as kernels

        return kernels.forward(gate, up, p, b_gate, b_up, a_down, scale_gate, scale_up, activation)
    h = reference.glu(gate, up, p, b_gate, b_up, scale_gate, scale_up, activation)
    return h, h @ a_down.T


def _fake_glu(gate, up, p, b_gate, b_up, a_down, *_):  # type: ignore[no-untyped-def]
    def made(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=gate.dtype, device=gate.device)

    return made(*gate.shape), made(gate.shape[0], a_down.shape[0])


glu = operator("lora_glu", _glu, _fake_glu, schema=f"({_INPUTS}, Tensor a_down, {_NUMBERS}) -> (Tensor, Tensor)")
"""h (T, I), which is `reference.glu`, and h A_down^T (T, r_down)."""


def _gradients(  # type: ignore[no-untyped-def]
    dh, gate, up, p, b_gate, b_up, dp_down, a_down, scale_gate, scale_up, activation, with_h
):
    arguments = (dh, gate, up, p, b_gate, b_up, dp_down, a_down, scale_gate, scale_up, activation)
    if _runs_kernels(gate):
        from pegbox_kernels.lora_linear import triton as kernels

        return kernels.backward(*arguments, with_h)
    found = reference.glu_backward(*arguments)
    dh.copy_(found.gate)
    h = found.h if with_h else found.h.new_empty(0)
    return found.up, h, found.p, found.b_gate.contiguous(), found.b_up.contiguous(), found.a_down.contiguous()


def _fake_gradients(dh, gate, up, p, b_gate, b_up, dp_down, a_down, scale_gate, scale_up, activation, with_h):  # type: ignore[no-untyped-def]
    wide = torch.float64 if gate.dtype == torch.float64 else torch.float32

    def made(like: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty(like.shape, dtype=dtype, device=like.device)

    h = made(gate, gate.dtype) if with_h else torch.empty(0, dtype=gate.dtype, device=gate.device)
    return made(gate, gate.dtype), h, made(p, p.dtype), made(b_gate, wide), made(b_up, wide), made(a_down, wide)


_backward = operator(
    "lora_glu_backward_",
    _gradients,
    _fake_gradients,
    schema=f"(Tensor(a!) dh, {_INPUTS}, Tensor dp_down, Tensor a_down, {_NUMBERS}, bool with_h) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    mutates=("dh",),
)


def glu_backward(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    p: Tensor,
    b_gate: Tensor,
    b_up: Tensor,
    dp_down: Tensor,
    a_down: Tensor,
    scale_gate: float,
    scale_up: float,
    activation: str,
    with_h: bool,
) -> GluGradients:
    """`reference.glu_backward`; the gradient of gate takes the memory of dh. h has no elements unless `with_h`."""
    rest = _backward(
        dh, gate, up, p, b_gate, b_up, dp_down, a_down, scale_gate, scale_up, activation, with_h
    )  # fmt: skip
    return GluGradients(dh, *rest)
