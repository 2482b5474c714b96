"""`pegbox convert FILE`: what the command line says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

FileArgument = Annotated[
    Path,
    typer.Argument(metavar="FILE", help="A YAML or JSON config, or a file with a command line `trl dpo ...`."),
]
FromOption = Annotated[
    str,
    typer.Option(
        "--from",
        help="axolotl, trl (or trl:dpo, trl:grpo ...), oumi, llamafactory, or auto: the one whose typical keys it has.",
    ),
]
OutputOption = Annotated[Path | None, typer.Option(help="File for the new config; printed unless given.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print config and report as JSON.")]
StrictOption = Annotated[bool, typer.Option("--strict", help="Exit code 1 if a key is unknown or not supported yet.")]


def convert(
    file: FileArgument,
    program: FromOption = "auto",
    output: OutputOption = None,
    json: JsonOption = False,
    strict: StrictOption = False,
) -> None:
    """Turn a config of Axolotl, TRL, Oumi or LLaMA-Factory into one of Pegbox, and report every key."""
    from pegbox.errors import ConfigError

    from pegbox_convert.converting import convert_file
    from pegbox_convert.report import to_json, to_text

    if output is not None and output.exists():
        raise ConfigError(
            f"{output} is there already", "A config is never overwritten.", "Choose another --output, or remove it."
        )
    converted = convert_file(file, program, output.parent if output else None)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(converted.text, encoding="utf-8")
    if json:
        from json import dumps

        report = to_json(converted.entries, converted.title, converted.config, converted.notes)
        typer.echo(dumps(report, indent=1, default=str))
    else:
        if output is None:
            typer.echo(converted.text)
        typer.echo(to_text(converted.entries, converted.title, converted.notes), err=output is None)
        if output is not None:
            typer.echo(f"Written to {output}")
    raise typer.Exit(1 if strict and (converted.unsupported or not converted.valid) else 0)
