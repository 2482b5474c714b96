"""The order of the checks. A check that fails itself is a problem like others: a doctor does not faint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from pegbox_doctor.accelerators import check_accelerators
from pegbox_doctor.distributions import check_distributions
from pegbox_doctor.hub import check_hub, check_model
from pegbox_doctor.machine import check_machine, check_output
from pegbox_doctor.plugins import check_plugins
from pegbox_doctor.report import Report
from pegbox_doctor.requirements import check_requirements
from pegbox_doctor.runs import check_run

CHECKS: tuple[Callable[[Report], None], ...] = (
    check_machine,
    check_distributions,
    check_plugins,
    check_requirements,
    check_accelerators,
    check_hub,
)


def examine(config: str | None = None, overrides: Sequence[str] = ()) -> Report:
    """All checks of this machine; with a config, also those of its run."""
    report = Report()
    for check in CHECKS:
        _guarded(report, check.__name__, partial(check, report))
    output = Path("runs")
    if config is not None:
        ctx = check_run(report, config, overrides)
        if ctx is not None:
            output = ctx.folder
            _guarded(report, "check_model", partial(check_model, report, ctx.config))
    _guarded(report, "check_output", partial(check_output, report, output))
    return report


def _guarded(report: Report, name: str, check: Callable[[], None]) -> None:
    try:
        check()
    except Exception as error:
        what = name.removeprefix("check_")
        report.problem(
            f"the check of {what} failed: {type(error).__name__}: {error}",
            "It met something that it does not know, so what it would have found is unknown too.",
            "Report this with the line above.",
        )
