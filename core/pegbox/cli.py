"""The command line. Each command imports what it needs when it is used, so that help is instant.

Commands of plugins are entry points in the group `pegbox.commands`: a function with typer annotations, or a
`typer.Typer` with several. Help lists them by name from metadata, and imports one only when it is called. Exit codes: 0
done, 1 the run failed, 2 the input is wrong, 130 Ctrl-C outside of the training.
"""

from __future__ import annotations

import os
import sys
from pkgutil import resolve_name
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pegbox.discovery import discover, only
from pegbox.errors import PegboxError, fail


class Commands(TyperGroup):
    """The core's commands, and after them those of installed plugins."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        super().format_commands(ctx, formatter)
        rows = [(name, f"from {found[0]}") for name, found in discover("pegbox.commands").items()]
        if rows:
            with formatter.section("Commands of plugins"):
                formatter.write_dl(sorted(rows))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EOFError as error:  # typer takes it for a Ctrl-D, and says no more than "Aborted!"
            raise RuntimeError("something ended before it was complete") from error
        except KeyboardInterrupt:  # typer ends with 130, and says nothing
            typer.echo("\nInterrupted. A run goes on from its last checkpoint, if any, with resume=auto.", err=True)
            raise

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        own = super().get_command(ctx, cmd_name)
        found = None if own else discover("pegbox.commands").get(cmd_name)
        if not found:
            return own
        entry = only(cmd_name, found, "command")
        try:
            command = resolve_name(entry.value)
            if not isinstance(command, typer.Typer):
                command, function = typer.Typer(**PLAIN), command
                command.command(cmd_name)(function)
        except Exception as error:
            raise fail("plugin-broken", name=cmd_name, origin=entry, problem=repr(error), value=entry.value) from error
        return typer.main.get_command(command)


PLAIN: dict[str, Any] = {"rich_markup_mode": None, "add_completion": False, "pretty_exceptions_enable": False}
app = typer.Typer(cls=Commands, no_args_is_help=True, help="Fine-tune language models with plugins.", **PLAIN)

ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or recipe://NAME.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example: lora.r=8")]


@app.command()
def run(
    config: ConfigArgument,
    overrides: Overrides = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes to start on this machine, with torchrun.")] = 1,
) -> None:
    """Fine-tune a model as a config says."""
    from pegbox.folder import claim
    from pegbox.plan import compose, require_training

    ctx = compose(config, overrides or [])
    require_training(ctx)
    claim(ctx.folder, ctx.config.run.resume)
    if processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        os.execv(sys.executable, [*launcher, "-m", "pegbox", "run", config, *(overrides or [])])
    from pegbox.render import log_to_terminal, show_short
    from pegbox.run import execute

    log_to_terminal(_rank())
    if _rank() == 0:
        show_short(ctx)
    outcome = execute(ctx)
    if outcome.reason == "interrupted":
        where = f"checkpoint: {outcome.checkpoint.path}" if outcome.checkpoint else "no checkpoint was written"
        if _rank() == 0:
            typer.echo(f"Interrupted after step {outcome.step}; {where}. Go on with resume=auto.", err=True)
        raise typer.Exit(1)
    # Threads of a process group may outlive Python's shutdown and abort a process that is done: a worker ends at once.
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.stdout.flush() is None:
        os._exit(0)


@app.command()
def plan(
    config: ConfigArgument,
    overrides: Overrides = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option(help="Only check; print nothing.")] = False,
    model: Annotated[bool, typer.Option("--model", help="Build the model without weights; list every patch.")] = False,
    memory: Annotated[bool, typer.Option("--memory", help="Estimate the memory of a run; with pegbox-memory.")] = False,
) -> None:
    """Say who does what in a run, in which order and why, before it starts."""
    if memory:
        app(["memory", config, *(overrides or []), *(["--json"] if json else [])])
    from pegbox.plan import compose, plan_model

    ctx = compose(config, overrides or [])
    made = plan_model(ctx) if model else ctx.plan
    if not quiet:
        from pegbox.render import show

        show(made, as_json=json)


@app.command()
def version() -> None:
    """Print the version of the core."""
    from pegbox import __version__

    typer.echo(f"pegbox-core {__version__}")


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def main() -> None:
    """The console script: errors that Pegbox raises on purpose are printed without a trace."""
    # An installed package must not change what a run does: pydantic's plugins stay out, and start-up is shorter.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        if dashed := [word for word in sys.argv if word.startswith("--") and "." in word.partition("=")[0]]:
            raise fail("setting-with-dashes", option=dashed[0], key=dashed[0][2:].partition("=")[0])
        app()
    except PegboxError as error:
        prefix = f"[rank {_rank()}] " if _rank() else ""
        notes = "".join(f"\n({note})" for note in getattr(error, "__notes__", ()))
        typer.echo(f"{prefix}{typer.style('error:', fg='red', bold=True)} {error}{notes}", err=True)
        sys.exit(error.exit_code)
