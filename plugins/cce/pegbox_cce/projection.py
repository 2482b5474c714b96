"""The linear layer behind a model's output embeddings: which are served, and how one is called.

The kernel takes a weight and a bias where the layer would multiply. It is called through the layer all the same, so
that whatever surrounds the layer acts: hooks, PEFT's choice between the trained copy of a head and the original. What
comes back is taken before hooks change it: one that converts logits to bf16 must not convert log-probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pegbox.errors import ConfigError
from torch import Tensor, nn

if TYPE_CHECKING:
    from pegbox.types import Model

    from pegbox_cce.config import CceConfig

Compute = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
"""`compute(hidden_NH, weight_VH, bias_V)`: log-probabilities and entropy."""


def require_plain(model: Model, settings: CceConfig) -> None:
    """Raise unless the kernel can stand in for the projection of this model.

    Raises:
        ConfigError: an adapter, a quantized weight, a layer of another kind, or a bias that Apple's does not know.
    """
    module: Any = model.module
    network = getattr(module, "get_base_model", lambda: module)()
    projection = network.get_output_embeddings()
    for layer in linear_layers(projection):
        _require_floating(layer.weight)
        if layer.bias is not None and settings.implementation == "apple":
            raise ConfigError(
                f"the head of {model.name} has a bias, and cce.implementation is apple",
                "cut-cross-entropy multiplies by a weight alone.",
                "Set cce.implementation to pegbox.",
            )


def linear_layers(projection: nn.Module) -> list[nn.Linear]:
    """The plain linear layers of which one will be called: the projection, or a trained copy and its original.

    Raises:
        ConfigError: it is something else.
    """
    copies = getattr(projection, "modules_to_save", None)
    parts = [projection]
    if isinstance(copies, nn.ModuleDict) and isinstance(getattr(projection, "original_module", None), nn.Module):
        parts = [projection.get_submodule("original_module"), *copies.values()]
    for part in parts:
        if type(part).forward is not nn.Linear.forward or "forward" in vars(part):
            raise ConfigError(
                f"cce is in plugins, and the head is a {type(part).__name__}{_why(part)}",
                "The kernel multiplies by one weight, and what else the layer does would be lost.",
                "Leave the head out of adapters and quantization, or replace cce by chunked-cross-entropy.",
            )
    return parts


def _why(part: nn.Module) -> str:
    if hasattr(part, "base_layer"):
        return " with an adapter"
    return ", whose forward is patched" if "forward" in vars(part) else ""


def call(projection: nn.Module, hidden_NH: Tensor, compute: Compute) -> tuple[Tensor, Tensor | None]:
    """What `compute` makes of the projection's weight and bias, called where the projection multiplies."""
    found: list[tuple[Tensor, Tensor | None]] = []

    def within(layer: nn.Linear) -> Callable[[Tensor], tuple[Tensor, ...]]:
        def forward(hidden_NH: Tensor) -> tuple[Tensor, ...]:
            _require_whole(layer.weight)
            found.append(compute(hidden_NH, layer.weight, layer.bias))
            return tuple(part for part in found[-1] if part is not None)

        return forward

    with _replaced(linear_layers(projection), within):
        projection(hidden_NH)
    return found[-1]


@contextmanager
def _replaced(layers: list[nn.Linear], within: Callable[[nn.Linear], Callable[..., object]]) -> Iterator[None]:
    for layer in layers:
        layer.__dict__["forward"] = within(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


def _require_floating(weight: Tensor) -> None:
    from torch.distributed.tensor import DTensor

    if not weight.is_floating_point() or type(weight) not in (nn.Parameter, Tensor, DTensor):
        raise ConfigError(
            f"cce is in plugins, and the weight of the head is quantized ({type(weight).__name__}, {weight.dtype})",
            "The kernel multiplies by floating-point numbers.",
            "Leave the head out of the quantization, or replace cce by chunked-cross-entropy.",
        )


def _require_whole(weight: Tensor) -> None:
    """A sharded weight must have been gathered by now, as fsdp does for what is in no layer."""
    from torch.distributed.tensor import DTensor

    if isinstance(weight, DTensor):
        raise ConfigError(
            f"cce is in plugins, and the weight of the head is in shards ({type(weight).__name__}) when it is used",
            "The kernel multiplies by a whole weight.",
            "Use fsdp, which gathers the head, or replace cce by chunked-cross-entropy.",
        )
