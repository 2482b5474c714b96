"""What an installed plugin says of itself: its hooks, its section of the config, its items, its distribution."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

import typer
from pegbox import hooks
from pegbox.discovery import discover
from pegbox.errors import PegboxError, PluginError
from pegbox.kernel import Implementation, Kernel
from pegbox.types import Item


@dataclass(frozen=True)
class Described:
    """One plugin. `schema` is the JSON schema of its section, or None if it declares none."""

    name: str
    distribution: str
    implementations: tuple[Implementation, ...]
    schema: Mapping[str, Any] | None
    items: tuple[Item, ...]

    @property
    def summary(self) -> str:
        return summary(self.distribution)

    def formats(self, hook: str) -> str:
        """The formats that this plugin handles in a hook with one owner for each format."""
        kind = {"load_model": "model_format", "export_model": "export_format"}.get(hook)
        return ", ".join(item.name for item in self.items if item.kind == kind)


@dataclass(frozen=True)
class Package:
    """A package folder of a checkout: what its pyproject.toml declares."""

    folder: Path
    distribution: str
    plugins: tuple[str, ...]
    commands: tuple[str, ...]


def describe(name: str) -> Described:
    """Activate one plugin alone and ask what it declares; a plugin that keeps the rules imports nothing heavy here."""
    kernel = Kernel.activate([name], Path())
    active, schema = kernel.active[name], kernel.schemas().get(name)
    items = [item for _, declared in kernel.each(hooks.register_items) for item in declared]
    return Described(
        name=name,
        distribution=active.origin.distribution,
        implementations=active.implementations,
        schema=schema.model_json_schema() if schema else None,
        items=tuple(items),
    )


def describe_all() -> list[Described]:
    """Every installed plugin that can be activated; one that cannot is what `pegbox doctor` explains."""
    described = []
    for name in sorted(discover()):
        try:
            described.append(describe(name))
        except PegboxError as error:
            typer.echo(f"left out: {error.what}. Type: pegbox doctor", err=True)
    return described


def summary(distribution: str) -> str:
    """The one-line description of a distribution."""
    try:
        text = str(metadata(distribution)["Summary"] or "")
    except (PackageNotFoundError, KeyError):
        return ""
    return text.removeprefix("Pegbox plugin: ").rstrip(".")


def packages_in(folders: Sequence[Path]) -> list[Package]:
    """The packages that lie directly below the folders, sorted."""
    found = []
    for file in sorted(file for folder in folders for file in folder.glob("*/pyproject.toml")):
        project = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {})
        groups = project.get("entry-points", {})
        plugins, commands = (tuple(sorted(groups.get(group, {}))) for group in ("pegbox", "pegbox.commands"))
        found.append(Package(file.parent, project.get("name", ""), plugins, commands))
    return found


def plugins_of(packages: Sequence[Package]) -> list[Described]:
    """The plugins of these packages, all of which must be installed; sorted by name."""
    installed = discover()
    for package in packages:
        for name in package.plugins:
            if name not in installed:
                raise PluginError(
                    f"plugin '{name}' of {package.folder} is not installed",
                    "Its page is made from what the installed plugin declares.",
                    f"Type: pip install -e {package.folder}",
                )
    return [describe(name) for name in sorted(name for package in packages for name in package.plugins)]
