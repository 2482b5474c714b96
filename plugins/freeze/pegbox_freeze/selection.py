"""Which parameters are trained, by their names; what matches nothing, or changes nothing, is an error."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pegbox import hooks
from pegbox.errors import ConfigError, PluginError, UserError, did_you_mean

from pegbox_freeze.config import FreezeConfig

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pegbox.context import Context
    from pegbox.types import Model
    from torch.nn import Parameter

SHOWN = 12


def refuse_adapters(ctx: Context) -> None:
    """Raise if an adapter is applied as well: it freezes the whole base, and would undo what this plugin does.

    Raises:
        ConfigError: naming the plugin that applies it.
    """
    if ctx.owned(hooks.apply_adapters):
        owner = ctx.kernel.owners("apply_adapters")[""]
        raise ConfigError(
            f"the plugins freeze and {owner} are both listed",
            f"Under an adapter the whole base is frozen, so nothing that freeze lets train would be; {owner} decides.",
            "Remove freeze from plugins; an adapter plugin has settings of its own, such as lora.modules_to_save.",
        )


def select(ctx: Context, model: Model) -> None:
    """Let exactly the chosen parameters require gradients.

    Raises:
        UserError: an expression matches nothing, or freezes nothing, or nothing is left to train.
    """
    settings = ctx.section(FreezeConfig)
    named = names_of(model)
    every = [name for names, _ in named for name in names]
    for key in ("train", "freeze", "rows"):
        for expression in getattr(settings, key):
            if not any(re.search(expression, name) for name in every):
                raise matches_nothing(key, expression, every, model)
    idle = set(settings.freeze)
    for names, parameter in named:
        wanted = (not settings.train and bool(settings.freeze)) or _found(settings.train, names)
        stopped = {expression for expression in settings.freeze if _found([expression], names)}
        idle -= stopped if wanted and parameter.is_floating_point() else set()
        by_row = _found(settings.rows, names)
        if by_row and stopped:
            raise ConfigError(
                f"freeze.rows trains rows of {names[0]}, and freeze.freeze {sorted(stopped)[0]!r} freezes it",
                "Of one parameter, rows are trained or none is.",
                "Remove it from one of them.",
            )
        if parameter.is_floating_point():
            parameter.requires_grad_(by_row or (wanted and not stopped))
    if idle:
        raise UserError(
            f"freeze.freeze: {sorted(idle)[0]!r} freezes nothing that freeze.train lets train in {model.name}",
            "It would have no effect.",
            "Remove it, or correct freeze.train.",
        )
    if not any(parameter.requires_grad for _, parameter in named):
        raise UserError(
            f"freeze leaves nothing to train of the {len(named)} parameters of {model.name}",
            "A run needs something to learn.",
            "Correct freeze.train and freeze.freeze.",
        )


def names_of(model: Model) -> list[tuple[list[str], Parameter]]:
    """Each parameter with all its names: a tied head and its embeddings are one parameter with two names."""
    found: dict[int, tuple[list[str], Parameter]] = {}
    for name, parameter in model.module.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), ([], parameter))[0].append(name)
    return list(found.values())


def _found(expressions: Iterable[str], names: Iterable[str]) -> bool:
    return any(re.search(expression, name) for expression in expressions for name in names)


def report(ctx: Context, model: Model) -> None:
    """Say how much is trained, once.

    Raises:
        PluginError: an adapter was applied without an owner of `apply_adapters`.
    """
    if model.adapter is not None:
        raise PluginError(
            f"{model.name} has an adapter of format '{model.adapter}'",
            "Under an adapter the whole base is frozen, so nothing that freeze lets train is.",
            "Remove freeze from plugins.",
        )
    if ctx.runtime.rank == 0:
        parameters = list(model.module.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        sizes = sum(p.numel() for p in trained), sum(p.numel() for p in parameters)
        of = f"{len(trained)} of {len(parameters)} tensors"
        ctx.log.info("freeze: %s of %s parameters are trained, in %s", f"{sizes[0]:,}", f"{sizes[1]:,}", of)


def matches_nothing(key: str, expression: str, names: list[str], model: Model) -> UserError:
    general = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
    more = f" and {len(general) - SHOWN} more" if len(general) > SHOWN else ""
    words = {part for name in names for part in name.split(".") if not part.isdigit()}
    written = [part for part in re.split(r"[^\w]+", expression) if part and part not in words and not part.isdigit()]
    close = did_you_mean(written[-1], words) if written else ""
    return UserError(
        f"freeze.{key}: {expression!r} matches no parameter of {model.name}",
        close if close.startswith("Did") else "It would have no effect.",
        f"Parameters: {', '.join(general[:SHOWN])}{more}.",
    )
