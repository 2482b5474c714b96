"""Which activation the experts of a model have, found by trying it: the class's own gate on a few numbers.

transformers asks each class of experts for `_apply_gate(gate_up)`. It is compared, in double precision and with values
beyond every limit in use, with the activations that the operation knows; names and configs are not trusted. What agrees
with none of them is refused: it would train another model than the one that was asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from pegbox.errors import PluginError
from torch.nn.functional import silu

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

ROWS, COLUMNS, SPREAD = 7, 16, 12.0
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Activation:
    """An activation of the operation.

    Attributes:
        name: `swiglu`, or `gpt_oss`: clamped, with its own sigmoid factor `alpha`, and one added to the second half.
        interleaved: gate and up are every other column; else the two halves.
        alpha, limit: of `gpt_oss`.
    """

    name: Literal["swiglu", "gpt_oss"]
    interleaved: bool
    alpha: float = 1.702
    limit: float = 7.0

    def __call__(self, gate_up: Tensor) -> Tensor:
        """(..., 2 I) -> (..., I), for comparison only."""
        gate, up = (gate_up[..., ::2], gate_up[..., 1::2]) if self.interleaved else gate_up.chunk(2, dim=-1)
        if self.name == "swiglu":
            return silu(gate) * up
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(self.alpha * gate)


def activation_of(module: Module, name: str) -> Activation:
    """The activation of a module of experts.

    Args:
        module: it has `_apply_gate`, as all classes behind transformers' ExpertsInterface do.
        name: its full name, for the message.

    Raises:
        PluginError: it is none of those that the operation computes.
    """
    trial = torch.linspace(-SPREAD, SPREAD, ROWS * COLUMNS, dtype=torch.float64, device="cpu")
    trial = trial[torch.randperm(len(trial), generator=torch.Generator().manual_seed(0))].reshape(ROWS, COLUMNS)
    own: Any = module
    if getattr(own, "has_gate", True):
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            expected = own._apply_gate(trial)
        for candidate in _candidates(own):
            found = candidate(trial)
            if expected.shape == found.shape and torch.allclose(expected.double(), found, TOLERANCE, TOLERANCE):
                return candidate
    raise PluginError(
        f"the experts {name} are of the class {type(module).__name__}, whose activation the plugin scattermoe lacks",
        "It computes silu(gate) * up, and the clamped one of gpt-oss; this class has another or no gate.",
        "Remove scattermoe from plugins.",
    )


def _candidates(module: Any) -> list[Activation]:
    found = [Activation("swiglu", interleaved) for interleaved in (False, True)]
    alpha, limit = getattr(module, "alpha", None), getattr(module, "limit", None)
    if isinstance(alpha, int | float) and isinstance(limit, int | float):
        found += [Activation("gpt_oss", interleaved, float(alpha), float(limit)) for interleaved in (False, True)]
    return found
