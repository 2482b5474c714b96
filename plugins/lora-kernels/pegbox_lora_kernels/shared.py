"""The projections of one attention, computed together although the attention calls them one after the other.

An attention calls q_proj(x), k_proj(x), v_proj(x) with the same tensor. The first of them that is called computes all;
the others take what was computed for them, if they are called with that very tensor, unchanged. Anything else is
computed by itself. What is kept lives no longer than the call of the attention: an exception (recomputing ends its
second forward by one) leaves nothing behind, and a second forward begins anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from pegbox.errors import RunError
from pegbox_kernels.lora_linear import lora_linears

from pegbox_lora_kernels.layers import read, require_arithmetic

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

Forward = Callable[..., Any]


class Call:
    """One call of an attention: the input of the group, and the results that nobody has taken yet."""

    def __init__(self) -> None:
        self.x: Tensor | None = None
        self.version = -1
        self.waiting: dict[str, Tensor] = {}


class SharedInput:
    """The adapted ones among q_proj, k_proj and v_proj of one attention, by name."""

    def __init__(self, name: str, layers: dict[str, Module]) -> None:
        self._name, self._layers = name, layers
        self._call: Call | None = None

    def around(self, attention: Module) -> Forward:
        """The attention's forward, within which its projections share their input."""
        original = attention.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            outer, self._call = self._call, Call()
            try:
                result = original(*args, **kwargs)
                waiting = self._call.waiting
            finally:
                self._call = outer
            if waiting:
                raise self._not_shared(waiting)
            return result

        return forward

    def of(self, name: str) -> Forward:
        """The forward of one projection."""
        layer = self._layers[name]
        original = layer.forward

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            call = self._call
            if args or kwargs:
                return original(x, *args, **kwargs)
            if call is not None and call.x is None:
                self._compute(call, x)
            if call is not None and name in call.waiting and call.x is x and call.version == _version(x):
                return call.waiting.pop(name)
            return alone(layer, original, x)

        return forward

    def _compute(self, call: Call, x: Tensor) -> None:
        parts = {name: read(layer) for name, layer in self._layers.items()}
        known = {name: part for name, part in parts.items() if part is not None}
        if len(known) != len(parts):
            return
        for layer in self._layers.values():
            require_arithmetic(layer, x)
        call.waiting = dict(zip(known, lora_linears(x, tuple(known.values())), strict=True))
        call.x, call.version = x, _version(x)

    def _not_shared(self, waiting: dict[str, Tensor]) -> RunError:
        return RunError(
            f"{self._name} did not call {', '.join(waiting)} with the input of its other projections",
            "lora-kernels computed them together with it, for nothing.",
            "Set lora-kernels.qkv to false.",
        )


def _version(x: Tensor) -> int:
    """How often a tensor was written to; inference mode does not count it, and in a compiled graph it is no number."""
    return -1 if torch.compiler.is_compiling() or x.is_inference() else x._version


def alone(layer: Module, original: Forward, x: Tensor) -> Any:
    """One layer by itself: by the kernels, or by PEFT where its state is not theirs."""
    part = read(layer)
    if part is None:
        return original(x)
    require_arithmetic(layer, x)
    return lora_linears(x, (part,))[0]
