"""PEFT's LoRA layers, read anew at each call: what their state says now is what is computed.

A layer whose adapter is switched off or merged, or that has several active ones, is PEFT's own to compute: `read` then
gives None. What can be known at the start (a kind of layer or of adapter that has no kernel) is refused there, by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from pegbox.errors import RunError
from pegbox_kernels.lora_linear import Projection
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.nn import Module

FOUR_BITS, EIGHT_BITS = "Linear4bit", "Linear8bitLt"


def is_adapted(module: Module) -> bool:
    """Whether this is a linear layer with LoRA, of any kind: embeddings, convolutions and experts are not."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import Embedding, MultiheadAttention, ParamWrapper, _ConvNd

    return isinstance(module, LoraLayer) and not isinstance(
        module, Embedding | MultiheadAttention | ParamWrapper | _ConvNd
    )


def objection(module: Module) -> str | None:
    """Why this adapted layer cannot be computed here; None if it can."""
    from peft.tuners.lora.layer import Linear

    layer: Any = module
    base = layer.get_base_layer()
    if type(layer) is not Linear and not is_4bit(layer):
        return f"it is PEFT's {type(layer).__name__} on {type(base).__name__}, for which there is no kernel"
    if not is_4bit(layer) and not isinstance(base, nn.Linear) and not _is_conv1d(base):
        return f"its base is a {type(base).__name__}, for which there is no kernel"
    if base.weight.requires_grad:
        return "its base weight is trained, and the kernels compute no gradient for it"
    for name, variant in layer.lora_variant.items():
        if type(variant).__name__ != "DoraLinearVariant":
            return f"its adapter is a {type(variant).__name__}, for which there is no kernel"
        if not isinstance(layer.lora_dropout[name], nn.Identity):
            return "its adapter is DoRA with dropout, which there is no kernel for"
    return _hooked(layer)


def _hooked(layer: Module) -> str | None:
    """Hooks and replaced forwards inside a layer would not be called any more."""
    for name, part in layer.named_modules():
        if name and (part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part)):
            return f"its part {name} has a hook or a forward of its own, which would not be called any more"
    return None


def is_4bit(layer: Any) -> bool:
    """Whether this is PEFT's layer on a base that bitsandbytes holds in 4 bits."""
    kinds = (type(layer).__name__, type(layer.get_base_layer()).__name__)
    return kinds == (FOUR_BITS, FOUR_BITS) and type(layer).__module__.startswith("peft.")


def _is_conv1d(base: Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(base, Conv1D)


def read(module: Module) -> Projection | None:
    """What a layer computes now, adapted or plain; None: only the layer itself knows."""
    layer: Any = module
    if type(layer) is nn.Linear:
        return Projection(weight=layer.weight, bias=layer.bias)
    if not hasattr(layer, "lora_A") or layer.disable_adapters or layer.merged:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    base = layer.get_base_layer()
    if len(active) != 1 or (is_4bit(layer) and not _is_plain_packing(base)):
        return None
    name, bias = active[0], base.bias
    scale, up = layer.scaling[name], layer.lora_B[name]
    if up.bias is not None:
        bias = scale * up.bias if bias is None else bias + scale * up.bias
    dropout = layer.lora_dropout[name]
    magnitude = layer.lora_magnitude_vector[name].weight if name in layer.lora_variant else None
    return Projection(
        weight=_weight(layer, base),
        a=layer.lora_A[name].weight,
        b=up.weight,
        scale=scale,
        bias=bias,
        dropout=dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0,
        magnitude=magnitude,
    )


def _weight(layer: Module, base: Any) -> Tensor | Callable[[], Tensor]:
    """(N, K), or what makes it; Conv1D keeps it the other way round."""
    if is_4bit(layer):
        return _maker(base)
    weight: Tensor = base.weight
    return weight if isinstance(base, nn.Linear) else weight.T


def _is_plain_packing(base: Any) -> bool:
    """Evaluation on some CPUs packs 4-bit weights anew, which bitsandbytes alone reads."""
    return not getattr(base.weight.quant_state, "packing_format_for_cpu", False)


def _maker(base: Any) -> Callable[[], Tensor]:
    """What dequantizes a 4-bit weight, once forward and once backward."""
    from bitsandbytes.functional import dequantize_4bit

    def make() -> Tensor:
        weight: Tensor = dequantize_4bit(base.weight.data, base.weight.quant_state)
        return weight

    return make


def require_arithmetic(module: Module, x: Tensor) -> None:
    """Raise if a 4-bit base is to be multiplied in another dtype than the one in which everything else is.

    Raises:
        RunError: it is.
    """
    layer: Any = module
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    wanted = getattr(base, "compute_dtype", None) if type(base).__name__ == FOUR_BITS else None
    if wanted is None:
        return
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if wanted != dtype:
        raise RunError(
            f"4-bit weights are to be multiplied in {_short(wanted)}, and the run computes in {_short(dtype)}",
            "The kernels multiply base and update in one data type.",
            f"Set bnb.compute_dtype to {_short(dtype)}, or remove lora-kernels from plugins.",
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
