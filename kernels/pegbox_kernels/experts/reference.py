"""What the operation computes, in plain PyTorch: the experts of a mixture, with LoRA beside them.

For token t, its k-th expert e with router weight w, and LoRA factors A, B of scale s on either product:

    z = x_t W_gu[e] + b_gu[e] + s (x_t A_gu[e]^T) B_gu[e]^T
    h = silu(gate) up                                  or, with g = min(gate, limit) and u = clamp(up, -limit, limit),
    h = (u + 1) g sigmoid(alpha g)
    out_t = sum_k w (h W_d[e] + b_d[e] + s (h A_d[e]^T) B_d[e]^T)

where gate and up are the two halves of z, or every other column of it. SwiGLU: arXiv:2002.05202; gpt-oss's: its model
card, arXiv:2508.10925; LoRA: arXiv:2106.09685.

One expert at a time, over the rows that chose it. An index that is no expert (E and above, or negative) adds nothing.

Shapes: T tokens, K choices of each, E experts, H hidden, I intermediate, J = 2 I, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu


def activate(z_NJ: Tensor, activation: str, interleaved: bool, alpha: float, limit: float) -> Tensor:
    """(N, J) products of gate and up -> (N, I)."""
    gate, up = (z_NJ[..., ::2], z_NJ[..., 1::2]) if interleaved else z_NJ.chunk(2, dim=-1)
    if activation == "swiglu":
        return silu(gate) * up
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(alpha * gate))


def moe_experts(
    hidden_TH: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    gate_up_bias_EJ: Tensor | None = None,
    down_bias_EH: Tensor | None = None,
    activation: str = "swiglu",
    interleaved: bool = False,
    transposed: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
    lora_gate_up: tuple[Tensor, Tensor, float] | None = None,
    lora_down: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """(T, H); arguments as the operation's, a LoRA as (A (E, R, in), B (E, out, R), scale)."""
    gate_up_EHJ = gate_up if transposed else gate_up.transpose(1, 2)
    down_EIH = down if transposed else down.transpose(1, 2)
    out_TH = torch.zeros_like(hidden_TH)
    for expert in range(gate_up_EHJ.shape[0]):
        tokens, choices = torch.where(experts_TK == expert)
        z = _linear(hidden_TH[tokens], gate_up_EHJ, gate_up_bias_EJ, lora_gate_up, expert)
        h = activate(z, activation, interleaved, alpha, limit)
        y = _linear(h, down_EIH, down_bias_EH, lora_down, expert) * weights_TK[tokens, choices, None]
        out_TH = out_TH.index_add(0, tokens, y.to(out_TH.dtype))
    return out_TH


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora: tuple[Tensor, Tensor, float] | None, expert: int
) -> Tensor:
    y = x @ weight[expert]
    if bias is not None:
        y = y + bias[expert].to(y.dtype)
    if lora is not None:
        a, b, scale = lora
        y = y + scale * (x @ a[expert].to(x.dtype).t() @ b[expert].to(x.dtype).t())
    return y


def sort_by_expert(experts_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The stable order of the T K choices by expert: (order, inverse, offsets), as `Routing` describes them."""
    flat = experts_TK.flatten().long()
    flat = flat.masked_fill((flat < 0) | (flat >= experts), experts)
    order = flat.sort(stable=True).indices
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    counts = torch.bincount(flat, minlength=experts + 1)[:experts]
    inverse = inverse.masked_fill(flat == experts, -1)
    return order.int(), inverse.int(), counts.cumsum(0).int()
