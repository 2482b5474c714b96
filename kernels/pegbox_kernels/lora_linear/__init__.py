"""Linear layers with LoRA on a frozen base, without B A, without copies and without sums over (T, N).

    q, k, v = lora_linears(x, (Projection(weight=w_q, a=a_q, b=b_q, scale=2.0), ...))
    y = lora_linear(x, w_o, a_o, b_o, 2.0)
    y = lora_mlp(x, gate, up, down, activation="silu")

All projections that share an input share its product with their A; the rank products of gate and up are added inside
the kernel of the activation, forward and backward. Gradients reach x, A, B, biases and magnitudes; A and B in fp32 get
theirs summed in fp32. Autocast is followed. Differentiable once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pegbox_kernels.lora_linear import reference
from pegbox_kernels.lora_linear.linears import LoraLinears, arguments
from pegbox_kernels.lora_linear.mlp import LoraMlp
from pegbox_kernels.lora_linear.projection import (
    Projection,
    Weight,
    autocasts,
    check,
    compute_dtype,
    row_norms,
    without_autocast,
)

__all__ = ["Projection", "lora_linear", "lora_linears", "lora_mlp"]


def lora_linear(
    x: Tensor, weight: Weight, a: Tensor, b: Tensor, scale: float, bias: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """x W^T + bias + scale (drop(x) A^T) B^T, (..., K) -> (..., N); `Projection` says what the arguments are.

    Raises:
        ValueError: shapes or dtypes do not fit, or the weight wants a gradient.
    """
    projection = Projection(weight=weight, a=a, b=b, scale=scale, bias=bias, dropout=dropout)
    return lora_linears(x, (projection,))[0]


def lora_linears(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """Several projections of one input: (..., K) -> (..., N_i) for each, in the dtype of x or of autocast.

    Raises:
        ValueError: shapes or dtypes do not fit, or a weight wants a gradient.
    """
    _check(x, {f"projection {i}": part for i, part in enumerate(projections)})
    x = x.to(compute_dtype(x))
    rows = x.reshape(-1, x.shape[-1])
    tensors, makers = arguments(rows, [_without_magnitude(part) for part in projections])
    scales = tuple(part.scale / (1 - part.dropout) for part in projections)
    ys = LoraLinears.apply(rows, scales, tuple(makers), *tensors)
    found = [y if part.magnitude is None else _dora(y, part) for y, part in zip(ys, projections, strict=True)]
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in found)


def lora_mlp(
    x: Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    *,
    activation: str = "silu",
    keep: str = "projections",
) -> Tensor:
    """down(act(gate(x)) up(x)), (..., K) -> (..., N).

    Args:
        activation: `silu`, `gelu_tanh` or `gelu`.
        keep: what stays between forward and backward beside x: `projections`, the base products of gate and up (2 T I
            numbers; h is made again); or `input`, nothing of width I: both GEMMs run again.

    Raises:
        ValueError: shapes or dtypes do not fit, a weight wants a gradient, or a name is unknown.
    """
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}: known are {', '.join(reference.ACTIVATIONS)}.")
    if keep not in ("projections", "input"):
        raise ValueError(f"keep is {keep!r}: known are projections and input.")
    _check(x, {"gate": gate, "up": up})
    if any(part.magnitude is not None for part in (gate, up, down)):
        # DoRA rescales what the kernel would have added already: three projections, and torch between them.
        g, u = lora_linears(x, (gate, up))
        return lora_linears(reference.activate(g, activation) * u, (down,))[0]
    x = x.to(compute_dtype(x))
    rows = x.reshape(-1, x.shape[-1])
    _check_down(gate, up, down)
    tensors, makers = arguments(rows, (gate, up))
    width = next(part.shape[0] for part in (tensors[0], gate.b, tensors[5], up.b) if part is not None)
    hidden = rows.new_empty(rows.shape[0], 1).expand(-1, width)
    _check(hidden, {"down": down})
    more, maker = arguments(hidden, (down,))
    scales = tuple(part.scale / (1 - part.dropout) for part in (gate, up, down))
    y = LoraMlp.apply(rows, scales, activation, keep, (*makers, *maker), *tensors, *more)
    return y.view(*x.shape[:-1], y.shape[-1])


def _check(x: Tensor, projections: dict[str, Projection]) -> None:
    if not projections:
        raise ValueError("there is no projection: pass at least one.")
    if x.ndim == 0 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}: it must be (..., K) of floating point.")
    dtype = compute_dtype(x)
    for name, part in projections.items():
        check(x, part, name)
        if isinstance(part.weight, Tensor) and part.weight.dtype != dtype and x.dtype == dtype:
            if autocasts(x):
                continue
            raise ValueError(
                f"{name}: the weight is {part.weight.dtype} and x {x.dtype}. Cast one of them, or use autocast."
            )


def _check_down(gate: Projection, up: Projection, down: Projection) -> None:
    if all(callable(part.weight) and part.b is None for part in (gate, up)):
        raise ValueError("gate and up are both made by functions and have no update: their width is unknown.")


def _without_magnitude(part: Projection) -> Projection:
    """What is rescaled afterwards has its bias added afterwards."""
    if part.magnitude is None:
        return part
    return Projection(weight=part.weight, a=part.a, b=part.b, scale=part.scale)


def _dora(y: Tensor, part: Projection) -> Tensor:
    """m / |W + s B A| y + bias; the norm counts as a constant, as in the paper."""
    assert part.a is not None, "checked"
    assert part.b is not None, "checked"
    assert part.magnitude is not None, "asked for"
    with torch.no_grad(), without_autocast(y):
        weight = part.weight if isinstance(part.weight, Tensor) else part.weight()
        norms = row_norms(weight.to(y.dtype), part.a, part.b, part.scale)
    y = y * (part.magnitude / norms).to(y.dtype)
    return y if part.bias is None else y + part.bias.to(y.dtype)
