"""The layer as operators of torch.library: forward, its gradient, and the shapes of both for torch.compile.

Outputs that are not there (z where nothing is saved, gradients that nobody asked for) are tensors without elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pegbox_kernels.experts.routing import Routing

_ARGUMENTS = (
    "Tensor hidden_TH, Tensor chosen_TK, Tensor weights_TK, Tensor order_N, Tensor inverse_N, Tensor offsets_E, "
    "Tensor gate_up, Tensor? gate_up_scales, Tensor down, Tensor? down_scales, Tensor? gate_up_bias, "
    "Tensor? down_bias, Tensor? gate_up_a, Tensor? gate_up_b, Tensor? down_a, Tensor? down_b"
)
_OPTIONS = (
    "bool transposed, str activation, bool interleaved, float alpha, float limit, float gate_up_scale, "
    "float down_scale, str base"
)
TENSORS = 16


def _layer(tensors, options):  # type: ignore[no-untyped-def]
    from pegbox_kernels.experts import passes

    hidden, chosen, weights, order, inverse, offsets, gate_up, gate_up_scales, down, down_scales, *rest = tensors
    gate_up_bias, down_bias, gate_up_a, gate_up_b, down_a, down_b = rest
    transposed, activation, interleaved, alpha, limit, gate_up_scale, down_scale, base = options

    def whole(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.contiguous()

    gate_up = passes.Weight(gate_up, gate_up_scales, transposed)
    down = passes.Weight(down, down_scales, transposed)
    return passes.Layer(
        hidden if hidden.stride(1) == 1 else hidden.contiguous(),
        chosen.contiguous(),
        weights.contiguous(),
        Routing(order, inverse, offsets),
        gate_up,
        down,
        whole(gate_up_bias),
        whole(down_bias),
        None if gate_up_a is None else passes.Factors(gate_up_a, gate_up_b, gate_up_scale),
        None if down_a is None else passes.Factors(down_a, down_b, down_scale),
        passes.Gate(activation, interleaved, alpha, limit),
        passes.provider(base, hidden, (gate_up, down)),
    )


def _given(like: Tensor, tensor: Tensor | None) -> Tensor:
    return like.new_empty(0) if tensor is None else tensor


@torch.library.custom_op(
    "pegbox_kernels::moe_experts",
    mutates_args=(),
    schema=f"({_ARGUMENTS}, {_OPTIONS}, bool save) -> (Tensor, Tensor, Tensor, Tensor)",
)
def forward(*arguments):  # type: ignore[no-untyped-def]
    """out (T, H), z (N, J), and the projections (N, R) of input and h."""
    from pegbox_kernels.experts import passes

    out, saved = passes.forward(_layer(arguments[:TENSORS], arguments[TENSORS:-1]), arguments[-1])
    return out, *(_given(out, tensor) for tensor in saved or (None, None, None))


@forward.register_fake
def _(*arguments):  # type: ignore[no-untyped-def]
    hidden, gate_up, gate_up_scales, a_in, a_out = (arguments[i] for i in (0, 6, 7, 12, 14))
    rows, save = arguments[3].shape[0], arguments[-1]
    packed = gate_up_scales is not None or not arguments[TENSORS]
    size = gate_up.shape[1] if packed else gate_up.shape[2]

    def kept(*shape: int | None) -> Tensor:
        return hidden.new_empty(shape if save and None not in shape else 0)

    projected = (kept(rows, None if a is None else a.shape[1]) for a in (a_in, a_out))
    return hidden.new_empty(hidden.shape), kept(rows, size), *projected


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.options = inputs[TENSORS:-1]
    ctx.mark_non_differentiable(*output[1:])
    # Else each backward would fill a gradient of zeros as large as z, for nobody.
    ctx.set_materialize_grads(False)
    ctx.given = [tensor is not None for tensor in inputs[:TENSORS]]
    ctx.save_for_backward(*(t for t in inputs[:TENSORS] if t is not None), *output[1:])


def _differentiate(ctx, grad, *_):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * (TENSORS + len(ctx.options) + 1)
    saved = list(ctx.saved_tensors)
    tensors = [saved.pop(0) if given else None for given in ctx.given]
    needs = ctx.needs_input_grad
    needed = [
        needs[0],
        needs[2],
        needs[6],
        needs[8],
        needs[10],
        needs[11],
        needs[12] or needs[13],
        needs[14] or needs[15],
    ]
    found = _backward(*tensors, *saved, grad, *ctx.options, needed)
    gradients = [None] * (TENSORS + len(ctx.options) + 1)
    for place, gradient in zip((0, 2, 6, 8, 10, 11, 12, 13, 14, 15), found, strict=True):
        gradients[place] = gradient if needs[place] else None
    return tuple(gradients)


forward.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op(
    "pegbox_kernels::moe_experts_backward",
    mutates_args=(),
    schema=f"({_ARGUMENTS}, Tensor z, Tensor projected_x, Tensor projected_h, Tensor grad, {_OPTIONS}, bool[] needed) "
    f"-> ({', '.join(['Tensor'] * 10)})",
)
def _backward(*arguments):  # type: ignore[no-untyped-def]
    from pegbox_kernels.experts import passes

    *kept, grad = arguments[TENSORS : TENSORS + 4]
    layer = _layer(arguments[:TENSORS], arguments[TENSORS + 4 : -1])
    z, projected_x, projected_h = kept
    if z.shape[0] == layer.routing.order_N.shape[0] and z.ndim == 2:
        saved = passes.Saved(
            z,
            None if layer.lora_gate_up is None else projected_x,
            None if layer.lora_down is None else projected_h,
        )
    else:
        saved = passes.recompute(layer)
    del z, projected_x, projected_h, kept
    found = passes.backward(layer, saved, grad, passes.Needed(*arguments[-1]))
    return tuple(_given(grad, gradient) for gradient in found)


@_backward.register_fake
def _(*arguments):  # type: ignore[no-untyped-def]
    hidden_like = arguments[0]
    needs = list(arguments[-1])
    needs = [*needs[:6], needs[6], needs[6], needs[7], needs[7]]
    likes = (arguments[place] for place in (0, 2, 6, 8, 10, 11, 12, 13, 14, 15))
    return tuple(
        torch.empty(like.shape, dtype=like.dtype, device=like.device) if need else hidden_like.new_empty(0)
        for like, need in zip(likes, needs, strict=True)
    )
