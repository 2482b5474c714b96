"""What the operation computes, in plain PyTorch.

For projections i that share an input x, each with a frozen weight W_i and a low-rank update (Hu et al. 2021,
arXiv:2106.09685, equation 3):

    y_i = x W_i^T + bias_i + s_i (x A_i^T) B_i^T

and for a gated MLP (Shazeer 2020, arXiv:2002.05202) whose three projections are of that kind:

    y = down(h)    h = act(g) u    g = gate(x)    u = up(x)

The part between the projections, with the rank products g += s P_g B_g^T and u += s P_u B_u^T inside it, is `glu`;
its gradient by hand is `glu_backward`. With c = act(g):

    du = dh c    dg = dh u act'(g)    and for each of the two    dP = s dg B    dB = s dg^T P

where dh itself is given as its dense part and a rank product: dh = dh_base + dP_d A_d, and dA_d = dP_d^T h.

Shapes: T tokens, K and N inputs and outputs of a projection, I width of the MLP, r rank. fp64 stays fp64; sums and
activations of everything else run in fp32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


def lora_linear(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """(..., K) -> (..., N) in the dtype of x, differentiable as often as torch allows."""
    update = (x @ a.to(x.dtype).T) @ b.to(x.dtype).T
    y = x @ weight.to(x.dtype).T + scale * update
    return y if bias is None else y + bias.to(x.dtype)


def activate(gate: Tensor, activation: str) -> Tensor:
    """act(g) by torch."""
    if activation == "silu":
        return torch.nn.functional.silu(gate)
    return torch.nn.functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def slope(gate: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """act(g) and act'(g), written out."""
    if activation == "silu":
        s = torch.sigmoid(gate)
        return gate * s, s * (1 + gate * (1 - s))
    if activation == "gelu":
        cdf = 0.5 * (1 + torch.erf(gate * math.sqrt(0.5)))
        return gate * cdf, cdf + gate * torch.exp(-0.5 * gate * gate) / math.sqrt(2 * math.pi)
    k = math.sqrt(2 / math.pi)
    t = torch.tanh(k * (gate + 0.044715 * gate**3))
    return 0.5 * gate * (1 + t), 0.5 * (1 + t) + 0.5 * gate * (1 - t * t) * k * (1 + 3 * 0.044715 * gate * gate)


class GluGradients(NamedTuple):
    """What the backward of `glu` gives: (T, I) twice, h, (T, r_gate + r_up), (I, r_gate), (I, r_up), (r_down, I)."""

    gate: Tensor
    up: Tensor
    h: Tensor
    p: Tensor
    b_gate: Tensor
    b_up: Tensor
    a_down: Tensor


def glu(
    gate: Tensor,
    up: Tensor,
    p: Tensor,
    b_gate: Tensor,
    b_up: Tensor,
    scale_gate: float,
    scale_up: float,
    activation: str,
) -> Tensor:
    """act(gate + s P_g B_g^T) (up + s P_u B_u^T), (T, I); p (T, r_gate + r_up) holds both rank products."""
    g, u = _complete(gate, up, p, b_gate, b_up, scale_gate, scale_up)
    return (activate(g, activation) * u).to(gate.dtype)


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
) -> GluGradients:
    """The gradients above; dP in the dtype of the inputs, dB and dA in fp32."""
    dtype, wide = gate.dtype, _wide(gate)
    g, u = _complete(gate, up, p, b_gate, b_up, scale_gate, scale_up)
    c, c_slope = slope(g, activation)
    dh = dh.to(wide) + dp_down.to(wide) @ a_down.to(wide)
    dgate, dup, h = (value.to(dtype) for value in (dh * u * c_slope, dh * c, c * u))
    rank = b_gate.shape[1]
    dp_gate, db_gate = _rank_gradients(dgate, p[:, :rank], b_gate, scale_gate)
    dp_up, db_up = _rank_gradients(dup, p[:, rank:], b_up, scale_up)
    da_down = dp_down.to(wide).T @ h.to(wide)
    return GluGradients(dgate, dup, h, torch.cat((dp_gate, dp_up), 1).to(dtype), db_gate, db_up, da_down)


def _complete(
    gate: Tensor, up: Tensor, p: Tensor, b_gate: Tensor, b_up: Tensor, scale_gate: float, scale_up: float
) -> tuple[Tensor, Tensor]:
    wide, rank = _wide(gate), b_gate.shape[1]
    g = gate.to(wide) + scale_gate * (p[:, :rank].to(wide) @ b_gate.to(wide).T)
    u = up.to(wide) + scale_up * (p[:, rank:].to(wide) @ b_up.to(wide).T)
    return g, u


def _rank_gradients(dy: Tensor, p: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    wide = _wide(dy)
    return scale * (dy.to(wide) @ b.to(wide)), scale * (dy.to(wide).T @ p.to(wide))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
