"""Which modules are recomputed or offloaded, as patch records.

A patched module's forward keeps its inputs only; the backward calls it again (Chen et al. 2016, arXiv:1604.06174).
Evaluation and generation are left alone: nothing is kept there.

The reentrant way of torch runs a backward inside the backward, and sees no gradient at all if none of a module's inputs
wants one. Under an adapter with frozen embeddings that is the case for every layer, and nothing would be trained; so
the embeddings' output is made to want one. The non-reentrant way, the default, needs none of this.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from pegbox.errors import ConfigError
from pegbox.types import ModulePatch
from torch.utils.checkpoint import checkpoint

from pegbox_activations.attention import AttentionKeeper
from pegbox_activations.auto import AutoPolicy
from pegbox_activations.gauge import no_budget
from pegbox_activations.offload import Offload

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model
    from torch.nn import Module

    from pegbox_activations.config import ActivationsConfig

SOURCE = "arXiv:1604.06174"


def patches(config: ActivationsConfig, model: Model, keeper: AttentionKeeper) -> list[ModulePatch]:
    """The records for one model; `keeper` keeps what attention returned, if that is asked for.

    Raises:
        ConfigError: nothing matches, there are fewer layers than asked for, or modules lie inside each other.
    """
    names = frozenset(_chosen(config, model))
    offload = Offload(config.offload_min_bytes) if config.offload == "cpu" else None
    attention = " and what attention returned" if config.keep == "attention" else " only"
    what = f"keep their inputs{attention}" if config.policy != "none" else "keep what they keep"
    records = [
        ModulePatch(
            slot="recompute",
            target=lambda name, _: name in names,
            replace=lambda module: _forward(config, module, offload, keeper),
            reason=f"{len(names)} modules {what}{' in host memory' if offload else ''}",
            source=SOURCE if config.policy != "none" else "",
        )
    ]
    embeddings = _frozen_embeddings(model) if config.reentrant else None
    if embeddings is not None:
        records.append(
            ModulePatch(
                slot="input_gradients",
                target=lambda _, module: module is embeddings,
                replace=_with_gradient,
                reason="reentrant recomputing trains nothing behind inputs that want no gradient",
            )
        )
    return records


def auto_patches(config: ActivationsConfig, model: Model) -> tuple[list[ModulePatch], AutoPolicy]:
    """The record for a model whose layers keep what fits, and what decides it.

    Raises:
        ConfigError: the model has no layers that are seen.
    """
    names = _chosen(config, model)
    layers = [model.module.get_submodule(name) for name in names]
    auto = AutoPolicy(config, model.module, layers)
    places = {id(layer): at for at, layer in enumerate(layers)}
    record = ModulePatch(
        slot="recompute",
        target=lambda name, module: id(module) in places,
        replace=lambda module: _auto_forward(auto, places[id(module)], module),
        reason=f"of {len(names)} layers as many keep everything as fit in memory; the others are computed again",
        source=SOURCE,
    )
    return [record], auto


def layer_names(module: Module) -> list[str]:
    """The layers of a network: the outermost list of modules that holds the most parameters."""
    lists = {name: part for name, part in module.named_modules() if isinstance(part, torch.nn.ModuleList) and len(part)}
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in lists.items()}
    if not sizes:
        return []
    largest = max(sizes, key=lambda name: (sizes[name], -len(name)))
    return [f"{largest}.{index}" if largest else str(index) for index in range(len(lists[largest]))]


def _chosen(config: ActivationsConfig, model: Model) -> Sequence[str]:
    if config.modules is not None:
        names = [name for name, _ in model.module.named_modules() if re.fullmatch(config.modules, name)]
        inside = next((f"{one} lies in {o}" for one in names for o in names if one.startswith(f"{o}.")), None)
        if not names or inside:
            ends = sorted({name.rpartition(".")[2] for name in dict(model.module.named_modules()) if name})
            raise ConfigError(
                f"activations.modules {config.modules!r} "
                + (f"matches both: {inside}" if inside else "matches nothing"),
                f"Names of this model end in: {', '.join(end for end in ends if not end.isdigit())}.",
                r"Write an expression that matches whole names, such as .*\.mlp",
            )
        return names
    layers = layer_names(model.module)
    count = config.policy if isinstance(config.policy, int) else len(layers)
    if not layers or count > len(layers):
        raise ConfigError(
            f"activations.policy asks for {count or 'all'} layers, but {model.name} has {len(layers)} that are seen",
            "Layers are the members of the largest list of modules.",
            "Lower activations.policy, set it to full, or name modules by activations.modules.",
        )
    return [layers[index * len(layers) // count] for index in range(count)]


def _auto_forward(auto: AutoPolicy, index: int, module: Module) -> Callable[..., Any]:
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not (module.training and torch.is_grad_enabled()):
            return original(*args, **kwargs)
        return auto.run(index, original, args, kwargs)

    return forward


def _forward(
    config: ActivationsConfig, module: Module, offload: Offload | None, keeper: AttentionKeeper
) -> Callable[..., Any]:
    original = module.forward
    recompute = config.policy != "none"
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": config.preserve_rng}
    if config.keep == "attention":
        options["context_fn"] = keeper.contexts

    def kept_small(*args: Any, **kwargs: Any) -> Any:
        if not recompute:
            return original(*args, **kwargs)
        if config.reentrant:
            # Gradients of keyword arguments would be lost: torch follows positional ones only.
            if any(isinstance(value, torch.Tensor) and value.requires_grad for value in kwargs.values()):
                raise ConfigError(
                    f"activations.reentrant is on, but {type(module).__name__} takes a keyword with a gradient",
                    "Reentrant recomputing would lose it.",
                    "Remove activations.reentrant.",
                )
            call = partial(original, **kwargs)
            return checkpoint(call, *args, use_reentrant=True, preserve_rng_state=config.preserve_rng)
        return checkpoint(original, *args, **options, **kwargs)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not (module.training and torch.is_grad_enabled()):
            return original(*args, **kwargs)
        if offload is None:
            return kept_small(*args, **kwargs)
        with offload.of(module):
            return kept_small(*args, **kwargs)

    return forward


def _frozen_embeddings(model: Model) -> Module | None:
    ask = getattr(model.module, "get_input_embeddings", None)
    embeddings: Module | None = ask() if ask is not None else None
    if embeddings is None or any(parameter.requires_grad for parameter in embeddings.parameters()):
        return None
    return embeddings


def _with_gradient(module: Module) -> Callable[..., Any]:
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        return output.requires_grad_() if module.training and torch.is_grad_enabled() else output

    return forward


def require_budget(config: ActivationsConfig, ctx: Context) -> None:
    """Raise if nobody can say how much memory there is; before a run there is no device to ask.

    Raises:
        ConfigError: it is not a CUDA device, and activations.memory_gib is not set.
    """
    runtime = vars(ctx).get("runtime")
    if runtime is not None and runtime.device.type != "cuda" and config.memory_gib is None:
        raise no_budget(runtime.device.type)


def require_kept(keeper: AttentionKeeper) -> None:
    """Raise if the first step kept nothing of attention.

    Raises:
        ConfigError: none of its operators was seen.
    """
    if not keeper.operators:
        raise ConfigError(
            "activations.keep is attention, but no operator of attention was seen that could be kept",
            "An eager attention has none, one with dropout draws random numbers, and some libraries register none.",
            "Remove activations.keep, or choose another attention, such as sdpa.",
        )
