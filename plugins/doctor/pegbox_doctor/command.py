"""`pegbox doctor`: every check in order, then the report. Exit code 0: no problem found; 1: problems."""

from __future__ import annotations

from typing import Annotated

import typer

ConfigArgument = Annotated[
    str | None, typer.Argument(metavar="[CONFIG]", help="A config; says also what would stop its run.")
]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example: output=runs/second")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def doctor(config: ConfigArgument = None, overrides: OverridesArgument = None, json: JsonOption = False) -> None:
    """Say what is installed, what this machine can do, and what would stop a run; without network."""
    from pegbox_doctor.visit import examine

    report = examine(config, overrides or [])
    if json:
        from json import dumps

        typer.echo(dumps(report.to_json(), indent=1))
    else:
        typer.echo(report.to_text())
    raise typer.Exit(1 if report.problems else 0)
