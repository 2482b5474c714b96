"""What the command line shows: the plan, and other tables, in plain columns."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import typer

from pegbox.context import Context
from pegbox.plan import Plan

Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]


def log_to_terminal(rank: int) -> None:
    """Let the messages of plugins reach the terminal: all of rank 0, warnings of the others."""
    logging.basicConfig(format="%(message)s" if rank == 0 else f"[rank {rank}] %(message)s")
    logging.getLogger("pegbox").setLevel(logging.INFO if rank == 0 else logging.WARNING)


def show(plan: Plan, *, as_json: bool) -> None:
    """Print a whole plan."""
    print(json.dumps(plan.to_json(), indent=1, default=str)) if as_json else print_tables(_tables(plan))


def show_short(ctx: Context) -> None:
    """Print a plan in a few lines: the model, the plugins, who does what, the folder."""
    jobs = [job for job in ctx.plan.jobs if not job.hook.startswith("register_")]
    does = {name: [j.hook for j in jobs if name in (*j.plugins, *j.wrappers)] for name, _ in ctx.plan.plugins}
    rows = [(name, origin, ", ".join(does[name])) for name, origin in ctx.plan.plugins]
    print_tables([(f"{ctx.config.run.model.name} -> {ctx.folder}", ("plugin", "from", "does"), rows)])


def _tables(plan: Plan) -> Iterator[Table]:
    yield "Plugins, in the order of calls", ("plugin", "from"), list(plan.plugins)
    jobs = [(j.hook, ", ".join(j.plugins), ", ".join(j.wrappers), j.reason) for j in plan.jobs]
    yield "Hooks, in the order of a run", ("hook", "plugin", "refined by", "why"), jobs
    if plan.model:
        yield "Model", ("fact", "value"), [(key, _text(value)) for key, value in plan.model.items()]
        patches = [(p["plugin"], p["slot"], f"{len(p['modules'])} modules", p["reason"]) for p in plan.patches]
        yield "Patches", ("plugin", "slot", "changes", "why"), patches
    yield "Config", ("key", "value", "from"), [(key, _text(value), origin) for key, value, origin in plan.values]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:,}" if type(value) is int else json.dumps(value, default=str)


def print_tables(tables: Iterable[Table]) -> None:
    """Print tables: for each its title, the heads of its columns, and its rows."""
    for title, heads, rows in tables:
        widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
        typer.echo(typer.style(title, bold=True))
        for row in [heads, *rows]:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            typer.echo(f"  {'  '.join(cells)}".rstrip())
        typer.echo()
