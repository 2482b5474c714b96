"""The installed plugins, commands and recipes: whether each name is there once, and can be used."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import typer
from pegbox.discovery import Installed, discover, only
from pegbox.errors import PegboxError
from pegbox.kernel import Kernel

from pegbox_doctor.distributions import GROUPS
from pegbox_doctor.report import Report


def check_plugins(report: Report) -> None:
    """Activate each plugin alone, as a run that lists it would; import each command; find each recipe."""
    for name, found in sorted(discover().items()):
        if _is_one(report, "plugin", name, found):
            _check_plugin(report, found[0])
    for name, found in sorted(discover("pegbox.commands").items()):
        _is_one(report, "command", name, found)
        for command in found:
            _check_command(report, command)
    for name, found in sorted(discover("pegbox.recipes").items()):
        _is_one(report, "recipe", name, found)
        for recipe in found:
            _check_recipe(report, recipe)
    for group in GROUPS:
        _check_seen(report, group)


def _check_seen(report: Report, group: str) -> None:
    """Pegbox reads `*.dist-info` folders; what only another layout declares is not found by it."""
    seen = discover(group)
    for entry in entry_points(group=group):
        if entry.name not in seen:
            distribution = entry.dist.name if entry.dist else "its distribution"
            report.problem(
                f"'{entry.name}' of {distribution}, an entry point of {group}, is not seen by Pegbox",
                "It is installed without a dist-info folder: as an egg, or by a setup.py.",
                f"Type: pip install --force-reinstall {distribution}",
            )


def _check_plugin(report: Report, plugin: Installed) -> None:
    try:
        Kernel.activate([plugin.name], Path()).schemas()
    except PegboxError as error:
        report.problem_of(error)
    except (Exception, SystemExit) as error:
        report.problem(
            f"plugin '{plugin.name}' ({plugin}) fails when it is activated: {type(error).__name__}: {error}",
            "What it declares is asked for before a config is final.",
            f"Type: pip install --force-reinstall {plugin.distribution}   (or report it to its author)",
        )


def _is_one(report: Report, kind: str, name: str, found: list[Installed]) -> bool:
    try:
        only(name, found, kind)
    except PegboxError as error:
        report.problem_of(error)
    return len(found) == 1


def _check_command(report: Report, command: Installed) -> None:
    from pegbox.cli import app

    if command.name in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
        report.problem(
            f"the command '{command.name}' of {command} is hidden by the core's own",
            "The core's commands come first.",
            f"Ask the author of {command.distribution} for another name, or upgrade it.",
        )
    module, _, attribute = command.value.partition(":")
    try:
        target = getattr(importlib.import_module(module), attribute, None)
    except (Exception, SystemExit) as error:
        problem = f"{type(error).__name__}: {error}"
    else:
        problem = "" if callable(target) else f"{module} has no function {attribute}"
    if problem:
        report.problem(
            f"the command '{command.name}' of {command} cannot be loaded: {problem}",
            f"It failed while importing {command.value}.",
            f"Type: pip install --force-reinstall {command.distribution}",
        )


def _check_recipe(report: Report, recipe: Installed) -> None:
    package, _, file = recipe.value.partition(":")
    spec = find_spec(package) if package.isidentifier() else None
    places = list(spec.submodule_search_locations or ()) if spec else []
    if not any((Path(place) / file).is_file() for place in places):
        report.problem(
            f"the recipe '{recipe.name}' of {recipe} names {recipe.value}, which does not exist",
            "recipe://" + recipe.name + " would fail.",
            f"Type: pip install --force-reinstall {recipe.distribution}",
        )
