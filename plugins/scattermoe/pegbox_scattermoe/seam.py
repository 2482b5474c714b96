"""Our way of computing experts at transformers' seam for it: the ExpertsInterface.

A class of experts asks its config for the name of an implementation and the interface for the function of that name.
The record gives one module a copy of its config that says our name and carries what the function has to know about this
module; the model's own config, and other models, stay as they are. Weights are read at each call, so placement and
adapters may replace them, and so may a base that keeps them packed: such a weight has an attribute `packed`.

Adapters come as keywords: transformers hands on what an experts module is called with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from pegbox.errors import ConfigError, PluginError
from pegbox.types import ModulePatch, SeamChange

from pegbox_scattermoe.activation import Activation, activation_of

if TYPE_CHECKING:
    from pegbox.types import Model
    from pegbox_kernels.experts import ExpertLora
    from pegbox_kernels.mxfp4 import PackedMxfp4
    from torch import Tensor
    from torch.nn import Module

    from pegbox_scattermoe.config import ScattermoeConfig

IMPLEMENTATION = "pegbox_scattermoe"
SEAM = "transformers.integrations.moe.ExpertsInterface"
SOURCE = "arXiv:2403.08245"
FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate", "num_experts", "config")
"""What `transformers.integrations.moe.use_experts_implementation` gives, or asks of, a class of experts."""
PARTS = ("gate_up_proj", "down_proj")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Layer:
    """How one module of experts is computed; `called` becomes true with its first call."""

    settings: ScattermoeConfig
    activation: Activation
    called: bool = False

    def __deepcopy__(self, memo: object) -> Layer:
        """Itself: a copy of a module (PEFT makes one of a module that is trained whole) is called in its place."""
        return self

    def __call__(
        self,
        module: Any,
        hidden_TH: Tensor,
        experts_TK: Tensor,
        weights_TK: Tensor,
        lora_gate_up: ExpertLora | None,
        lora_down: ExpertLora | None,
    ) -> Tensor:
        from pegbox_kernels.experts import moe_experts

        self.called = True
        kind = hidden_TH.device.type
        dtype = compute_dtype(kind, module.gate_up_proj)
        # Everything is cast within autograd, so that autocast has nothing to add inside of the operation.
        with torch.autocast(kind, enabled=False):
            out_TH = moe_experts(
                hidden_TH.to(dtype),
                experts_TK,
                weights_TK,
                weight_of(module, "gate_up_proj", dtype),
                weight_of(module, "down_proj", dtype),
                gate_up_bias_EJ=module.gate_up_proj_bias.to(dtype) if module.has_bias else None,
                down_bias_EH=module.down_proj_bias.to(dtype) if module.has_bias else None,
                activation=self.activation.name,
                interleaved=self.activation.interleaved,
                transposed=module.is_transposed,
                alpha=self.activation.alpha,
                limit=self.activation.limit,
                lora_gate_up=lora_gate_up,
                lora_down=lora_down,
                base=self.settings.base,
                save=self.settings.save,
            )
        return out_TH.to(hidden_TH.dtype)


def compute_dtype(device_type: str, weight: Tensor) -> torch.dtype:
    """The data type of products: autocast's if it is on, else that of the weights."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype


def weight_of(module: Any, part: str, dtype: torch.dtype) -> Tensor | PackedMxfp4:
    """A stacked weight as the operation takes it: packed if its owner keeps it so, else in `dtype`."""
    weight = getattr(module, part)
    packed = getattr(weight, "packed", None)
    return cast("Tensor", weight).to(dtype) if packed is None else packed


def experts_forward(
    module: Any,
    hidden_TH: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    *,
    lora_gate_up: ExpertLora | None = None,
    lora_down: ExpertLora | None = None,
) -> Tensor:
    """The function that the interface has under our name."""
    return cast("Layer", module.config.scattermoe)(module, hidden_TH, experts_TK, weights_TK, lora_gate_up, lora_down)


def is_experts(module: Module) -> bool:
    """Whether a module is one that transformers' ExpertsInterface serves."""
    return all(hasattr(module, flag) for flag in FLAGS)


def layer_of(module: Module) -> Layer | None:
    """How this plugin computes a module of experts, if it does."""
    found: Layer | None = getattr(getattr(module, "config", None), "scattermoe", None)
    return found


def require_device(settings: ScattermoeConfig, device: torch.device | None) -> None:
    """Refuse a choice of kernel where none runs; without a device (a plan) nothing is known yet.

    Raises:
        ConfigError: naming the setting.
    """
    if device is not None and device.type == "cpu" and settings.base != "auto":
        raise ConfigError(
            f"scattermoe.base is {settings.base}, and the run is on a CPU",
            "There the operation computes one expert after the other in plain torch, whatever the setting.",
            "Remove scattermoe.base.",
        )


def patches(settings: ScattermoeConfig, model: Model) -> list[ModulePatch]:
    """The record for the experts of a model.

    Raises:
        PluginError: it has none, or such as the operation cannot compute.
    """
    layers: dict[Module, Layer] = {}
    for name, module in model.module.named_modules():
        if is_experts(module):
            activation = activation_of(module, name)
            _require_weights(module, name)
            layers[module] = Layer(settings, activation)
    if not layers:
        raise PluginError(
            f"scattermoe is in plugins, and {model.name} has no experts that it could compute",
            "It looks for stacked experts behind transformers' ExpertsInterface.",
            "Remove scattermoe from plugins.",
        )
    return [
        ModulePatch(
            slot="experts",
            target=lambda _, module: module in layers,
            replace=lambda module: _change(module, layers[module]),
            reason=f"{len(layers)} modules of experts: rows sorted once, bias and activation beside the product",
            source=SOURCE,
        )
    ]


def _change(module: Any, layer: Layer) -> SeamChange:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, cast("Callable[..., Any]", experts_forward))
    config = copy.copy(module.config)
    config._experts_implementation_internal = IMPLEMENTATION
    config.scattermoe = layer
    return SeamChange(seam=SEAM, holder=module, attribute="config", value=config, calls=lambda: int(layer.called))


def _require_weights(module: Any, name: str) -> None:
    """Raise unless both weights are stacked in three dimensions, in floating point or packed."""
    for part in PARTS:
        weight = getattr(module, part, None)
        if weight is None or weight.ndim != 3 or weight.dtype not in FLOATS:
            seen = "missing" if weight is None else f"{weight.ndim}-dimensional in {str(weight.dtype)[6:]}"
            raise PluginError(
                f"{name}.{part} of the class {type(module).__name__} is {seen}",
                "scattermoe computes experts stacked in three dimensions, in floating point or MXFP4.",
                "Remove scattermoe, or the plugin that quantizes.",
            )
