"""The library's functions as what they take the place of: a norm, a product of an MLP, a function for heads.

The library can patch models by itself, by assigning to transformers' classes and functions: every model of the process
would change. Here its modules and autograd functions are put into the instances of one model. Its norms may write the
gradient of their input over that of their result; where a residual needs the latter, that is wrong, so they do not.
"""

from __future__ import annotations

from collections.abc import Callable

from liger_kernel.ops import LigerGELUMulFunction, LigerLayerNormFunction, LigerSiLUMulFunction
from liger_kernel.transformers.rms_norm import LigerRMSNorm
from liger_kernel.transformers.rope import liger_rotary_pos_emb
from pegbox_kernels.recognition.norms import NormRule
from pegbox_kernels.recognition.rotary import RopeKind
from torch import Tensor, nn

PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": LigerSiLUMulFunction.apply,
    "gelu_tanh": LigerGELUMulFunction.apply,
}
"""The library's functions of gate and up, by activation."""
TURNS: dict[RopeKind, int] = {"halves": 1, "halves, a number for each pair": 2}
"""The ways to turn heads that the library has: numbers turned, as a multiple of the width of the tables."""


def rms_norm(weight: nn.Parameter, rule: NormRule) -> nn.Module:
    """The library's module with the norm's own weight."""
    made = LigerRMSNorm(weight.shape[0], rule.eps, rule.offset, rule.cast, in_place=False)
    made.weight = weight
    return made


class LigerLayerNorm(nn.Module):
    """The library's function with the parameters of the norm whose place it takes.

    Its own module always makes weights of its own, and chooses among kernels by device.
    """

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, input: Tensor) -> Tensor:
        normalized: Tensor = LigerLayerNormFunction.apply(input, self.weight, self.bias, self.eps)
        return normalized

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class LigerProduct:
    """The library's function between the projections of an MLP; one projection may make both."""

    def __init__(self, activation: str) -> None:
        self.activation = activation

    def __call__(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        if up is None:
            gate, up = gate.chunk(2, dim=-1)
        return PRODUCTS[self.activation](gate, up)

    def __str__(self) -> str:
        return f"liger, {self.activation}"


def turning(kind: RopeKind) -> Callable[..., tuple[Tensor, Tensor]]:
    """The library's function for heads, to be called like transformers' `apply_rotary_pos_emb`."""

    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: object = None, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        """(B, A, T, D), (B, K, T, D), tables (B or 1, T, W) -> q and k, turned, perhaps in their own memory."""
        turned = TURNS[kind] * cos.shape[-1]
        if unsqueeze_dim == 2:
            by_head = liger_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin, rotary_dim=turned)
            return by_head[0].transpose(1, 2), by_head[1].transpose(1, 2)
        found: tuple[Tensor, Tensor] = liger_rotary_pos_emb(q, k, cos, sin, rotary_dim=turned)
        return found

    return apply_rotary_pos_emb
