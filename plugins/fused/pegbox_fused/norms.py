"""The module that takes the place of a norm."""

from __future__ import annotations

from pegbox_kernels.recognition.norms import NormRule
from torch import Tensor, nn


class FusedRMSNorm(nn.Module):
    """A norm in one pass; the weight is that of the norm whose place it takes."""

    def __init__(self, weight: nn.Parameter | None, rule: NormRule) -> None:
        super().__init__()
        self.weight = weight
        self.rule = rule

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        return self.rule(hidden_states, self.weight, gate)

    def extra_repr(self) -> str:
        shape = () if self.weight is None else tuple(self.weight.shape)
        return f"{shape}, eps={self.rule.eps}, {self.rule}"
