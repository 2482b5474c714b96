"""How a plugin implements hooks."""

from __future__ import annotations

from pegbox.errors import PluginError
from pegbox.hooks import PROJECT, SPECS
from pegbox.testing.rule import RuleBroken, require
from pegbox.testing.subject import Subject


def keeps_the_rules_of_hooks(subject: Subject) -> None:
    """The kernel activates the plugin: hooks exist, arguments are known and have no default, no ordering options."""
    try:
        kernel = subject.activate()
    except PluginError as error:
        raise RuleBroken(
            f"activation fails: {error.what}",
            error.why or "A plugin that cannot be activated cannot be listed.",
            error.next or "Read the hook's specification in pegbox.hooks.",
        ) from error
    require(
        bool(kernel.active[subject.plugin].implementations),
        f"plugin '{subject.plugin}' implements no hook",
        "It would be listed, do nothing, and nobody would notice.",
        "Mark at least one method with @hookimpl from pegbox.hooks.",
    )


def marks_every_hook(subject: Subject) -> None:
    """A method that has a hook's name is marked; otherwise the kernel does not see it."""
    instance = subject.activate().active[subject.plugin].instance
    methods = [name for name in dir(type(instance)) if not name.startswith("_")]
    unmarked = [
        name for name in methods if name in SPECS and not hasattr(getattr(type(instance), name), f"{PROJECT}_impl")
    ]
    require(
        not unmarked,
        f"plugin '{subject.plugin}' has a method {', '.join(unmarked)} without @hookimpl",
        "A method that is not marked is never called, whatever its name.",
        "Write @hookimpl from pegbox.hooks above it.",
    )
