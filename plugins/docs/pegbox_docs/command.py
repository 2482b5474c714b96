"""`pegbox docs`: the reference in the terminal and as pages; `pegbox schema`: configs as JSON schema, for editors."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

NameArgument = Annotated[
    str | None,
    typer.Argument(metavar="[NAME]", help="A hook, a plugin, config, types, errors, commands, or one of these."),
]
WriteOption = Annotated[
    Path | None, typer.Option("--write", metavar="FOLDER", help="Write the reference as pages into FOLDER.")
]
ReadmeOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--readme",
        metavar="FOLDER",
        help="The same, and fill the config tables in the READMEs of these packages.",
    ),
]
PackagesOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--packages", metavar="FOLDER", help="Let the pages cover the packages in FOLDER; may be given several times."
    ),
]
CheckOption = Annotated[bool, typer.Option("--check", help="Write nothing; exit 1 and name the files that differ.")]
PluginsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[PLUGIN]...", help="Default: all that are installed.")
]


def docs(
    name: NameArgument = None,
    write: WriteOption = None,
    packages: PackagesOption = None,
    readme: ReadmeOption = None,
    check: CheckOption = False,
) -> None:
    """Show the reference of a hook, a plugin or an error; or write all of it as pages."""
    from pegbox.errors import ConfigError

    if write or readme:
        if name:
            raise ConfigError(
                f"'{name}' cannot be written alone", "Pages are written all together.", "Leave the name out."
            )
        _write(write, packages or [], readme or [], check)
    elif check:
        raise ConfigError(
            "--check has nothing to compare",
            "It compares pages with the code.",
            "Type: pegbox docs --write FOLDER --check",
        )
    else:
        from pegbox_docs.book import contents

        _print(topic(name) if name else contents())


def schema(plugins: PluginsArgument = None) -> None:
    """Print the JSON schema of configs with these plugins, for editors."""
    import json

    from pegbox_docs.schema import config_schema

    typer.echo(json.dumps(config_schema(plugins or None), indent=1))


def topic(name: str) -> str:
    """The reference of one thing, as markdown."""
    from pegbox.discovery import discover
    from pegbox.errors import ConfigError, catalog, did_you_mean
    from pegbox.hooks import SPECS

    from pegbox_docs import book, command_pages, error_pages, hook_pages, type_pages
    from pegbox_docs.installed import describe, describe_all

    whole = {"errors": error_pages.page, "types": type_pages.page, "commands": command_pages.page}
    if name in SPECS:
        return hook_pages.page(name, describe_all())
    if name in discover():
        return book.section_page(describe(name))
    if name == "config":
        return book.core_keys_page(describe_all())
    if name in whole:
        return whole[name]()
    if name in catalog():
        return error_pages.section(name)
    if name in type_pages.documented_types():
        return type_pages.section(name)
    if name in command_pages.command_names():
        return command_pages.section(name)
    known = [*SPECS, *discover(), "config", *whole, *catalog(), *type_pages.documented_types()]
    hint = did_you_mean(name, known) if _near(name, known) else "It is no hook, plugin, command, error or type."
    raise ConfigError(f"there is no reference of '{name}'", hint, "Type: pegbox docs   for all names")


def _near(name: str, known: list[str]) -> bool:
    from pegbox.errors import nearest

    return bool(nearest(name, known))


def _write(folder: Path | None, package_folders: list[Path], readme_folders: list[Path], check: bool) -> None:
    from pegbox_docs.book import differing, wanted_files, write

    files = wanted_files(folder, package_folders, readme_folders)
    if not check:
        for path in write(files):
            typer.echo(f"wrote {path}" if path.exists() else f"removed {path}")
        return
    different = differing(files)
    if different:
        for path in different:
            typer.echo(f"differs: {path}", err=True)
        options = [("--write", folder) if folder else None]
        options += [("--packages", packages) for packages in package_folders]
        options += [("--readme", readmes) for readmes in readme_folders]
        command = " ".join(f"{option[0]} {option[1]}" for option in options if option)
        typer.echo(f"{len(different)} files are not what the code says. Type: pegbox docs {command}", err=True)
        raise typer.Exit(1)


def _print(markdown: str) -> None:
    """Show markdown: rendered on a terminal, as it is elsewhere; links between pages are of no use here."""
    text = re.sub(r"\[([^\]]+)\]\([^)\s]+\)", r"\1", markdown)
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(text))
    else:
        typer.echo(text)
