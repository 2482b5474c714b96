"""The experts of a mixture with LoRA beside them: one call from hidden states and routing to the layer's output.

    weights, experts = route(logits, top_k=4, score="topk_softmax")
    out = moe_experts(hidden, experts, weights, gate_up, down, gate_up_bias_EJ=..., down_bias_EH=...,
                      activation="gpt_oss", interleaved=True, transposed=True, lora_gate_up=ExpertLora(a, b, 2.0))

Rows are sorted by expert once; products are torch's grouped_mm or our Triton kernel; gather, bias, activation, router
weights, LoRA and its gradients are fused between them. No delta weight and, for frozen experts, no weight gradient
is ever formed. Results are the same from run to run. `README.md` has the arithmetic.

Tensors on a CPU outside Triton's interpreter take the plain loop of `reference.py`.

Shapes: T tokens, K choices of each, E experts, H hidden, I intermediate, J = 2 I, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pegbox_kernels.dispatch import runs_kernels
from pegbox_kernels.experts import reference
from pegbox_kernels.experts.routing import Routing, route
from pegbox_kernels.mxfp4 import PackedMxfp4

__all__ = ["ExpertLora", "Routing", "moe_experts", "route"]

Activation = Literal["swiglu", "gpt_oss"]
Base = Literal["auto", "grouped_mm", "triton"]
Save = Literal["preactivation", "none"]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class ExpertLora:
    """LoRA on one product of every expert, in the canonical layout: expert e adds scale * b[e] @ a[e] to its weight.

    `lora_layout.py` converts from and to the layouts of PEFT and vLLM.

    Attributes:
        a_ERI: (E, R, in).
        b_EOR: (E, out, R); for gate and up together, `out` is in the order of the base's columns.
        scale: usually alpha / R.
    """

    a_ERI: Tensor
    b_EOR: Tensor
    scale: float


def moe_experts(
    hidden_TH: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    gate_up: Tensor | PackedMxfp4,
    down: Tensor | PackedMxfp4,
    *,
    gate_up_bias_EJ: Tensor | None = None,
    down_bias_EH: Tensor | None = None,
    activation: Activation = "swiglu",
    interleaved: bool = False,
    transposed: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
    lora_gate_up: ExpertLora | None = None,
    lora_down: ExpertLora | None = None,
    base: Base = "auto",
    save: Save = "preactivation",
    routing: Routing | None = None,
) -> Tensor:
    """Send each token through its experts and add their outputs by the router weights: (T, H), dtype of `hidden_TH`.

    Differentiable once in `hidden_TH`, `weights_TK`, both LoRAs, and in weights and biases that require a gradient; an
    expert that no token chose gets zeros. An index that is no expert (below 0, or E and above) adds nothing.

    Args:
        hidden_TH: bf16, fp16 or fp32; the weights have its dtype. experts_TK: int64 or int32. weights_TK: floats.
        gate_up: (E, H, J) if `transposed`, else (E, J, H); or packed (E, J, H), whatever `transposed` says: unpacked
            in each pass into memory that is freed at its end, and frozen.
        down: (E, I, H) if `transposed`, else (E, H, I); or packed (E, H, I).
        activation: `swiglu`: silu(gate) up; `gpt_oss`: (up + 1) gate sigmoid(alpha gate), gate at most `limit`, up
            between -`limit` and `limit`.
        interleaved: gate is every other column of gate_up, from the first on (gpt-oss); else gate is its first half.
        lora_gate_up, lora_down: LoRA beside the products; computed in the dtype of `hidden_TH`.
        base: who multiplies: torch's `grouped_mm`, our `triton` kernel, or `auto`: the former in bf16 on Hopper
            and newer where it takes these weights, else the latter.
        save: `preactivation` keeps the first product, (T K, J), for the backward; `none` computes it again. Where our
            kernel multiplies and nothing is kept, the activation sees the product before it is rounded.
        routing: the sorted rows of `experts_TK`, if you have them; else they are sorted here.

    Raises:
        ValueError: shapes, dtypes or options do not fit.
    """
    layer = Layer(
        *(gate_up, down, gate_up_bias_EJ, down_bias_EH, activation, interleaved, transposed, float(alpha), float(limit))
    )
    _check(hidden_TH, experts_TK, weights_TK, *layer[:4], transposed, (activation, base, save))
    loras = _loras(hidden_TH, layer, lora_gate_up, lora_down)
    if not runs_kernels(hidden_TH):
        return _one_by_one(hidden_TH, experts_TK, weights_TK, layer, loras, base)
    routing = routing or Routing.of(experts_TK, _experts(gate_up))
    return _by_kernels(hidden_TH, experts_TK, weights_TK, layer, loras, routing, base, save)


class Layer(NamedTuple):
    """The experts of a layer, as `moe_experts` is given them."""

    gate_up: Tensor | PackedMxfp4
    down: Tensor | PackedMxfp4
    gate_up_bias_EJ: Tensor | None
    down_bias_EH: Tensor | None
    activation: Activation
    interleaved: bool
    transposed: bool
    alpha: float
    limit: float


Factors = tuple[Tensor, Tensor, float]
"""a_ERI, b_EOR and the scale, in the dtype of the layer."""
Loras = tuple[Factors | None, Factors | None]


def _loras(hidden_TH: Tensor, layer: Layer, gate_up: ExpertLora | None, down: ExpertLora | None) -> Loras:
    """Both LoRAs in the dtype of the layer, checked."""
    experts, size = _experts(layer.gate_up), _sizes(layer.gate_up, layer.transposed)[2]
    _check_lora("lora_gate_up", gate_up, (experts, hidden_TH.shape[1], size), hidden_TH)
    _check_lora("lora_down", down, (experts, size // 2, hidden_TH.shape[1]), hidden_TH)
    return _in_dtype(gate_up, hidden_TH), _in_dtype(down, hidden_TH)


def _one_by_one(
    hidden_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor, layer: Layer, loras: Loras, base: Base
) -> Tensor:
    if base == "grouped_mm":
        raise ValueError(
            f"base='grouped_mm' with tensors on {hidden_TH.device}: experts on a CPU run one by one. Use base='auto'."
        )
    unpacked = layer._replace(
        gate_up=_unpacked(layer.gate_up, layer.transposed, hidden_TH.dtype),
        down=_unpacked(layer.down, layer.transposed, hidden_TH.dtype),
    )
    options = {**unpacked._asdict(), "lora_gate_up": loras[0], "lora_down": loras[1]}
    return reference.moe_experts(hidden_TH, experts_TK, weights_TK, **options)


def _by_kernels(
    hidden_TH: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    layer: Layer,
    loras: Loras,
    routing: Routing,
    base: Base,
    save: Save,
) -> Tensor:
    if hidden_TH.dtype not in DTYPES:
        raise ValueError(
            f"hidden_TH is {hidden_TH.dtype}: the kernels compute bf16, fp16 and fp32. Use hidden_TH.float(), or "
            "pegbox_kernels.experts.reference for fp64."
        )
    from pegbox_kernels.experts import operators

    factors = [tensor for lora in loras for tensor in (lora[:2] if lora else (None, None))]
    tensors = (
        *(hidden_TH, experts_TK, weights_TK, *routing, *_stored(layer.gate_up), *_stored(layer.down)),
        *(layer.gate_up_bias_EJ, layer.down_bias_EH, *factors),
    )
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    out, *_ = operators.forward(
        *tensors,
        *(layer.transposed, layer.activation, layer.interleaved, layer.alpha, layer.limit),
        *(float(lora[2]) if lora else 1.0 for lora in loras),
        base,
        save == "preactivation" and trained,
    )
    return out


def _sizes(weight: Tensor | PackedMxfp4, transposed: bool) -> tuple[int, int, int]:
    """E, in, out."""
    experts, one, other = weight.shape
    return (experts, one, other) if transposed and isinstance(weight, Tensor) else (experts, other, one)


def _experts(weight: Tensor | PackedMxfp4) -> int:
    return weight.shape[0]


def _stored(weight: Tensor | PackedMxfp4) -> tuple[Tensor, Tensor | None]:
    return (weight.blocks, weight.scales) if isinstance(weight, PackedMxfp4) else (weight, None)


def _unpacked(weight: Tensor | PackedMxfp4, transposed: bool, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, Tensor):
        return weight
    found = weight.dequantize(dtype)
    return found.transpose(1, 2) if transposed else found


def _in_dtype(lora: ExpertLora | None, hidden: Tensor) -> Factors | None:
    if lora is None:
        return None
    return lora.a_ERI.to(hidden.dtype), lora.b_EOR.to(hidden.dtype), lora.scale


def _check(
    hidden: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor | PackedMxfp4,
    down: Tensor | PackedMxfp4,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    transposed: bool,
    options: tuple[str, str, str],
) -> None:
    for name, value, allowed in zip(
        ("activation", "base", "save"),
        options,
        (("swiglu", "gpt_oss"), ("auto", "grouped_mm", "triton"), ("preactivation", "none")),
        strict=True,
    ):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}: write one of {', '.join(allowed)}.")
    if hidden.ndim != 2 or experts.ndim != 2 or experts.shape[0] != hidden.shape[0] or experts.shape != weights.shape:
        raise ValueError(
            f"hidden_TH {tuple(hidden.shape)}, experts_TK {tuple(experts.shape)} and weights_TK {tuple(weights.shape)} "
            "do not fit: flatten batch and sequence, and pass (T, H), (T, K) and (T, K)."
        )
    if experts.dtype not in (torch.int32, torch.int64) or not weights.is_floating_point():
        raise ValueError(
            f"experts_TK are {experts.dtype} and weights_TK {weights.dtype}: indices first (int64 or int32), then "
            "weights."
        )
    if len(gate_up.shape) != 3 or len(down.shape) != 3:
        raise ValueError(f"gate_up {tuple(gate_up.shape)} and down {tuple(down.shape)}: both have three dimensions.")
    count, width, columns = _sizes(gate_up, transposed)
    if width != hidden.shape[1] or columns % 2 or _sizes(down, transposed) != (count, columns // 2, width):
        raise ValueError(
            f"gate_up {tuple(gate_up.shape)} and down {tuple(down.shape)} do not fit hidden states of "
            f"{hidden.shape[1]} with transposed={transposed}: they are "
            + ("(E, H, 2 I) and (E, I, H)." if transposed else "(E, 2 I, H) and (E, H, I).")
            + f" With transposed={not transposed} they are the other way round."
        )
    for name, bias, shape in (
        ("gate_up_bias_EJ", gate_up_bias, (count, columns)),
        ("down_bias_EH", down_bias, (count, width)),
    ):
        if bias is not None and tuple(bias.shape) != shape:
            raise ValueError(f"{name} is {tuple(bias.shape)}: it must be {shape}.")
    given = {"gate_up": gate_up, "down": down, "experts_TK": experts, "weights_TK": weights}
    for name, tensor in given.items():
        if tensor.device != hidden.device:
            raise ValueError(f"hidden_TH lies on {hidden.device} and {name} on {tensor.device}. Move one of them.")
        if name in ("gate_up", "down") and isinstance(tensor, Tensor) and tensor.dtype != hidden.dtype:
            raise ValueError(f"hidden_TH is {hidden.dtype} and {name} {tensor.dtype}. Convert one of them.")


def _check_lora(name: str, lora: ExpertLora | None, shape: tuple[int, int, int], hidden: Tensor) -> None:
    if lora is None:
        return
    experts, width, size = shape
    a, b = lora.a_ERI, lora.b_EOR
    rank = a.shape[1] if a.ndim == 3 else 0
    if rank == 0 or tuple(a.shape) != (experts, rank, width) or tuple(b.shape) != (experts, size, rank):
        raise ValueError(
            f"{name}: a {tuple(a.shape)} and b {tuple(b.shape)} do not fit: they are (E, R, in) = "
            f"({experts}, R, {width}) and (E, out, R) = ({experts}, {size}, R). "
            "pegbox_kernels.experts.lora_layout converts PEFT's layout."
        )
    if a.device != hidden.device or b.device != hidden.device:
        raise ValueError(f"{name} lies on {a.device} and {b.device}, hidden_TH on {hidden.device}. Move it.")
