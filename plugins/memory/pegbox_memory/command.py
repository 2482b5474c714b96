"""`pegbox memory CONFIG`: what a run needs. Exit code 0: it fits or no device is known; 1: it does not fit."""

from __future__ import annotations

from typing import Annotated

import typer

ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or recipe://NAME.")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example: trainer.micro_batch=8")
]
DeviceOption = Annotated[
    float | None, typer.Option("--device-gib", help="Memory of the device in GiB; that of the GPU here unless given.")
]
TokensOption = Annotated[
    int | None, typer.Option("--tokens", min=2, help="Length of the longest row; from the config unless given.")
]
RowsOption = Annotated[
    int | None, typer.Option("--micro-batch", min=1, help="Rows of a micro-batch; from the config unless given.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def memory(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    device_gib: DeviceOption = None,
    tokens: TokensOption = None,
    micro_batch: RowsOption = None,
    json: JsonOption = False,
) -> None:
    """Say what a run needs of a device's memory, by plugin, and the largest micro-batch that fits."""
    from pegbox_memory.estimate import estimate
    from pegbox_memory.report import text

    made = estimate(config, overrides or [], device_gib=device_gib, tokens=tokens, micro_batch=micro_batch)
    if json:
        from json import dumps

        typer.echo(dumps(made.to_json(), indent=1))
    else:
        typer.echo(text(made))
    raise typer.Exit(1 if made.fits is False else 0)
