"""`pegbox plugins`: every installed plugin, from metadata and without an import; and a package to begin a new one."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    invoke_without_command=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="List installed plugins, or make a new one.",
)


@app.callback()
def plugins(ctx: typer.Context, json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List installed plugins, or make a new one."""
    if ctx.invoked_subcommand is None:
        show_plugins(as_json=json)


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Name of the plugin, its key in configs: my-reward")],
    hook: Annotated[str, typer.Option(help="The hook it implements: score_rollouts")],
    folder: Annotated[str, typer.Option(help="Where to make the package.")] = ".",
) -> None:
    """Make a plugin package that installs and passes the conformance kit."""
    from pegbox.scaffold import make_plugin

    typer.echo(make_plugin(name, hook, folder))


def show_plugins(*, as_json: bool) -> None:
    """Print every installed plugin, importing none."""
    from pegbox.discovery import discover

    found = [plugin for candidates in discover().values() for plugin in candidates]
    if as_json:
        from json import dumps

        shown = ("name", "value", "distribution", "version", "requires")
        print(dumps([{key: getattr(plugin, key) for key in shown} for plugin in found], indent=1))
    else:
        from pegbox.render import print_tables

        rows = [(plugin.name, str(plugin), plugin.value) for plugin in sorted(found, key=lambda plugin: plugin.name)]
        print_tables([("Installed plugins (active only in runs that list them)", ("plugin", "from", "object"), rows)])
