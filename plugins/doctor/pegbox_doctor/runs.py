"""What would stop a run of one config before its first step, found as `pegbox run` finds it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from pegbox.context import Context
from pegbox.errors import PegboxError
from pegbox.folder import claim
from pegbox.plan import compose, require_training

from pegbox_doctor.report import Report


def check_run(report: Report, config: str, overrides: Sequence[str]) -> Context | None:
    """Compose the run, look for missing owners and for a taken output folder; the context if it could be composed."""
    try:
        ctx = compose(config, overrides)
    except PegboxError as error:
        report.problem_of(error)
        return None
    report.fact("Run", "model", ctx.config.run.model.name)
    report.fact("Run", "plugins", ", ".join(ctx.kernel.active))
    report.fact("Run", "output", ctx.folder)
    for check in (partial(require_training, ctx), partial(claim, ctx.folder, ctx.config.run.resume)):
        try:
            check()
        except PegboxError as error:
            report.problem_of(error)
    return ctx
