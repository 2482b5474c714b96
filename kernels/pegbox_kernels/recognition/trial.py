"""A module tried on made-up inputs, without touching it: a copy that shares its settings and has parts of its own.

What a module computes is found by what it returns, not by its name: the copy is of the module's own class, with its
attributes, and with small made-up parameters or children in place of the real ones, so that it may be on the meta
device or larger than memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Rule = TypeVar("Rule", bound=Hashable)
MODES = ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16))
"""Data types of inputs and of weights that modules are tried in."""


def trial(
    module: nn.Module, parameters: Mapping[str, nn.Parameter | None], children: Mapping[str, nn.Module]
) -> nn.Module:
    """A module of the same class and settings with these parameters and children, in training."""
    copy = object.__new__(type(module))
    vars(copy).update(vars(module))
    vars(copy).update(training=True, _parameters=dict(parameters), _modules=dict(children), _buffers={})
    return copy


def is_own(module: nn.Module) -> bool:
    """Whether the module computes what its class says: nobody gave the instance another forward, or hooks."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" not in vars(module) and not any(hooks)


def inputs_of(module: nn.Module) -> tuple[str, ...] | None:
    """Names of what its forward takes, or None if it takes more than positional arguments."""
    parameters = signature(type(module).forward).parameters.values()
    if any(p.kind not in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.POSITIONAL_ONLY) for p in parameters):
        return None
    return tuple(p.name for p in parameters)[1:]


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, the same each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@dataclass(frozen=True)
class Closeness:
    """How near two results must be: as a multiple of the precision of their dtype, or all but 2 in 100 to the bit."""

    bits_alike: bool = False
    same_dtype: bool = True
    slack: float = 8.0


EXACT, CLOSE = Closeness(bits_alike=True), Closeness()


def equal(found: Any, expected: Any, closeness: Closeness = CLOSE) -> bool:
    """Whether two results are one: shape, dtype and numbers."""
    if not isinstance(expected, Tensor) or found.shape != expected.shape:
        return False
    if closeness.same_dtype and found.dtype != expected.dtype:
        return False
    if closeness.bits_alike and expected.dtype != torch.float32:
        return float((found == expected).float().mean()) > 0.98
    precision = max(1e-5, *(torch.finfo(one.dtype).eps for one in (found, expected)))
    rtol, largest = closeness.slack * precision, float(expected.abs().max())
    return torch.allclose(found.float(), expected.float(), rtol=rtol, atol=rtol * largest * 0.05)


def by_rule(
    network: nn.Module, is_candidate: Callable[[nn.Module], bool], rule_of: Callable[[nn.Module], Rule | None]
) -> tuple[dict[Rule, frozenset[str]], Counter[str]]:
    """The names of candidates by what they compute, and how many of each kind do something that is not known."""
    found: dict[Rule, set[str]] = {}
    left: Counter[str] = Counter()
    for name, module in network.named_modules():
        if not is_candidate(module):
            continue
        rule = rule_of(module) if is_own(module) else None
        if rule is None:
            why = "computes something else" if is_own(module) else "has a forward or hooks of its own"
            left[f"{type(module).__name__}, which {why}"] += 1
        else:
            found.setdefault(rule, set()).add(name)
    return {rule: frozenset(names) for rule, names in found.items()}, left
