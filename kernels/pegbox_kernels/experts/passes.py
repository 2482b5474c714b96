"""The passes of the expert layer, put together from products (`grouped.py`) and what lies between them.

Nothing here waits for the device. What the backward needs beside the inputs is z, the first product (N, J), and the two
rank projections (N, R); without z (`save="none"`) it is computed again. Gathered rows are never kept.

Shapes as in reference.py; N = T K rows sorted by expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pegbox_kernels.dispatch import is_for_gpu
from pegbox_kernels.experts import activation, activation_backward, glue, grouped, sums
from pegbox_kernels.experts.grouped import Gate
from pegbox_kernels.experts.routing import Routing
from pegbox_kernels.mxfp4 import triton as mxfp4


class Factors(NamedTuple):
    """LoRA beside one product: a (E, R, in), b (E, out, R), scale."""

    a: Tensor
    b: Tensor
    scale: float


class Weight(NamedTuple):
    """Of one product, as it is stored: a tensor, or MXFP4 blocks (E, out, G, 16) with scales (E, out, G)."""

    stored: Tensor
    scales: Tensor | None
    transposed: bool

    def by_input(self, dtype: torch.dtype) -> Tensor:
        """(E, in, out); a view, or unpacked into new memory, which the allocator gives to one layer after another."""
        if self.scales is not None:
            return mxfp4.dequantize(self.stored, self.scales, dtype).transpose(1, 2)
        return self.stored if self.transposed else self.stored.transpose(1, 2)

    def shape_by_input(self, dtype: torch.dtype) -> Tensor:
        """What `by_input` would give, without unpacking."""
        if self.scales is None:
            return self.by_input(dtype)
        experts, size, blocks = self.scales.shape
        return torch.empty((experts, size, blocks * 32), dtype=dtype, device="meta").transpose(1, 2)


def provider(base: str, hidden: Tensor, weights: tuple[Weight, Weight]) -> grouped.Base:
    """Who multiplies, if `base` (which may be `auto`) is asked for; ValueError if it cannot."""
    if base == "triton":
        return "triton"
    reason = grouped.why_not_grouped_mm(hidden, tuple(weight.shape_by_input(hidden.dtype) for weight in weights))
    if base == "auto":
        return "grouped_mm" if reason is None and is_for_gpu(hidden) else "triton"
    if reason is not None:
        raise ValueError(f"base='grouped_mm': {reason}. Use base='auto' or base='triton'.")
    return "grouped_mm"


class Layer(NamedTuple):
    """What a pass works with. `base` says which provider multiplies."""

    hidden_TH: Tensor
    chosen_TK: Tensor
    weights_TK: Tensor
    routing: Routing
    gate_up: Weight
    down: Weight
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    lora_gate_up: Factors | None
    lora_down: Factors | None
    gate: Gate
    base: grouped.Base

    @property
    def top_k(self) -> int:
        return self.chosen_TK.shape[1]

    @property
    def ours(self) -> bool:
        """Whether our own kernel multiplies; it adds the rank product itself."""
        return self.base == "triton"


class Saved(NamedTuple):
    """z (N, J); projections of the input (N, R) and of h (N, R), scaled, or None without LoRA."""

    z: Tensor
    projected_x: Tensor | None
    projected_h: Tensor | None


class Needed(NamedTuple):
    """Which gradients are asked for; those of a LoRA come together."""

    hidden: bool
    weights: bool
    gate_up: bool
    down: bool
    gate_up_bias: bool
    down_bias: bool
    lora_gate_up: bool
    lora_down: bool


class Gradients(NamedTuple):
    """In the shapes of what they are the gradients of; None where not asked for."""

    hidden: Tensor | None = None
    weights: Tensor | None = None
    gate_up: Tensor | None = None
    down: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    gate_up_a: Tensor | None = None
    gate_up_b: Tensor | None = None
    down_a: Tensor | None = None
    down_b: Tensor | None = None


def forward(layer: Layer, keep: bool) -> tuple[Tensor, Saved | None]:
    """The layer's output (T, H), and what the backward needs, if it is to be kept."""
    z, h, projected_x, projected_h = _first_half(layer, keep)
    if not keep:
        z = None  # Its memory is free for the second product.
    lora = layer.lora_down
    weight = layer.down.by_input(h.dtype)
    if layer.ours:
        pair = None if lora is None or projected_h is None else (projected_h, lora.b)
        y = grouped.multiply(h, weight, layer.routing, lora=pair)
    else:
        y = grouped.grouped_mm(h, weight, layer.routing)
        if lora is not None and projected_h is not None:
            glue.add_rank(y, projected_h, lora.b, layer.routing)
    del h, weight
    out = glue.combine(y, layer.routing, layer.top_k, layer.weights_TK, layer.down_bias, layer.chosen_TK)
    return out, Saved(z, projected_x, projected_h) if keep and z is not None else None


def recompute(layer: Layer) -> Saved:
    """What the backward needs, without the second product."""
    z, _, projected_x, projected_h = _first_half(layer, True)
    assert z is not None
    return Saved(z, projected_x, projected_h)


def _first_half(layer: Layer, keep: bool) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """z (N, J), which holds the rank product if ours multiplies; h (N, I); the projections (N, R) of input and h."""
    lora, routing, x, top_k = layer.lora_gate_up, layer.routing, layer.hidden_TH, layer.top_k
    a, scale = (None, 1.0) if lora is None else (lora.a, lora.scale)
    down = layer.lora_down
    a_down, down_scale = (None, 1.0) if down is None else (down.a, down.scale)
    projected = gathered = projected_h = None
    if a is not None or not layer.ours:
        projected, gathered, _ = glue.project(x, routing, top_k=top_k, factor=a, scale=scale, write=not layer.ours)
    weight = layer.gate_up.by_input(x.dtype)
    pair = None if lora is None or projected is None else (projected, lora.b)
    if layer.ours and not keep:
        bias = layer.gate_up_bias
        h = grouped.multiply_gated(x, weight, routing, layer.gate, top_k=top_k, lora=pair, bias=bias)
        if a_down is not None:
            projected_h, _, _ = glue.project(h, routing, factor=a_down, scale=down_scale)
        return None, h, projected, projected_h
    if gathered is None:
        z, pair = grouped.multiply(x, weight, routing, top_k=top_k, lora=pair), None
    else:
        z = grouped.grouped_mm(gathered, weight, routing)
    del gathered, weight
    h, projected_h = activation.forward(
        z, routing, layer.gate, bias=layer.gate_up_bias, lora_in=pair, a_out=a_down, scale_out=down_scale
    )
    return z, h, projected, projected_h


def backward(layer: Layer, saved: Saved, grad_TH: Tensor, needed: Needed) -> Gradients:
    """The gradients that are asked for. Empty experts get zeros."""
    grad_TH = grad_TH if grad_TH.stride(1) == 1 else grad_TH.contiguous()
    found, middle, gathered = _through_down(layer, saved, grad_TH, needed)
    if needed.down:
        assert middle.weighted_h is not None
        found = found._replace(down=_down_gradient(layer, middle.weighted_h, grad_TH, gathered))
    del gathered
    if needed.gate_up_bias and middle.dbias is not None and layer.gate_up_bias is not None:
        found = found._replace(gate_up_bias=middle.dbias.to(layer.gate_up_bias.dtype))
    if needed.lora_gate_up and middle.db_in is not None:
        found = found._replace(gate_up_b=middle.db_in)
    if needed.lora_down and middle.da_out is not None:
        found = found._replace(down_a=middle.da_out)
    return _through_gate_up(layer, middle.dz, needed, found)


def _through_down(
    layer: Layer, saved: Saved, grad_TH: Tensor, needed: Needed
) -> tuple[Gradients, activation_backward.Gradients, Tensor | None]:
    """Gradients from the second product, from the activation, and the gathered rows of the incoming one, if made."""
    routing, top_k, lora = layer.routing, layer.top_k, layer.lora_down
    bias = layer.down_bias if needed.weights else None
    projected = gathered = dots = None
    if lora is not None or bias is not None or not layer.ours:
        factor, scale = (None, 1.0) if lora is None else (lora.b.transpose(1, 2), lora.scale)
        projected, gathered, dots = glue.project(
            grad_TH, routing, top_k=top_k, factor=factor, scale=scale, write=not layer.ours, bias=bias
        )
    found, weights_N = Gradients(), sums.sorted_weights(layer.weights_TK, routing)
    if needed.lora_down or needed.down_bias:
        db, dbias = glue.gram(
            grad_TH,
            routing,
            top_k=top_k,
            projected=saved.projected_h if needed.lora_down else None,
            weights=weights_N,
            summed=needed.down_bias,
            transposed=True,
        )
        if db is not None:
            found = found._replace(down_b=db)
        if dbias is not None and layer.down_bias is not None:
            found = found._replace(down_bias=dbias.to(layer.down_bias.dtype))
    weight = layer.down.by_input(grad_TH.dtype).transpose(1, 2)
    if gathered is not None:
        u = grouped.grouped_mm(gathered, weight, routing)
    else:
        pair = None if lora is None or projected is None else (projected, lora.a.transpose(1, 2))
        u = grouped.multiply(grad_TH, weight, routing, top_k=top_k, lora=pair)
    kept = gathered if needed.down else None
    del weight, gathered
    up = layer.lora_gate_up
    middle = activation_backward.backward(
        saved.z,
        u,
        weights_N,
        routing,
        layer.gate,
        bias=layer.gate_up_bias,
        lora_in=None if up is None or saved.projected_x is None else (saved.projected_x, up.b),
        lora_out=None if lora is None or projected is None else (projected, lora.a),
        added_already=layer.ours,
        write_h=needed.down,
        summed=needed.gate_up_bias,
    )
    if needed.weights:
        found = found._replace(
            weights=activation_backward.weight_gradient(middle.dots, dots, routing, layer.weights_TK)
        )
    return found, middle, kept


def _through_gate_up(layer: Layer, dz: Tensor, needed: Needed, found: Gradients) -> Gradients:
    routing, top_k, lora, x = layer.routing, layer.top_k, layer.lora_gate_up, layer.hidden_TH
    projected = None
    if lora is not None and (needed.hidden or needed.lora_gate_up):
        projected, _, _ = glue.project(dz, routing, factor=lora.b.transpose(1, 2), scale=lora.scale)
    if needed.lora_gate_up and projected is not None:
        da, _ = glue.gram(x, routing, top_k=top_k, projected=projected)
        found = found._replace(gate_up_a=da)
    if needed.gate_up:
        found = found._replace(gate_up=_gate_up_gradient(layer, dz))
    if not needed.hidden:
        return found
    weight = layer.gate_up.by_input(x.dtype).transpose(1, 2)
    pair = None if lora is None or projected is None else (projected, lora.a.transpose(1, 2))
    if layer.ours:
        dx = grouped.multiply(dz, weight, routing, lora=pair)
    else:
        dx = grouped.grouped_mm(dz, weight, routing)
        if pair is not None:
            glue.add_rank(dx, *pair, routing)
    del weight, dz
    return found._replace(hidden=glue.combine(dx, routing, top_k))


def _gate_up_gradient(layer: Layer, dz: Tensor) -> Tensor:
    """(E, H, J), or (E, J, H) as the weight is stored."""
    x, stored, transposed = layer.hidden_TH, layer.gate_up.stored, layer.gate_up.transposed
    if layer.ours:
        out = torch.empty(stored.shape, dtype=stored.dtype, device=stored.device)
        view = out if transposed else out.transpose(1, 2)
        grouped.weight_gradient(x, dz, layer.routing, view, gather_x=layer.top_k)
        return out
    _, gathered, _ = glue.project(x, layer.routing, top_k=layer.top_k, write=True)
    assert gathered is not None
    pair = (gathered, dz) if transposed else (dz, gathered)
    return grouped.grouped_mm_weight_gradient(*pair, layer.routing)


def _down_gradient(layer: Layer, weighted_h: Tensor, grad_TH: Tensor, gathered: Tensor | None) -> Tensor:
    """(E, I, H), or (E, H, I) as the weight is stored."""
    stored, transposed = layer.down.stored, layer.down.transposed
    if gathered is None:
        out = torch.empty(stored.shape, dtype=stored.dtype, device=stored.device)
        view = out if transposed else out.transpose(1, 2)
        grouped.weight_gradient(weighted_h, grad_TH, layer.routing, view, gather_y=layer.top_k)
        return out
    pair = (weighted_h, gathered) if transposed else (gathered, weighted_h)
    return grouped.grouped_mm_weight_gradient(*pair, layer.routing)
