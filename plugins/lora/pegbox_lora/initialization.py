"""Beginning with the strongest directions of the weight itself: PiSSA (arXiv:2404.02948) and OLoRA (arXiv:2406.01775).

PEFT takes the factors A0, B0 out of the base: W = R + s B0 A0, and trains R + s B A from there. Here that is done after
the adapter got its data type, so that the factors of a half-precision base stay in float32. The trained adapter alone
would not fit the published base W, so the export writes it as a plain adapter of twice the rank (PiSSA, appendix C):

    R + s B A = W + s B A - s B0 A0 = W + [s B | -s B0] [A ; A0]

The first factors are kept with each checkpoint, because another machine may find others: the sign of a singular vector
is free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pegbox.errors import RunError, UserError

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from pegbox.context import Context
    from pegbox.types import Model
    from torch import Tensor
    from torch.nn import Module

ADAPTER = "default"
STATE = "lora/first_factors"
CLOSE = 1e-3
"""How far the product of first factors may be from that of a checkpoint, relative to its norm."""


class FirstFactors:
    """A0 and B0 of each adapted layer, on the CPU (`pegbox.record.Stateful`)."""

    def __init__(self, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
        self._factors = factors

    def __getitem__(self, layer: str) -> tuple[Tensor, Tensor]:
        return self._factors[layer]

    def state_dict(self) -> dict[str, object]:
        return {name: list(pair) for name, pair in self._factors.items()}

    def load_state_dict(self, state_dict: dict[str, list[Tensor]]) -> None:
        """Take over the factors of a checkpoint.

        Raises:
            RunError: what they took out of the base is not what was taken out of it now.
        """
        for name, (then_A, then_B) in state_dict.items():
            # A process without weights gets them from another one, and found no factors itself.
            now_A, now_B = self._factors.get(name, (then_A, then_B))
            then = then_B @ then_A
            if (now_B @ now_A - then).norm() > CLOSE * then.norm():
                raise RunError(
                    f"the adapter of {name} began with other factors than in the checkpoint",
                    "What is left of the base would be another one.",
                    "Resume with the same base model, dtype and lora.init.",
                )
            self._factors[name] = (then_A, then_B)


def take_from_base(ctx: Context, init: str, model: Model) -> None:
    """Give each adapted layer its first factors, taken out of the base weight.

    Raises:
        UserError: a base weight is quantized, or smaller than the rank.
    """
    factors = {}
    weightless = next(model.module.parameters()).device.type == "meta"
    for name, layer in () if weightless else lora_layers(model.module):
        _require_room(init, name, layer)
        if init == "olora":
            layer.olora_init(ADAPTER)
        else:
            layer.pissa_init(ADAPTER, init)
        pair = (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
        factors[name] = (pair[0].detach().float().cpu().clone(), pair[1].detach().float().cpu().clone())
    ctx.register_state(STATE, FirstFactors(factors))


def lora_layers(module: Module) -> list[tuple[str, LoraLayer]]:
    """Adapted layers, and stacked parameters, with their names."""
    from peft.tuners.lora import LoraLayer

    return [(name, part) for name, part in module.named_modules() if isinstance(part, LoraLayer)]


def _require_room(init: str, name: str, layer: LoraLayer) -> None:
    weight = layer.get_base_layer().weight
    if not weight.is_floating_point() or ADAPTER not in layer.lora_A:
        raise UserError(
            f"lora.init is '{init}', but {name} is {'quantized' if ADAPTER in layer.lora_A else 'an embedding'}",
            "The factors are taken out of a linear layer's own weight in floating point.",
            "Set lora.init to default, or take it out of lora.targets.",
        )
    if init == "olora" and getattr(layer, "fan_in_fan_out", False):
        raise UserError(
            f"lora.init is 'olora', but {name} keeps its weight transposed",
            "PEFT takes the factors of the wrong sides there.",
            "Set lora.init to pissa or default.",
        )
    if layer.r[ADAPTER] > min(weight.shape):
        raise UserError(
            f"lora.init is '{init}' with rank {layer.r[ADAPTER]}, but {name} is {' x '.join(map(str, weight.shape))}",
            "A matrix has no more directions than its shorter side.",
            "Lower lora.r, or give this module a lower rank in lora.rank_pattern.",
        )
