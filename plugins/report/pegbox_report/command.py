"""`pegbox report RUN`: what the command line says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder; the run may still be training.")],
    output: Annotated[Path | None, typer.Option(help="File for the page; RUN/report.html unless given.")] = None,
) -> None:
    """Show a run as one page: curves, health, plan, config with origins, data, samples and checkpoints."""
    from pegbox_report.health import examine
    from pegbox_report.page import render
    from pegbox_report.run_files import read_run, rules_of, write_whole

    found = read_run(run)
    findings = examine(found.metrics, rules_of(found))
    target = (output or found.folder / "report.html").expanduser().absolute()
    write_whole(target, render(found, findings))
    told = [finding for finding in findings if finding.raised]
    for finding in told:
        typer.echo(f"{finding.level}: {finding.says} ({finding.where})")
    judged = sum(finding.value is not None for finding in findings)
    others = f"; {len(findings) - judged} others have no figures yet, or too few" * (judged < len(findings))
    typer.echo(f"{judged - len(told)} of {judged} health rules hold{others}; {target}")
