"""The patch records: groups of projections, whole MLPs, and single layers.

slot `qkv`     an attention, and the adapted ones among its q_proj, k_proj, v_proj
slot `mlp`     a gated MLP as a whole; other plugins that replace it use the same slot, and both is an error
slot `linear`  an adapted layer by itself
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pegbox.errors import ConfigError, PluginError
from pegbox.types import ModulePatch
from pegbox_kernels.lora_linear import lora_mlp

from pegbox_lora_kernels.blocks import MLP, Blocks, find
from pegbox_lora_kernels.layers import is_adapted, objection, read, require_arithmetic
from pegbox_lora_kernels.shared import SharedInput, alone

if TYPE_CHECKING:
    from pegbox.types import Model
    from torch import Tensor
    from torch.nn import Module

    from pegbox_lora_kernels.config import LoraKernelsConfig

SOURCE = "arXiv:2106.09685"
SHOWN = 5


def patches(config: LoraKernelsConfig, model: Model) -> list[ModulePatch]:
    """The records for one adapted model.

    Raises:
        ConfigError: nothing is adapted, a part that is switched on has nothing, or holds a layer without a kernel.
    """
    blocks = find(model.module)
    _require_something(config, model, blocks)
    named = dict(model.module.named_modules())
    groups = blocks.attentions if config.qkv else {}
    mlps = blocks.mlps if config.mlp else {}
    single = [
        *(blocks.outputs if config.o else ()),
        *(blocks.mlp_layers if config.mlp else ()),
        *(blocks.others if config.other else ()),
    ]
    members = [full for parts in groups.values() for full in parts]
    inside = [full for name in mlps for child in MLP if is_adapted(named[full := f"{name}.{child}"])]
    _require_kernels(named, (*members, *inside, *single))
    _require_unpatched(named, inside)
    records = _of_groups(groups, named) + _of_mlps(config, mlps)
    if single:
        reason = f"{len(single)} adapted layers: the update is added by the product of the base"
        records.append(_record("linear", single, _single, reason))
    return records


def _record(slot: str, names: Iterable[str], replace: Callable[[Module], Any], reason: str) -> ModulePatch:
    wanted = frozenset(names)
    return ModulePatch(slot=slot, target=lambda name, _: name in wanted, replace=replace, reason=reason, source=SOURCE)


def _of_groups(groups: dict[str, tuple[str, ...]], named: dict[str, Module]) -> list[ModulePatch]:
    """Attentions whose projections are computed together; one that is adapted alone has nothing to share."""
    records = [
        _record("linear", [parts[0]], _single, "an adapted projection of an attention that has no other")
        for parts in groups.values()
        if len(parts) == 1
    ]
    together = {name: parts for name, parts in groups.items() if len(parts) > 1}
    if not together:
        return records
    shared = {name: SharedInput(name, {part: named[part] for part in parts}) for name, parts in together.items()}
    by_identity = {id(named[name]): one for name, one in shared.items()}
    by_part = {id(named[part]): (shared[name], part) for name, parts in together.items() for part in parts}

    def projection(module: Module) -> Callable[..., Any]:
        one, name = by_part[id(module)]
        return one.of(name)

    reason = f"projections of {len(together)} attentions: one product of their input with all their factors"
    records.append(_record("qkv", (part for parts in together.values() for part in parts), projection, reason))
    records.append(
        _record("qkv", together, lambda attention: by_identity[id(attention)].around(attention), f"{reason}; its scope")
    )
    return records


def _of_mlps(config: LoraKernelsConfig, mlps: dict[str, str]) -> list[ModulePatch]:
    """One record for each activation."""
    records = []
    for activation in sorted(set(mlps.values())):
        names = [name for name, own in mlps.items() if own == activation]
        replace = partial(_mlp, activation=activation, keep=config.mlp_keeps)
        reason = f"{len(names)} MLPs ({activation}): updates of gate and up are added inside the activation's kernel"
        records.append(_record("mlp", names, replace, reason))
    return records


def _mlp(module: Module, activation: str, keep: str) -> Callable[..., Any]:
    original = module.forward
    layers = [getattr(module, child) for child in MLP]

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        gate, up, down = (None, None, None) if args or kwargs else (read(layer) for layer in layers)
        if gate is None or up is None or down is None:
            return original(x, *args, **kwargs)
        for layer in layers:
            require_arithmetic(layer, x)
        return lora_mlp(x, gate, up, down, activation=activation, keep=keep)

    return forward


def _single(layer: Module) -> Callable[..., Any]:
    original = layer.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(x, *args, **kwargs) if args or kwargs else alone(layer, original, x)

    return forward


def _require_something(config: LoraKernelsConfig, model: Model, blocks: Blocks) -> None:
    mlp = (*blocks.mlps, *blocks.mlp_layers)
    found = {"qkv": blocks.attentions, "o": blocks.outputs, "mlp": mlp, "other": blocks.others}
    if not any(found.values()):
        raise ConfigError(
            f"lora-kernels is in plugins, but {model.name} has no adapted linear layer",
            "It computes layers that LoRA adapts, and there are none.",
            "Add lora to plugins, or remove lora-kernels.",
        )
    idle = [part for part in config.model_fields_set & found.keys() if getattr(config, part) and not found[part]]
    if idle or not any(getattr(config, part) and things for part, things in found.items()):
        have = ", ".join(f"{part} ({len(things)})" for part, things in found.items() if things)
        raise ConfigError(
            f"lora-kernels.{idle[0]} is true, but {model.name} has nothing adapted of that kind"
            if idle
            else "lora-kernels has every part switched off that this model has",
            f"Adapted here: {have}.",
            "Correct lora-kernels or lora.targets.",
        )


def _require_kernels(named: dict[str, Module], names: Sequence[str]) -> None:
    against = {name: reason for name in names if (reason := objection(named[name])) is not None}
    if against:
        first = next(iter(against))
        raise ConfigError(
            f"lora-kernels cannot compute {len(against)} adapted layers, such as {first}: {against[first]}",
            f"Named: {', '.join(list(against)[:SHOWN])}{' and more' if len(against) > SHOWN else ''}.",
            "Switch off the part of lora-kernels they belong to (qkv, o, mlp, other), or remove lora-kernels.",
        )


def _require_unpatched(named: dict[str, Module], names: Sequence[str]) -> None:
    """A layer inside an MLP is not called any more: what hangs on it would be lost."""
    for name in names:
        layer = named[name]
        if "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks:
            raise PluginError(
                f"{name} has a hook or a forward of its own, and lora-kernels computes the MLP around it",
                "It would not be called any more.",
                "Set lora-kernels.mlp to false, or remove the plugin that changed it.",
            )
