"""Optimizer, learning-rate schedule and warm-up."""

from __future__ import annotations

import math
import tomllib
from functools import cache
from importlib.resources import files
from typing import Any

from pegbox_convert.conversion import Conversion
from pegbox_convert.values import arguments, mapping, number, quiet

SCHEDULES = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt", "constant", "constant_with_warmup"),
    *("cosine_with_min_lr", "warmup_stable_decay", "one_cycle", "rex"),
)
"""Schedules that have the same name here. `cosine_warmup_with_min_lr` too, but for its options."""
OPTIONS = {"num_decay_steps": "decay_steps"}
"""Options of schedules that have another name here."""
KEPT = (
    "num_cycles",
    "power",
    "lr_end",
    "min_lr",
    "min_lr_rate",
    "min_lr_ratio",
    "decay_type",
    "warmup_type",
    "timescale",
)


@cache
def optimizers() -> dict[str, dict[str, Any]]:
    """The optimizers of `tables/optimizers.toml`."""
    return tomllib.loads(files("pegbox_convert").joinpath("tables", "optimizers.toml").read_text(encoding="utf-8"))


def optimizer(c: Conversion) -> None:
    """Name, plugin, learning rate, decay, averages and further options of the optimizer; schedule and warm-up."""
    name = str(c.get("optim")).lower()
    recipe = optimizers().get(name)
    if recipe is None:
        c.later("optim", f"the optimizer {name}")
        c.put("optim.learning_rate", _rate(c), "learning_rate")
        recipe = {"name": "adamw"}
    else:
        c.put("optim.name", recipe["name"], "optim", note=recipe.get("note", ""), differs="note" in recipe)
        c.put("optim.learning_rate", _rate(c), "learning_rate")
    if "plugin" in recipe:
        c.start(recipe["plugin"])
    c.put("optim.weight_decay", c.get("weight_decay", "number") or 0.0, "weight_decay")
    _averages(c, recipe)
    _arguments(c, recipe)
    if recipe.get("schedule"):
        _own_schedule(c, recipe)
    else:
        _schedule(c)


def _rate(c: Conversion) -> float:
    return float(c.get("learning_rate", "number") or 2e-4)


def _averages(c: Conversion, recipe: dict[str, Any]) -> None:
    takes = recipe.get("takes", ["betas", "eps"])
    names = ("adam_beta1", "adam_beta2", "adam_beta3")
    wanted = names[: {"betas": 2, "betas3": 3}.get(takes[0], 0)] if takes else ()
    known = recipe.get("betas", [0.9, 0.999, 0.9999][: len(wanted)])
    given = [c.get(name, "decimal") for name in wanted]
    betas = [known[index] if value is None else value for index, value in enumerate(given)]
    if wanted and (any(c.has(name) for name in wanted) or betas != known):
        c.put("optim.options.betas", betas, *wanted)
    eps = c.get("adam_epsilon", "decimal")
    if "eps" in takes and eps is not None and (c.has("adam_epsilon") or eps != recipe.get("eps", 1e-8)):
        c.put("optim.options.eps", eps, "adam_epsilon")
    for name in (*names, "adam_epsilon", "adam_epsilon2"):
        if c.has(name) and name not in wanted and not (name == "adam_epsilon" and "eps" in takes):
            c.unneeded(name, f"the optimizer {recipe['name']} has no such option")


def _arguments(c: Conversion, recipe: dict[str, Any]) -> None:
    momentum = c.get("sgd_momentum", "decimal")
    if recipe["name"] == "sgd" and momentum is not None:
        c.put("optim.options.momentum", momentum, "sgd_momentum")
    if not c.has("optim_args") or quiet(c.get("optim_args")):
        return
    try:
        given = arguments(c.get("optim_args"))
    except ValueError as error:
        c.later("optim_args", str(error))
        return
    for name, value in given.items():
        if name in recipe.get("arguments", ()):
            c.put(f"optim.options.{name}", value, "optim_args")
        else:
            c.later("optim_args", f"the option {name} of the optimizer")


def _own_schedule(c: Conversion, recipe: dict[str, Any]) -> None:
    """A schedule-free optimizer: the other programs let a schedule act beside it."""
    note = "a schedule-free optimizer takes no schedule here"
    c.put("optim.schedule", recipe["schedule"], "lr_scheduler_type", note=note, differs=True)
    for name in ("lr_scheduler_kwargs", "warmup_ratio", "cosine_min_lr_ratio", "cosine_constant_lr_ratio"):
        if c.has(name) and not quiet(c.get(name)):
            c.later(name, note)
    steps = c.get("warmup_steps", "number") or 0
    if steps >= 1 and recipe.get("warms_up", True):
        c.put("optim.options.warmup_steps", int(steps), "warmup_steps")


def _schedule(c: Conversion) -> None:
    name = str(c.get("lr_scheduler_type")).lower()
    floor, part = c.get("cosine_min_lr_ratio", "decimal"), c.get("cosine_constant_lr_ratio", "decimal")
    if name == "cosine" and floor is not None and part is not None:
        note = "counted after the warm-up here"
        c.put("optim.schedule", "cosine_then_constant", "lr_scheduler_type", "cosine_constant_lr_ratio")
        c.put("optim.schedule_options.min_ratio", floor, "cosine_min_lr_ratio")
        c.put(
            "optim.schedule_options.constant_ratio",
            round(1 - part, 6),
            "cosine_constant_lr_ratio",
            note=note,
            differs=True,
        )
    elif name == "cosine" and floor is not None:
        c.put("optim.schedule", "cosine_with_min_lr", "lr_scheduler_type", "cosine_min_lr_ratio")
        c.put("optim.schedule_options.min_lr_rate", floor, "cosine_min_lr_ratio")
    elif name in SCHEDULES:
        c.put("optim.schedule", name, "lr_scheduler_type")
    else:
        c.later("lr_scheduler_type", f"the schedule {name}")
    _schedule_options(c)
    warmup(c, name)


def _schedule_options(c: Conversion) -> None:
    if not c.has("lr_scheduler_kwargs") or quiet(c.get("lr_scheduler_kwargs")):
        return
    try:
        given = mapping(c.get("lr_scheduler_kwargs"))
    except ValueError as error:
        c.later("lr_scheduler_kwargs", str(error))
        return
    for name, value in given.items():
        key = f"{c.table.key('lr_scheduler_kwargs')}.{name}"
        if name in OPTIONS or name in KEPT:
            text = isinstance(value, str) and name.endswith("_type")
            c.put(f"optim.schedule_options.{OPTIONS.get(name, name)}", value if text else number(value), key)
        else:
            c.later(key, f"the option {name} of the schedule")


def warmup(c: Conversion, schedule: str) -> None:
    """Steps or part of the run; a number of steps below one is a part, as in transformers."""
    most = c.table.facts.get("warmup_at_most")
    steps, ratio, total = c.get("warmup_steps", "number"), c.get("warmup_ratio", "decimal"), c.get("max_steps", "whole")
    if c.has("warmup_ratio") and c.has("warmup_steps") and steps:
        c.unneeded("warmup_ratio", "warmup_steps decides")
        ratio = None
    if steps is not None and 0 < steps < 1:
        ratio, steps, source = float(steps), None, "warmup_steps"
    else:
        source = "warmup_steps" if steps else "warmup_ratio"
    if schedule in ("constant", "one_cycle"):
        for name in ("warmup_steps", "warmup_ratio"):
            if c.has(name):
                c.unneeded(name, f"the schedule {schedule} takes no warm-up, there either")
    elif steps:
        c.put("optim.warmup_steps", int(steps), source)
    elif ratio and most is not None and total and total > 0:
        rounded = int(ratio * total)
        c.put("optim.warmup_steps", rounded if c.has("warmup_ratio") else min(rounded, most), source)
    elif ratio:
        note = "" if most is None or c.has("warmup_ratio") else f"there never more than {most} steps"
        c.put("optim.warmup_ratio", float(ratio), source, note=note)
    elif c.has("warmup_steps") and steps == 0:
        c.put("optim.warmup_steps", 0, "warmup_steps")


def part_of_run(share: float, total: int) -> int:
    """Steps that are a part of a run, rounded up as transformers does."""
    return max(math.ceil(share * total), 1)
