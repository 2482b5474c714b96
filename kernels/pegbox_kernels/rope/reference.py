"""What the operation computes, in plain PyTorch: rotary position embeddings of queries and keys.

Each pair (a, b) of numbers of a head is turned by an angle that grows with the position (Su et al. 2021,
arXiv:2104.09864, eq. 34):

    a' = a cos_a - b sin_a        b' = b cos_b + a sin_b

Halves: pair i is (x_i, x_(i + R/2)), as in Llama; interleaved: (x_2i, x_(2i + 1)), as in the paper. Tables of width R
hold one number for each element, which need not be the same for both of a pair; tables of width R/2 one for each. They
may be scaled (YaRN, arXiv:2309.00071): so the gradient is the transposed map and not the inverse one,

    da = da' cos_a + db' sin_b    db = db' cos_b - da' sin_a

Elements of a head beyond R are passed on.

Shapes: B rows, T tokens, Hq and Hk heads, D numbers of a head, of which R are turned. fp64 is computed in fp64, all
else in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    heads_dim: int = 1,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    """(B, Hq, T, D), (B, Hk, T, D) and (B or 1, T, R or R/2) tables -> both turned, in their own dtypes."""
    rotary = q.shape[-1] if rotary_dim is None else rotary_dim
    tables = [table.unsqueeze(heads_dim) for table in (cos, sin)]
    turned = (_turned(x, *tables, rotary, interleaved, transposed) for x in (q, k))
    first, second = turned
    return first, second


def _turned(x: Tensor, cos: Tensor, sin: Tensor, rotary: int, interleaved: bool, transposed: bool) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    a, b = _pairs(wide[..., :rotary], interleaved)
    cos_a, cos_b = (cos, cos) if cos.shape[-1] < rotary else _pairs(cos, interleaved)
    sin_a, sin_b = (sin, sin) if sin.shape[-1] < rotary else _pairs(sin, interleaved)
    if transposed:
        sin_a, sin_b = -sin_b, -sin_a
    pair = (a * cos_a - b * sin_a, b * cos_b + a * sin_b)
    joined = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((joined, wide[..., rotary:]), -1).to(x.dtype)


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    half = x.shape[-1] // 2
    return (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
