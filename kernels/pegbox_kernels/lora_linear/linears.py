"""Several projections of one input, forward and backward by hand.

Forward: one product P = x [A_1; A_2; ...]^T for the group, then for each projection its rank product s P_i B_i^T is
written first and the base product added to it by the GEMM itself (beta = 1): y is written twice and read once, inside
a GEMM that has the time, and no sum of two (T, N) tensors runs by itself.

Backward, for the gradients dy_i:

    dP_i = s dy_i B_i    dB_i = s dy_i^T P_i    dA = dP^T x (one product for the group)
    dx = dP A + sum_i dy_i W_i, all into one buffer

With dropout each update sees its own masked x: c = s / (1 - p) takes the place of s, and P_i, dA_i and dP_i A_i use
x m_i instead of x.

This is an autograd function and no custom operator, because a base may be a function that makes the weight, which
no operator's schema can carry. Kept for the backward: x once, P (T, R), the small matrices, masks; never a dense
product of B and A, never the gradient of a base.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pegbox_kernels.lora_linear.projection import Factors, Projection, Weight, factors, mm_wide, without_autocast

FIELDS = 5
"""Tensors of each projection among the arguments of a function: weight, bias, a, b, mask."""


def arguments(x: Tensor, projections: Sequence[Projection]) -> tuple[list[Tensor | None], list[Weight | None]]:
    """The tensors of projections one after the other, FIELDS each, and what makes the weights that are no tensors."""
    tensors: list[Tensor | None] = []
    makers: list[Weight | None] = []
    for part in projections:
        weight = part.weight.to(x.dtype) if isinstance(part.weight, Tensor) else None
        tensors += [weight, part.bias, part.a, part.b, mask(x, part.dropout)]
        makers.append(part.weight if weight is None else None)
    return tensors, makers


def mask(x: Tensor, dropout: float) -> Tensor | None:
    """Elements that are kept, as booleans; None if all are."""
    return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - dropout) if dropout else None


def weight_of(weight: Tensor | None, make: Weight | None, dtype: torch.dtype) -> Tensor:
    """The dense weight, made now if it is kept packed."""
    if weight is not None:
        return weight
    assert callable(make), "a projection has a weight or what makes it"
    return make().to(dtype)


def rank_products(x: Tensor, small: Factors, masks: Sequence[Tensor | None]) -> Tensor:
    """P (T, R): those without a mask in one product."""
    if all(one is None for one in masks):
        return x @ small.a.T
    p = x.new_empty(x.shape[0], small.a.shape[0])
    for at, one in zip(small.columns, masks, strict=True):
        p[:, at].addmm_(x if one is None else x * one, small.a[at].T, beta=0)
    return p


def projected(x: Tensor, weight: Tensor, bias: Tensor | None, p: Tensor, b: Tensor | None, scale: float) -> Tensor:
    """(T, N): the rank product written first, the base product added to it."""
    bias = None if bias is None else bias.to(x.dtype)
    if b is None:
        return x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
    y = x.new_empty(x.shape[0], weight.shape[0])
    if bias is None:
        y.addmm_(p, b.T, beta=0, alpha=scale)
    else:
        torch.addmm(bias, p, b.T, alpha=scale, out=y)
    return y.addmm_(x, weight.T)


def input_gradient(
    dys: Sequence[tuple[Tensor, Tensor]], dp: Tensor, small: Factors, masks: Sequence[Tensor | None], like: Tensor
) -> Tensor:
    """dx of a group from (dy_i, W_i) and dP, accumulated in one buffer, the products of low rank first."""
    dx = torch.empty_like(like, memory_format=torch.contiguous_format)
    if all(one is None for one in masks):
        dx.addmm_(dp, small.a, beta=0)
    else:
        dx.zero_()
        for at, one in zip(small.columns, masks, strict=True):
            part = dp[:, at] @ small.a[at]
            dx.add_(part if one is None else part.mul_(one))
    for dy, weight in dys:
        dx.addmm_(dy, weight)
    return dx


def a_gradients(dp: Tensor, x: Tensor, small: Factors, masks: Sequence[Tensor | None]) -> list[Tensor]:
    """dA of each projection in fp32, in one product where nothing is masked."""
    if all(one is None for one in masks):
        together = mm_wide(dp.T, x)
        return [together[at] for at in small.columns]
    return [mm_wide(dp[:, at].T, x if one is None else x * one) for at, one in zip(small.columns, masks, strict=True)]


class LoraLinears(torch.autograd.Function):
    """`LoraLinears.apply(x, scales, makers, *tensors)`: (T, K) -> (T, N_i) for each projection."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scales: tuple[float, ...], makers: tuple[Weight | None, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        weights, biases, a, b, masks = (tensors[at::FIELDS] for at in range(FIELDS))
        with without_autocast(x):
            small = factors(a, b, x)
            p = rank_products(x, small, masks)
            ys = tuple(
                projected(x, weight_of(weight, make, x.dtype), bias, p[:, at], b_i, scale)
                for weight, make, bias, at, b_i, scale in zip(
                    weights, makers, biases, small.columns, small.b, scales, strict=True
                )
            )
        ctx.scales, ctx.makers, ctx.columns = scales, makers, small.columns
        ctx.dtypes = tuple(None if part is None else part.dtype for part in tensors)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, p, small.a, *small.b, *weights, *masks)
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        count = len(ctx.scales)
        x, p, a, *rest = ctx.saved_tensors
        b, weights, masks = (rest[at * count : (at + 1) * count] for at in range(3))
        small = Factors(a, tuple(b), ctx.columns)
        wanted = ctx.needs_input_grad
        found: list[Tensor | None] = [None] * (count * FIELDS)
        with without_autocast(x):
            dp, dense = torch.empty_like(p), []
            for i, (dy, at, scale) in enumerate(zip(dys, small.columns, ctx.scales, strict=True)):
                if dy is None:
                    dp[:, at].zero_()
                    continue
                if wanted[0]:
                    dense.append((dy, weight_of(weights[i], ctx.makers[i], x.dtype)))
                if b[i] is not None:
                    dp[:, at].addmm_(dy, b[i], beta=0, alpha=scale)
                    if wanted[3 + i * FIELDS + 3]:
                        found[i * FIELDS + 3] = mm_wide(dy.T, p[:, at]).mul_(scale)
                if wanted[3 + i * FIELDS + 1]:
                    found[i * FIELDS + 1] = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
            if any(wanted[3 + 2 :: FIELDS]):
                for i, da in enumerate(a_gradients(dp, x, small, masks)):
                    found[i * FIELDS + 2] = da if wanted[3 + i * FIELDS + 2] and dys[i] is not None else None
            dx = input_gradient(dense, dp, small, masks, x) if wanted[0] else None
        return dx, None, None, *cast_like(found, ctx.dtypes)


def cast_like(found: Sequence[Tensor | None], dtypes: Sequence[torch.dtype | None]) -> list[Tensor | None]:
    """Gradients in the dtypes of what they belong to."""
    return [None if one is None or dtype is None else one.to(dtype) for one, dtype in zip(found, dtypes, strict=True)]
