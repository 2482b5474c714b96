"""Gated MLPs and gates of experts, found by what modules compute.

An MLP has the children gate_proj, up_proj and down_proj, or gate_up_proj and down_proj, and perhaps an activation. Its
own forward is tried with small linear layers in their place: one that does more (multipliers, dropout, clamps) shows,
and is left alone. What takes its place calls the same children by the same names: adapters on them act, and so does
quantization.

Experts of transformers multiply by the activation in `_apply_gate`, an attribute that each of their implementations
asks the instance for: that is the seam.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from pegbox_kernels.glu import Activation, Layout, glu
from pegbox_kernels.recognition.trial import equal, inputs_of, numbers, trial

WIDTH, INNER = 5, 6
APART, PACKED = frozenset({"gate_proj", "up_proj", "down_proj"}), frozenset({"gate_up_proj", "down_proj"})
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh", "gelu")
SEAM = "_apply_gate"
IMPLEMENTATIONS = frozenset({None, "eager", "grouped_mm", "batched_mm"})
"""Ways of computing experts that ask for the seam."""


@dataclass(frozen=True)
class GluRule:
    """How a gated linear unit computes; `alpha` and `limit` are those of a clamped one."""

    activation: Activation
    layout: Layout = "halves"
    alpha: float = 1.702
    limit: float = 7.0

    def __str__(self) -> str:
        return self.activation + (f", {self.layout}" if self.layout == "interleaved" else "")

    def __call__(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        return glu(gate, up, activation=self.activation, layout=self.layout, alpha=self.alpha, limit=self.limit)


class GatedMLP(nn.Module):
    """A gated MLP with another product; its children are those of the MLP whose place it takes.

    `product(gate, up)`, or `product(gate_up)` where one projection makes both, is what comes between the projections.
    """

    def __init__(self, children: Mapping[str, nn.Module], product: Callable[..., Tensor]) -> None:
        super().__init__()
        self.product = product
        for name, child in children.items():
            self.add_module(name, child)
        self.packed = "gate_up_proj" in children

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            return self.down_proj(self.product(self.gate_up_proj(x)))
        gate, up = self.gate_proj(x), self.up_proj(x)
        if gate.dtype != up.dtype:
            wider = torch.promote_types(gate.dtype, up.dtype)
            gate, up = gate.to(wider), up.to(wider)
        return self.down_proj(self.product(gate, up))

    def extra_repr(self) -> str:
        return str(self.product)


def is_candidate(module: nn.Module) -> bool:
    """Whether it has the children of a gated MLP."""
    names = {name for name, _ in module.named_children()}
    return names >= APART or names >= PACKED


def rule_of(module: nn.Module) -> GluRule | None:
    """What a candidate does between its projections, or None: it does more."""
    others = _others(module)
    parametric = any(next(child.parameters(), None) is not None for child in others.values())
    own = next(module.parameters(recurse=False), None) is not None
    takes = inputs_of(module)
    if takes is None or len(takes) != 1 or len(others) > 1 or parametric or own:
        return None
    return next((rule for rule in map(GluRule, ACTIVATIONS) if agrees(module, rule)), None)


@torch.no_grad()
def agrees(module: nn.Module, product: Callable[..., Tensor], device: torch.device | None = None) -> bool:
    """Whether the module with this product between its projections gives what it does, on a device (CPU: None)."""
    inner = {"gate_proj": INNER, "up_proj": INNER, "gate_up_proj": 2 * INNER}
    children = _others(module)
    names = [name for name, _ in module.named_children() if name not in children]
    for seed, name in enumerate(names):
        into, out = (INNER, WIDTH) if name == "down_proj" else (WIDTH, inner[name])
        with torch.random.fork_rng(devices=[]):
            children[name] = nn.Linear(into, out, bias=False)
        children[name].weight = nn.Parameter(numbers(out, into, seed=seed).to(device))
    x = (numbers(7, WIDTH, seed=9) * 3).to(device)
    try:
        expected = trial(module, {}, children).forward(x)
    except (RuntimeError, TypeError, AttributeError, ValueError, LookupError):
        return False
    return equal(GatedMLP(children, product)(x), expected)


def _others(module: nn.Module) -> dict[str, nn.Module]:
    """Its children that are no projections."""
    children = dict(module.named_children())
    projections = APART if children.keys() >= APART else PACKED
    return {name: child for name, child in children.items() if name not in projections}


def gate_rule_of(experts: nn.Module) -> GluRule | None:
    """What the seam of experts computes, or None if it is none of the known."""
    settings = {name: value for name in ("alpha", "limit") if isinstance(value := getattr(experts, name, None), float)}
    layouts: tuple[Layout, ...] = ("halves", "interleaved")
    rules = [GluRule(activation, layout) for activation, layout in product(ACTIVATIONS, layouts)]
    if settings.keys() == {"alpha", "limit"}:
        rules += [GluRule("clamped", layout, **settings) for layout in layouts]
    return next((rule for rule in rules if gate_agrees(experts, rule)), None)


@torch.no_grad()
def gate_agrees(experts: nn.Module, compute: Callable[[Tensor], Tensor], device: torch.device | None = None) -> bool:
    """Whether this computes what the seam of experts does, on a device (CPU: None)."""
    made = (numbers(33, 2 * INNER) * 6).to(device)
    try:
        expected = getattr(experts, SEAM)(made)
    except (RuntimeError, TypeError, AttributeError, ValueError):
        return False
    return equal(compute(made), expected)
