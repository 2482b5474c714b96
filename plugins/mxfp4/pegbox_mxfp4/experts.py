"""Which modules are experts whose weights can be packed: those that transformers' ExpertsInterface serves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.nn import Module

FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "num_experts")
PARTS = ("gate_up_proj", "down_proj")


def is_experts(module: Module) -> bool:
    """Whether a module holds stacked experts."""
    return all(hasattr(module, name) for name in (*FLAGS, *PARTS))


def experts_of(module: Module) -> Iterator[tuple[str, Any]]:
    """Modules of stacked experts, by name; under wrappers of an adapter, what is wrapped."""
    for name, part in module.named_modules():
        if is_experts(part) and not hasattr(part, "base_layer"):
            yield name, part
