"""Which modules are sharded as one: the decoder layers of a network, found by the class that its library names.

transformers says of each architecture which classes must stay together (`_no_split_modules`); where nothing is said, or
a patch gave a layer another class, the layers are the members of the largest list of modules.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pegbox.errors import ConfigError
from torch import nn

if TYPE_CHECKING:
    from pegbox.types import Model

    from pegbox_fsdp.config import FsdpConfig


def layers_of(settings: FsdpConfig, model: Model) -> dict[str, nn.Module]:
    """The modules to shard by name, inner ones before those around them.

    Raises:
        ConfigError: none are found, or one weight is in several of them.
    """
    names = {
        name: part for name, part in model.module.named_modules() if name and next(part.parameters(), None) is not None
    }
    if settings.layers is not None:
        found = {name: part for name, part in names.items() if re.fullmatch(settings.layers, name)}
    else:
        found = _by_class(model.module, names) or _largest_list(names)
    if not found:
        ends = sorted({type(part).__name__ for part in names.values()})
        raise ConfigError(
            f"fsdp.layers {settings.layers!r} matches nothing in {model.name}"
            if settings.layers is not None
            else f"fsdp finds no layers in {model.name}",
            f"It has modules of these classes: {', '.join(ends)}.",
            r"Set fsdp.layers to an expression that matches whole names, such as .*\.layers\.\d+",
        )
    ordered = dict(reversed(found.items()))
    _refuse_shared(ordered)
    return ordered


def _by_class(module: nn.Module, names: dict[str, nn.Module]) -> dict[str, nn.Module]:
    classes = {name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    return {name: part for name, part in names.items() if type(part).__name__ in classes}


def _largest_list(names: dict[str, nn.Module]) -> dict[str, nn.Module]:
    lists = {name: part for name, part in names.items() if isinstance(part, nn.ModuleList)}
    if not lists:
        return {}
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in lists.items()}
    largest = max(sizes, key=lambda name: (sizes[name], -len(name)))
    return {f"{largest}.{at}": part for at, part in lists[largest].named_children()}


def _refuse_shared(layers: dict[str, nn.Module]) -> None:
    """Raise if a weight is in two layers of which neither contains the other."""
    owner: dict[int, str] = {}
    for name, part in layers.items():
        for parameter in part.parameters():
            first = owner.setdefault(id(parameter), name)
            if first != name and not first.startswith(f"{name}."):
                raise ConfigError(
                    f"{first} and {name} share a weight",
                    "A weight is sharded once, with the one module that gathers it.",
                    "Name a module around both in fsdp.layers.",
                )
