"""`pegbox data`: look at rows as the model will see them, or tokenize them ahead of a run."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Look at the rows of a config, or tokenize them ahead of a run.",
)

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or recipe://NAME.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example: data.limit=100")]


@app.command()
def inspect(
    config: Config,
    overrides: Overrides = None,
    split: Annotated[str, typer.Option(help="`train` or `eval`.")] = "train",
    rows: Annotated[int, typer.Option(min=1, help="How many rows to read.")] = 5,
    row: Annotated[int | None, typer.Option(min=1, help="Show this row only, counted from 1.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object for each row.")] = False,
) -> None:
    """Print rows with their trained tokens marked, and what the audit found; no model is loaded.

    Ends with exit code 2 if one of the rows would stop a run.
    """
    from pegbox_data.inspecting import inspected
    from pegbox_data.viewing import shown_rows

    seen = inspected(config, overrides or [], split, rows, row)
    raise typer.Exit(2 if shown_rows(seen, as_json=json) else 0)


@app.command()
def build(config: Config, overrides: Overrides = None) -> None:
    """Tokenize what a run of this config will need; no model is loaded and no GPU is used."""
    from pegbox.render import log_to_terminal

    from pegbox_data.building import build as build_rows

    log_to_terminal(0)
    typer.echo(build_rows(config, overrides or []))
