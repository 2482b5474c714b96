"""A gated MLP whose three projections have low-rank updates, forward and backward by hand.

The GEMMs of gate and up give the base products alone. Their rank products are added in the kernel that computes
h = act(g) u, from P (T, r) and B (I, r), which are small: adding them costs no pass over (T, I). The kernel of the
backward adds them again, adds the rank product of dh, and in the same pass sums what belongs to the factors: dP and dB
of gate and up, dA of down. So h is never kept, and nothing of width I is read twice.

Gradients, with dh = dy W_d + dP_d A_d and c = s / (1 - dropout):

    dP_d = c dy B_d    dB_d = c dy^T P_d    dA_d = dP_d^T h
    dx = dP A + dg W_g + du W_u    dA = dP^T x    dP = [c dg B_g, c du B_u]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pegbox_kernels.lora_linear.glu import glu, glu_backward
from pegbox_kernels.lora_linear.linears import (
    FIELDS,
    a_gradients,
    cast_like,
    input_gradient,
    projected,
    rank_products,
    weight_of,
)
from pegbox_kernels.lora_linear.projection import Factors, Weight, factors, mm_wide, without_autocast

GATE, UP, DOWN = 0, 1, 2
WEIGHT, BIAS, A, B, MASK = range(FIELDS)


class LoraMlp(torch.autograd.Function):
    """`LoraMlp.apply(x, scales, activation, keep, makers, *tensors)`: (T, K) -> (T, N); gate, up, down in order."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scales: tuple[float, ...],
        activation: str,
        keep: str,
        makers: tuple[Weight | None, ...],
        *tensors: Tensor | None,
    ) -> Tensor:
        parts = [tensors[at : at + FIELDS] for at in range(0, 3 * FIELDS, FIELDS)]
        with without_autocast(x):
            small = factors([part[A] for part in parts[:DOWN]], [part[B] for part in parts[:DOWN]], x)
            p = rank_products(x, small, [part[MASK] for part in parts[:DOWN]])
            gate, up = (_base(x, part[WEIGHT], makers[i], part[BIAS]) for i, part in enumerate(parts[:DOWN]))
            b_gate, b_up = (_or_none(b, gate) for b in small.b)
            last = factors([parts[DOWN][A]], [parts[DOWN][B]], gate)
            (b_down,), mask = last.b, parts[DOWN][MASK]
            inside = last.a if mask is None else last.a[:0]
            h, p_down = glu(gate, up, p, b_gate, b_up, inside, scales[GATE], scales[UP], activation)
            if mask is not None:
                p_down = rank_products(h, last, [mask])
            weight = weight_of(parts[DOWN][WEIGHT], makers[DOWN], x.dtype)
            y = projected(h, weight, parts[DOWN][BIAS], p_down, b_down, scales[DOWN])
        ctx.scales, ctx.activation, ctx.makers, ctx.columns = scales, activation, makers, small.columns
        ctx.dtypes = tuple(None if part is None else part.dtype for part in tensors)
        kept = (gate, up) if keep == "projections" else (None, None)
        frozen = [part[field] for part in parts for field in (WEIGHT, MASK)]
        biases = [None if keep == "projections" else part[BIAS] for part in parts[:DOWN]]
        ctx.save_for_backward(x, *kept, p, p_down, small.a, last.a, *small.b, b_down, *frozen, *biases)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, p, p_down, a, a_down, b_gate, b_up, b_down, *rest = ctx.saved_tensors
        weights, masks, biases = rest[0:6:2], rest[1:6:2], rest[6:8]
        small, wanted = Factors(a, (b_gate, b_up), ctx.columns), ctx.needs_input_grad
        found: list[Tensor | None] = [None] * (3 * FIELDS)

        def wants(part: int, field: int) -> bool:
            return bool(wanted[5 + part * FIELDS + field])

        with without_autocast(x):
            dense = [weight_of(weight, make, x.dtype) for weight, make in zip(weights, ctx.makers, strict=True)]
            if gate is None:
                gate, up = (_base(x, dense[i], None, biases[i]) for i in (GATE, UP))
            dh, dp_down = dy @ dense[DOWN], torch.empty_like(p_down)
            if b_down is not None:
                dp_down.addmm_(dy, b_down, beta=0, alpha=ctx.scales[DOWN])
                if wants(DOWN, B):
                    found[DOWN * FIELDS + B] = mm_wide(dy.T, p_down).mul_(ctx.scales[DOWN])
            if wants(DOWN, BIAS):
                found[DOWN * FIELDS + BIAS] = _summed(dy)
            inside = (dp_down, a_down)
            if masks[DOWN] is not None:
                dh.add_((dp_down @ a_down).mul_(masks[DOWN]))
                inside = (dp_down[:, :0], a_down[:0])
            b_both = (_or_none(b_gate, gate), _or_none(b_up, up))
            grads = glu_backward(
                dh, gate, up, p, *b_both, *inside, ctx.scales[GATE], ctx.scales[UP], ctx.activation,
                masks[DOWN] is not None,
            )  # fmt: skip
            if wants(DOWN, A):
                masked = None if masks[DOWN] is None else grads.h * masks[DOWN]
                found[DOWN * FIELDS + A] = grads.a_down if masked is None else mm_wide(dp_down.T, masked)
            for part, dpart, db in ((GATE, grads.gate, grads.b_gate), (UP, grads.up, grads.b_up)):
                if wants(part, B):
                    found[part * FIELDS + B] = db
                if wants(part, BIAS):
                    found[part * FIELDS + BIAS] = _summed(dpart)
            if wants(GATE, A) or wants(UP, A):
                for part, da in enumerate(a_gradients(grads.p, x, small, masks[:DOWN])):
                    found[part * FIELDS + A] = da if wants(part, A) else None
            both = ((grads.gate, dense[GATE]), (grads.up, dense[UP]))
            dx = input_gradient(both, grads.p, small, masks[:DOWN], x) if wanted[0] else None
        return dx, None, None, None, None, *cast_like(found, ctx.dtypes)


def _base(x: Tensor, weight: Tensor | None, make: Weight | None, bias: Tensor | None) -> Tensor:
    return projected(x, weight_of(weight, make, x.dtype), bias, x[:, :0], None, 1.0)


def _or_none(b: Tensor | None, like: Tensor) -> Tensor:
    """B, or a matrix of rank 0 for a projection without an update."""
    return like.new_empty(like.shape[1], 0) if b is None else b


def _summed(dy: Tensor) -> Tensor:
    return dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
