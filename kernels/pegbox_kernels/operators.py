"""Operations that torch.compile keeps whole, and that cost the host little when nothing is compiled.

    scale = operator("scale", _scale, _shape_of, schema="(Tensor x, float factor) -> Tensor")
    twice = differentiable("twice", _twice, _shape_of, schema=..., save=_save, differentiate=_differentiate)

A registered operator of torch is seen by torch.compile, fake tensors, dispatch modes (selective checkpointing keeps its
results by name) and functorch. For that the host pays some 40 microseconds in each call that has a gradient and 15 in
each backward, which is longer than the GPU computes many of these operations. So both are made here of the same
functions: the registered operator, and, where nothing but autograd follows the call, the functions themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any, TypeAlias

import torch
from torch import Tensor

Call: TypeAlias = Callable[..., Any]

PLAIN = frozenset((Tensor, torch.nn.Parameter, NoneType, bool, int, float, str, torch.dtype))
"""Types of arguments that are what they look like; subclasses of tensors and symbolic numbers are not."""


def unobserved(arguments: Sequence[object]) -> bool:
    """Whether nothing but autograd follows an operation on these arguments; the first is a tensor."""
    return (
        PLAIN.issuperset(map(type, arguments))
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and not arguments[0].is_meta  # type: ignore[attr-defined]
    )


def _recorded(arguments: Sequence[object]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(given, Tensor) and given.requires_grad for given in arguments)


def operator(name: str, compute: Call, fake: Call, *, schema: str, mutates: Sequence[str] = ()) -> Call:
    """`torch.ops.pegbox_kernels.<name>`, which has no gradient, and its short way.

    Where autograd records, as in a backward with `create_graph=True`, it is the registered operator, which raises a
    RuntimeError when it is differentiated.

    Args:
        name: of the operator.
        compute: the computation; what it returns shares no memory with its arguments.
        fake: makes results of the right shapes, strides and dtypes.
        schema: of arguments and results.
        mutates: arguments that are written.

    Returns:
        A function of the arguments of `compute`, all by place.
    """
    registered = torch.library.custom_op(f"pegbox_kernels::{name}", compute, mutates_args=tuple(mutates), schema=schema)
    registered.register_fake(fake)
    given = getattr(torch.ops.pegbox_kernels, name).default._schema.arguments
    written = [place for place, argument in enumerate(given) if argument.name in mutates]

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or not unobserved(arguments) or _recorded(arguments):
            return registered(*arguments)
        results = compute(*arguments)
        for place in written:
            if not arguments[place].is_inference():
                torch.autograd.graph.increment_version(arguments[place])
        return results

    return call


def differentiable(name: str, compute: Call, fake: Call, *, schema: str, save: Call, differentiate: Call) -> Call:
    """`torch.ops.pegbox_kernels.<name>`, which has a gradient, and its short way.

    Args:
        name: of the operator.
        compute: the computation; what it returns shares no memory with its arguments.
        fake: makes results of the right shapes, strides and dtypes.
        schema: of arguments and results.
        save: (ctx, arguments, results): keeps what the backward needs, tensors with `ctx.save_for_backward`.
        differentiate: (ctx, *gradients): the gradient of each argument or None, made by operations of this module.

    Returns:
        A function of the arguments of `compute`, all by place.
    """
    registered = torch.library.custom_op(f"pegbox_kernels::{name}", compute, mutates_args=(), schema=schema)
    registered.register_fake(fake)
    registered.register_autograd(differentiate, setup_context=save)

    def forward(ctx: Any, *arguments: Any) -> Any:
        results = compute(*arguments)
        save(ctx, arguments, results)
        return results

    methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
    function = type(f"pegbox_kernels_{name}", (torch.autograd.Function,), methods)
    follow = function.apply  # type: ignore[attr-defined]

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or not unobserved(arguments):
            return registered(*arguments)
        return follow(*arguments) if torch.is_grad_enabled() else compute(*arguments)

    return call
