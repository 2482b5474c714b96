"""`pegbox ablate CONFIG`: what each plugin changes. Exit code 0: measured; 1: the run itself fails; 2: wrong input."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or recipe://NAME.")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example: trainer.micro_batch=8")
]
StepsOption = Annotated[int, typer.Option(min=2, help="Optimizer steps of each run.")]
WarmupOption = Annotated[int, typer.Option(min=1, help="How many of the first steps are not timed.")]
RoundsOption = Annotated[int, typer.Option(min=1, help="How often each plugin is left out; more rounds, less noise.")]
OnlyOption = Annotated[str, typer.Option(metavar="A,B", help="Leave out only these plugins, one at a time.")]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="PATH", help="Write everything measured as JSON.")]


def ablate(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    steps: StepsOption = 12,
    warmup: WarmupOption = 4,
    rounds: RoundsOption = 1,
    only: OnlyOption = "",
    json: JsonOption = None,
) -> None:
    """Run a config with and without each of its plugins, and print the differences in loss, speed and memory."""
    from tempfile import TemporaryDirectory

    from pegbox_ablate.ablation import ablate as measure
    from pegbox_ablate.process import ended_by_signals
    from pegbox_ablate.report import text, to_json, writable

    target = None if json is None else writable(json)
    names = tuple(name for name in (part.strip() for part in only.split(",")) if name)
    with ended_by_signals(), TemporaryDirectory(prefix="pegbox-ablate-") as folder:
        made = measure(
            config,
            overrides or [],
            folder=Path(folder),
            steps=steps,
            warmup=warmup,
            rounds=rounds,
            only=names,
            tell=lambda line: typer.echo(line, err=True),
        )
    if target is not None:
        target.write_text(to_json(made), encoding="utf-8")
    typer.echo(text(made))
