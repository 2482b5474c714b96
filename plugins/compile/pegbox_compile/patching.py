"""Compiled forwards as patch records.

Layer by layer is the default: the layers of a network share one compiled graph, so compiling takes the time of one
layer, and a graph never spans what other plugins do between layers. torch lifts parameters to inputs of the graph,
which is what lets layers share it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from pegbox.errors import ConfigError, did_you_mean
from pegbox.types import ModulePatch

if TYPE_CHECKING:
    from pegbox.types import Model
    from torch.nn import Module

    from pegbox_compile.config import CompileConfig

SOURCE = "Ansel et al., PyTorch 2, ASPLOS 2024"


def check(config: CompileConfig) -> None:
    """Raise unless torch has this backend and these options.

    Raises:
        ConfigError: with the nearest names.
    """
    backends = torch.compiler.list_backends(exclude_tags=())
    if config.backend not in backends:
        raise ConfigError(
            f"compile.backend is '{config.backend}', which torch {torch.__version__} does not have",
            did_you_mean(config.backend, backends, "It has:"),
            "Correct compile.backend.",
        )
    if config.options:
        from torch._inductor import list_options

        known = list_options()
        for name in config.options:
            if name not in known:
                near = did_you_mean(name, known)
                raise ConfigError(
                    f"compile.options has '{name}', which inductor does not have",
                    near if near.startswith("Did") else f"It has {len(known)} others.",
                    "Correct compile.options.",
                )


def patches(config: CompileConfig, model: Model) -> list[ModulePatch]:
    """The record for one model.

    Raises:
        ConfigError: the model has no layers that are seen.
    """
    layers = _layer_list(model.module)
    if layers is None:
        raise ConfigError(
            f"compile finds no layers in {model.name}",
            "Layers are the members of the largest list of modules.",
            "Remove compile from plugins.",
        )
    name, members = layers
    ends = len(members) if config.scope == "layers" else 1
    inside = {f"{name}.{index}" if name else str(index) for index in range(len(members))}
    targets = inside if config.scope == "layers" else {name.rpartition(".")[0]}
    return [
        ModulePatch(
            slot="compile",
            target=lambda path, _: path in targets,
            replace=lambda module: _compiled(config, module),
            reason=f"{ends} module{'s' if ends > 1 else ''} compiled with {config.backend}",
            source=SOURCE,
        )
    ]


def forget_earlier_runs() -> None:
    """Drop what an earlier run of this process compiled.

    torch finds graphs by their code and does not look at hooks again: the new run would execute graphs without the
    hooks that count calls of patched modules, and stop because nothing was counted.
    """
    torch._dynamo.reset()


def no_model(config: CompileConfig) -> ConfigError:
    """Training begins, and none of the models it uses has a role that is compiled."""
    return ConfigError(
        f"compile.roles is {', '.join(config.roles)}, and this run has no such model",
        "Nothing would be compiled.",
        "Add policy, the model that is trained, to compile.roles, or remove compile from plugins.",
    )


def _layer_list(module: Module) -> tuple[str, Module] | None:
    """The outermost list of modules that holds the most parameters, with its name."""
    lists = [
        (name, part) for name, part in module.named_modules() if isinstance(part, torch.nn.ModuleList) and len(part)
    ]
    if not lists:
        return None
    return max(lists, key=lambda item: (sum(p.numel() for p in item[1].parameters()), -len(item[0])))


def _compiled(config: CompileConfig, module: Module) -> Callable[..., Any]:
    plain = module.forward
    compiled: Callable[..., Any] = torch.compile(
        plain,
        backend=config.backend,
        mode=config.mode,
        dynamic=config.dynamic,
        fullgraph=config.fullgraph,
        options=dict(config.options) or None,
    )

    def forward(*args: Any, **kwargs: Any) -> Any:
        # A cache grows with each token and knows the number of its layer: generating would compile each layer anew
        # until torch gives up on all of them, for training too.
        if kwargs.get("use_cache") or kwargs.get("past_key_values") is not None:
            return plain(*args, **kwargs)
        return compiled(*args, **kwargs)

    return forward
