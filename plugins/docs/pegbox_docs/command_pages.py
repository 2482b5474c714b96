"""The command line as a page: the help of each command, the core's first."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

import typer
from pegbox.cli import app
from pegbox.errors import ConfigError, did_you_mean

WIDTH = 100


def command_names(own: Sequence[str] | None = None) -> list[str]:
    """Commands of the core, then those of plugins: the given ones, or all that are installed."""
    core = typer.main.get_command(app).list_commands(None)  # type: ignore[attr-defined]
    of_plugins = own if own is not None else [entry.name for entry in entry_points(group="pegbox.commands")]
    return [*core, *sorted(set(of_plugins) - set(core))]


def page(own: Sequence[str] | None = None) -> str:
    """All commands on one page."""
    intro = "# Commands\n\nExit codes: 0 done, 1 the run failed or a check found something, 2 the input is wrong."
    return "\n\n".join([intro, *(section(name) for name in command_names(own))])


def section(name: str) -> str:
    """The help of one command, and of the commands inside it."""
    group: Any = typer.main.get_command(app)
    command = group.get_command(None, name)
    if command is None:
        raise ConfigError(f"there is no command '{name}'", did_you_mean(name, command_names(), "Commands:"))
    helps = [_help(command, f"pegbox {name}")]
    for inner in getattr(command, "commands", {}):
        helps.append(_help(command.commands[inner], f"pegbox {name} {inner}"))
    return f"## pegbox {name}\n\n" + "\n\n".join(f"```text\n{text}\n```" for text in helps)


def _help(command: Any, path: str) -> str:
    options = {"resilient_parsing": True, "terminal_width": WIDTH, "max_content_width": WIDTH}
    with command.make_context(path, [], **options) as ctx:
        return "\n".join(line.rstrip() for line in command.get_help(ctx).strip().splitlines())
