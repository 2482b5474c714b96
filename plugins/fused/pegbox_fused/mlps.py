"""The change at the seam of experts."""

from __future__ import annotations

from pegbox.types import SeamChange
from pegbox_kernels.recognition.mlps import SEAM, GluRule
from torch import Tensor, nn


def seam_of(experts: nn.Module, rule: GluRule) -> SeamChange:
    """The change of one experts module, which counts its calls."""
    calls = [0]

    def apply_gate(gate_up: Tensor) -> Tensor:
        calls[0] += 1
        return rule(gate_up)

    return SeamChange(
        seam=f"transformers' {SEAM}", holder=experts, attribute=SEAM, value=apply_gate, calls=lambda: calls[0]
    )
