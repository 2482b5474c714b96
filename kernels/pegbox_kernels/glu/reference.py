"""What the operation computes, in plain PyTorch: the gated linear unit between the projections of a network's MLP.

    y = act(gate) up                                                       (Shazeer 2020, arXiv:2002.05202, eq. 5 and 6)

    silu        g sigmoid(g)
    gelu        g Phi(g), Phi the normal distribution
    gelu_tanh   g sigmoid(2 c (g + 0.044715 g^3)), c = sqrt(2 / pi); as usual with (1 + tanh z) / 2 = sigmoid(2z)
    clamped     gpt-oss: g' sigmoid(alpha g') (u' + 1), with g' = min(g, limit) and u' = u between -limit and limit

so that dgate = dy up act'(gate) and dup = dy act(gate); where something was clamped, its gradient is zero.

fp64 is computed in fp64, all else in fp32.
"""

from __future__ import annotations

from math import pi, sqrt

import torch
from torch import Tensor, nn


def glu(gate: Tensor, up: Tensor, activation: str = "silu", alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """(...) gate and (...) up -> (...) in their dtype."""
    g, u = _wide(gate), _wide(up)
    if activation == "clamped":
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
        return (g * torch.sigmoid(alpha * g) * (u + 1)).to(gate.dtype)
    if activation == "silu":
        return (nn.functional.silu(g) * u).to(gate.dtype)
    return (nn.functional.gelu(g, approximate="tanh" if activation == "gelu_tanh" else "none") * u).to(gate.dtype)


def glu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, activation: str, alpha: float, limit: float
) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up by the formulas above."""
    d, g, u = _wide(grad), _wide(gate), _wide(up)
    if activation == "clamped":
        inside_g, inside_u = g <= limit, (u >= -limit) & (u <= limit)
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
        s = torch.sigmoid(alpha * g)
        grad_gate = torch.where(inside_g | g.isnan(), d * (u + 1) * s * (1 + alpha * g * (1 - s)), 0.0)
        grad_up = torch.where(inside_u | u.isnan(), d * g * s, 0.0)
    else:
        act, slope = _activated(g, activation)
        grad_gate, grad_up = d * u * slope, d * act
    return grad_gate.to(gate.dtype), grad_up.to(up.dtype)


def _activated(g: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The activation and its slope."""
    if activation == "silu":
        s = torch.sigmoid(g)
        return g * s, s * (1 + g * (1 - s))
    if activation == "gelu_tanh":
        s = torch.sigmoid(2 * sqrt(2 / pi) * (g + 0.044715 * g**3))
        return g * s, s + g * s * (1 - s) * 2 * sqrt(2 / pi) * (1 + 3 * 0.044715 * g.square())
    phi = 0.5 * (1 + torch.erf(g * sqrt(0.5)))
    return g * phi, phi + g * torch.exp(-0.5 * g.square()) / sqrt(2 * pi)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
