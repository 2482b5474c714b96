"""A config without one plugin, and whether it still says how to train; both are found without running anything.

Which plugin is needed is not known by name: the plan is composed without it, and if that fails, the error is the
reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import chdir
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pegbox.errors import ConfigError, PegboxError
from pegbox.plan import compose, require_training

if TYPE_CHECKING:
    from pegbox.context import Context

SET = {"save_every": None, "progress": "none"}
"""Settings of the loop in every measured run, if the loop has them; `log_every` is set as well."""
DROPPED = ("eval_every", "evals_per_epoch", "eval_at_start", "saves_per_epoch", "best", "best_is")
"""Settings of the loop that every measured run leaves at their defaults, which evaluate and keep nothing."""


@dataclass(frozen=True)
class Variant:
    """A config as plain data that a measured run is made of.

    Attributes:
        without: the plugin that it lacks; None: it has them all.
        folder: where relative paths of the config start.
    """

    without: str | None
    data: Mapping[str, Any]
    folder: Path


def without(data: Mapping[str, Any], name: str, entry: str) -> dict[str, Any]:
    """The config without a plugin: its entry in the list, its section, and every job or weight that names it.

    Args:
        name: the plugin's key in the config.
        entry: how `plugins` lists it: its name, or `./file.py`.
    """
    left = deepcopy(dict(data))
    left["plugins"] = [other for other in left["plugins"] if other != entry]
    left.pop(name, None)
    if left.get("use"):
        left["use"] = {job: owner for job, owner in left["use"].items() if owner != name}
    if left.get("loss"):
        left["loss"] = {term: weight for term, weight in left["loss"].items() if term != name}
    return left


def check(data: Mapping[str, Any], folder: Path) -> Context:
    """Compose the plan of a training run; no torch is imported.

    Raises:
        PegboxError: the config is no run: nobody loads the model, two plugins own one job, a section is wrong.
    """
    with chdir(folder):
        ctx = compose(data)
    require_training(ctx)
    form = ctx.config.run.model.format
    if form not in ctx.kernel.owners("load_model"):
        raise ctx.kernel.no_owner("load_model", form)
    return ctx


def why_needed(data: Mapping[str, Any], folder: Path) -> str:
    """Why this config is no run, in one line; empty: it is one."""
    try:
        check(data, folder)
    except PegboxError as error:
        return " ".join(error.what.split())
    return ""


def measured(data: Mapping[str, Any], ctx: Context, log_every: int) -> dict[str, Any]:
    """The config as it is measured: from the beginning, read at `log_every`, nothing evaluated, kept or shown.

    Length and schedule stay those of the config: what is measured are the first steps of the run as it would be.

    Raises:
        ConfigError: the loop cannot be told when to read its figures.
    """
    loop = ctx.kernel.owners("run_training")[""]
    schema = ctx.config.sections.get(loop)
    fields = type(schema).model_fields if schema is not None else {}
    if "log_every" not in fields:
        raise ConfigError(
            f"the loop of plugin '{loop}' has no setting log_every",
            "Speed and memory are read from the figures that the loop logs, at steps that are chosen.",
            "Ablate a config whose owner of run_training is the plugin trainer.",
        )
    quiet = deepcopy(dict(data))
    section = {key: value for key, value in (quiet.get(loop) or {}).items() if key not in DROPPED}
    section |= {key: value for key, value in SET.items() if key in fields}
    quiet[loop] = {**section, "log_every": log_every}
    quiet["resume"] = None
    return quiet
