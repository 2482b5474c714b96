"""Which adapted layers belong together, told from what modules are: their children, and what they do with them.

An attention is a module with the children q_proj, k_proj and v_proj; a gated MLP one with gate_proj, up_proj, down_proj
and act_fn whose forward does nothing but down(act(gate(x)) up(x)): a copy of the module with tiny layers in place of
the three is called to see that, so names alone decide nothing. No source text is read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pegbox_lora_kernels.layers import is_adapted

if TYPE_CHECKING:
    from torch.nn import Module

QKV = ("q_proj", "k_proj", "v_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "gelu": nn.functional.gelu,
}
"""What the kernels compute, by its name there."""


@dataclass(frozen=True)
class Blocks:
    """Full names of modules, by what they are.

    Attributes:
        attentions: names of adapted projections of queries, keys and values, by the attention they lie in.
        outputs: adapted output projections of attentions.
        mlps: the kernels' name of the activation, by the MLP.
        mlp_layers: adapted layers of MLPs that are not computed as a whole.
        others: every other adapted linear layer.
    """

    attentions: dict[str, tuple[str, ...]]
    outputs: tuple[str, ...]
    mlps: dict[str, str]
    mlp_layers: tuple[str, ...]
    others: tuple[str, ...]


def find(module: Module) -> Blocks:
    """The blocks of a network, and the adapted linear layers that are in none."""
    left = {name: None for name, part in module.named_modules() if is_adapted(part)}
    attentions: dict[str, tuple[str, ...]] = {}
    outputs: list[str] = []
    mlps: dict[str, str] = {}
    mlp_layers: list[str] = []
    for name, part in module.named_modules():
        children = dict(part.named_children())
        within = [child for child in children if _join(name, child) in left]
        full = [_join(name, child) for child in within]
        if within and children.keys() >= set(QKV):
            attentions[name] = tuple(one for child, one in zip(within, full, strict=True) if child in QKV)
            outputs += [one for child, one in zip(within, full, strict=True) if child not in QKV]
        elif within and children.keys() >= set(MLP):
            activation = activation_of(part) if all(_is_served(children[child]) for child in MLP) else None
            whole = [one for child, one in zip(within, full, strict=True) if activation is not None and child in MLP]
            if activation is not None and whole:
                mlps[name] = activation
            mlp_layers += [one for one in full if one not in whole]
        else:
            continue
        for one in full:
            del left[one]
    groups = {name: parts for name, parts in attentions.items() if parts}
    return Blocks(groups, tuple(outputs), mlps, tuple(mlp_layers), tuple(left))


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _is_served(part: Module) -> bool:
    """An adapted layer, or a plain linear one that is frozen."""
    return is_adapted(part) or (type(part) is nn.Linear and not part.weight.requires_grad)


def activation_of(module: Module) -> str | None:
    """The kernels' name of an MLP's activation; None if they have none, or if it is no gated MLP of the plain kind."""
    act = getattr(module, "act_fn", None)
    if not callable(act):
        return None
    probe = torch.linspace(-4, 4, 33)
    try:
        values = act(probe)
    except Exception:
        return None
    for name, function in ACTIVATIONS.items():
        if isinstance(values, Tensor) and torch.allclose(values, function(probe), rtol=1e-6, atol=1e-6):
            return name if _is_gated(module, function) else None
    return None


def _is_gated(module: Module, act: Callable[[Tensor], Tensor]) -> bool:
    """Whether the forward is down(act(gate(x)) up(x)): called on a copy whose three layers are tiny."""
    x, stands_in = torch.linspace(-2, 3, 24).view(2, 4, 3), dict(zip(MLP, _tiny(), strict=True))
    shallow: Any = copy.copy(module)
    shallow.__dict__["_modules"] = {**module._modules, **stands_in}
    shallow.__dict__.pop("forward", None)
    try:
        with torch.no_grad():
            found = type(module).forward(shallow, x)
    except Exception:
        return False
    gate, up, down = stands_in.values()
    with torch.no_grad():
        expected = down(act(gate(x)) * up(x))
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    return torch.allclose(found.float(), expected, rtol=1e-5, atol=1e-6)


def _tiny() -> Iterator[nn.Linear]:
    """Three small layers of different weights, large enough to reach clamps."""
    for rows, columns, spread in ((5, 3, 3.0), (5, 3, -7.0), (3, 5, 2.0)):
        layer = nn.Linear(columns, rows, bias=False, device="meta")
        layer.weight = nn.Parameter(torch.linspace(-1, spread, rows * columns).sin().mul(4).view(rows, columns))
        yield layer
