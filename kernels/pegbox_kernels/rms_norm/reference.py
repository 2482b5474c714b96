"""What the operation computes, in plain PyTorch: root-mean-square normalization of each row.

    h = x + residual (x alone without a residual)      r = 1 / sqrt(mean(h^2) + eps)      n = h r
    y = n (offset + w) silu(g)                         (no factor where there is no weight, no gate)

(Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4.) With y' = dy silu(g) and n' = y' (offset + w):

    dh = r (n' - n mean(n' n))      dw = sum over rows of y' n      dg = dy n (offset + w) silu'(g)

because dn_i / dh_j = r ([i = j] - n_i n_j / H). What is added to h by the gradient of the sum h itself comes on top.

Models round at different places, which in half precision is a difference of one part in 256. `cast="llama"` rounds n to
the dtype of x before the weight multiplies it, so that the result has the wider dtype of the two; `cast="gemma"`
multiplies in fp32 and rounds once, to the dtype of x. A gate multiplies in fp32, and the result has the dtype of x.

Shapes: `...` rows, H hidden size. fp64 rows are computed in fp64, all others in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float = 0.0,
    cast: str = "llama",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(..., H) rows and (H,) weight -> (..., H) normalized rows, and the sum h if there is a residual."""
    h = x if residual is None else x + residual
    wide = _wide(h)
    n = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if cast == "llama":
        n = n.to(x.dtype)
        z = n if weight is None else n * (weight + offset if offset else weight)
        y = z if gate is None else (z * torch.nn.functional.silu(_wide(gate))).to(x.dtype)
    else:
        z = n if weight is None else n * (_wide(weight) + offset)
        y = (z if gate is None else z * torch.nn.functional.silu(_wide(gate))).to(x.dtype)
    return y, None if residual is None else h


def reciprocal_root(h: Tensor, eps: float) -> Tensor:
    """r of each row, (...), fp32 (fp64 for fp64 rows)."""
    return torch.rsqrt(_wide(h).square().mean(-1) + eps)


def rms_norm_backward(
    grad_y: Tensor,
    grad_total: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    rstd: Tensor,
    offset: float,
    cast: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of h, weight and gate by the formulas above, in their dtypes."""
    n = _wide(h) * rstd.unsqueeze(-1)
    factor = 1.0 if weight is None else _wide(weight) + offset
    dz = _wide(grad_y)
    # What the weight multiplied is what its gradient sums.
    used = n.to(h.dtype).to(n.dtype) if cast == "llama" else n
    grad_gate = None
    if gate is not None:
        g = _wide(gate)
        s = torch.sigmoid(g)
        grad_gate = (dz * used * factor * s * (1 + g * (1 - s))).to(gate.dtype)
        dz = dz * g * s
    dn = dz * factor
    dh = rstd.unsqueeze(-1) * (dn - n * (dn * n).mean(-1, keepdim=True))
    if grad_total is not None:
        dh = dh + _wide(grad_total)
    grad_weight = None if weight is None else (dz * used).flatten(0, -2).sum(0).to(weight.dtype)
    return dh.to(h.dtype), grad_weight, grad_gate


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
