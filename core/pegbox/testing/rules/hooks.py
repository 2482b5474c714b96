"""How a plugin implements hooks."""

from __future__ import annotations

from pegbox.errors import PluginError
from pegbox.testing.rule import RuleBroken, require
from pegbox.testing.subject import Subject


def keeps_the_rules_of_hooks(subject: Subject) -> None:
    """The kernel activates the plugin: its hooks exist and are marked, arguments are known and have no default."""
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
