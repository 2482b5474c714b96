"""When to evaluate and to save, which checkpoint stays, and when a run has stopped improving.

The other programs count all of this in transformers' terms: by steps, by a part of the run, by epoch, or by whether an
evaluation was the best. Here a time is a number of steps or a number of times per epoch, and the best checkpoint is a
setting of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from pegbox_convert.conversion import Conversion
from pegbox_convert.steps.optimization import part_of_run
from pegbox_convert.steps.running import evaluates
from pegbox_convert.values import flag, quiet, whole

CHOICE = ("load_best_model_at_end", "metric_for_best_model", "greater_is_better")
GIVEN = "eval_loss"
"""The metric that evaluations of supervised training give."""
ROUNDED = "evenly spread within each epoch here; there every so many steps, rounded up"
ONLY_AT_END = "saved at the end only"


@dataclass(frozen=True)
class Times:
    """When something is done.

    Attributes:
        names: the keys that decide, the deciding one first.
        every: optimizer steps between two times.
        per_epoch: times in each epoch; at most one of the two is set, neither means never in between.
        at_end: the end of the run is one of the times.
        note: what a reader should know; a difference if `differs`.
    """

    names: tuple[str, ...]
    every: int | None = None
    per_epoch: int | None = None
    at_end: bool = True
    note: str = ""
    differs: bool = False


def cadence(c: Conversion) -> None:
    """When to save and when to evaluate: in steps, in parts of the run, or by epoch."""
    times = _times(c, "save")
    if not _put(c, "save", times):
        c.put("trainer.save_every", None, *times.names, note=times.note)
    if not evaluates(c):
        for name in ("evals_per_epoch", "eval_steps", "eval_strategy", "eval_on_start", "per_device_eval_batch_size"):
            if c.has(name):
                c.unneeded(name, "there are no rows to evaluate on")
        return
    times = _times(c, "eval")
    between = _put(c, "eval", times)
    if not times.at_end:
        c.put("trainer.eval_at_end", False, *times.names)
    elif not between:
        # A key that is not supported is not mapped as well.
        c.put("trainer.eval_at_end", True, *(name for name in times.names if c.table.key(name) not in c.entries))
    if c.has("eval_on_start"):
        c.put("trainer.eval_at_start", flag(c.get("eval_on_start")), "eval_on_start")


def _put(c: Conversion, kind: str, times: Times) -> bool:
    """Write the times in between; False if there are none."""
    if times.per_epoch:
        c.put(f"trainer.{kind}s_per_epoch", times.per_epoch, *times.names, note=times.note, differs=times.differs)
    elif times.every:
        c.put(f"trainer.{kind}_every", times.every, *times.names, note=times.note)
    return bool(times.per_epoch or times.every)


def _times(c: Conversion, kind: str) -> Times:
    by_steps, per_epoch, by_strategy, by_epoch = (
        f"{kind}{end}" for end in ("_steps", "s_per_epoch", "_strategy", "_epoch")
    )
    epochs, total = _epochs(c), c.get("max_steps", "positive_whole")
    count, strategy = c.get(per_epoch, "number"), _strategy(c, kind)
    if count and count * epochs > 1:
        return _part(c, kind, 1 / (count * epochs), _deciding(c, per_epoch, by_strategy))
    if strategy == "steps":
        names = _deciding(c, by_steps, by_strategy)
        # Without a number of steps transformers evaluates where it logs.
        steps = c.get(by_steps, "number") or (c.get("logging_steps", "number") if kind == "eval" else None)
        if steps and steps >= 1:
            return Times(names, every=whole(steps), at_end=False)
        if steps and steps > 0:
            return _part(c, kind, steps, names)
    names = _deciding(c, per_epoch, by_strategy, by_epoch)
    if strategy == "epoch" and (total or epochs > 1):
        if c.written("data.streaming") is not True:
            return Times(names, per_epoch=1)
        _set_in_steps(c, kind, names, "a cadence by epoch, which a stream has none of")
    if strategy in ("no", "false") and not count:
        return Times(names, at_end=False)
    return Times(names, note=ONLY_AT_END if kind == "save" and strategy != "best" else "")


def _epochs(c: Conversion) -> float:
    return float(c.get("num_train_epochs", "decimal") or 1)


def _strategy(c: Conversion, kind: str) -> str:
    """By what the program counts: no, steps, epoch, best."""
    steps, by_epoch = c.get(f"{kind}_steps", "number"), c.get(f"{kind}_epoch")
    if c.table.facts.get("steps_imply_strategy") and c.has(f"{kind}_steps") and steps:
        return "steps"
    if by_epoch is not None and kind == "save":
        # A number of steps comes first where there is a switch for epochs beside it.
        if flag(by_epoch) and steps and steps > 0:
            c.unneeded("save_epoch", "save_steps decides, there too")
        elif flag(by_epoch):
            return "epoch"
    return str(c.get(f"{kind}_strategy") or "no").lower()


def _part(c: Conversion, kind: str, share: float, names: tuple[str, ...]) -> Times:
    """Times that are a part of the run apart: exact where its length is known, else by epoch."""
    total, epochs = c.get("max_steps", "positive_whole"), _epochs(c)
    if total:
        return Times(names, every=part_of_run(share, total), at_end=names[0].endswith("per_epoch"))
    count = 1 / (share * epochs)
    if c.written("data.streaming") is True or count < 0.5 or abs(count - round(count)) > 1e-6:
        _set_in_steps(c, kind, names, "a cadence as a part of a run of unknown length")
        return Times(names)
    same = round(count) == 1 and epochs == int(epochs)
    return Times(names, per_epoch=round(count), note="" if same else ROUNDED, differs=not same)


def _set_in_steps(c: Conversion, kind: str, names: tuple[str, ...], what: str) -> None:
    for name in [name for name in names if c.has(name)][:1]:
        c.later(name, f"{what}: set it in steps (trainer.{kind}_every)")


def _deciding(c: Conversion, *names: str) -> tuple[str, ...]:
    """Those of the keys that the file sets, or that have a default."""
    keys = {*c.table.defaults, *c.foreign.tree}
    return tuple(name for name in dict.fromkeys(names) if c.table.key(name) in keys or c.has(name))


def best(c: Conversion) -> None:
    """The checkpoint where an evaluation was best: it stays, and is exported."""
    asked = c.get("load_best_model_at_end")
    loads = flag(asked) if asked is not None else _loads_by_default(c)
    saves = _strategy(c, "save") == "best"
    names = [name for name, used in (("load_best_model_at_end", loads), ("save_strategy", saves)) if used]
    if not names:
        return
    metric, greater = _metric(c)
    if not evaluates(c) or not (_trainer(c, "eval_every") or _trainer(c, "evals_per_epoch")):
        why = "nothing is evaluated during the run, so that nothing is the best"
        for name in (*names, *CHOICE):
            if c.has(name):
                c.unneeded(name, why)
    elif metric != GIVEN:
        for name in ("metric_for_best_model", *names):
            c.later(name, f"the best checkpoint by {metric}: evaluations here give {GIVEN}")
    else:
        note = _difference(c, loads=loads, saves=saves)
        c.put("trainer.best", metric, *names, "metric_for_best_model", note=note, differs=bool(note))
        if not any(c.has(name) for name in names):
            c.by_default(c.table.key(names[0]), True, "trainer.best", note)
        c.put("trainer.best_is", "highest" if greater else "lowest", "greater_is_better")


def _metric(c: Conversion) -> tuple[str, bool]:
    """By what evaluations are compared, and whether more of it is better, as transformers decides."""
    written, greater = c.get("metric_for_best_model"), c.get("greater_is_better")
    name = "loss" if quiet(written) else str(written)
    return f"eval_{name.removeprefix('eval_')}", flag(greater) if greater is not None else not name.endswith("loss")


def _loads_by_default(c: Conversion) -> bool:
    """Whether the program ends with the best checkpoint unless told otherwise.

    Axolotl does where both cadences are set in steps or by a number per epoch and saves fall on evaluations.
    """
    if not c.table.facts.get("loads_best") or not evaluates(c):
        return False
    epochs, shares = _epochs(c), []
    for kind in ("save", "eval"):
        count, steps = c.get(f"{kind}s_per_epoch", "number"), c.get(f"{kind}_steps", "number")
        shares.append(1.0 / (count * epochs) if count and count * epochs > 1 else steps)
    save, evaluation = shares
    return bool(save and evaluation) and save % evaluation == 0


def _trainer(c: Conversion, key: str) -> int | None:
    """A number of the new section `trainer`, written or by default."""
    found = c.written(f"trainer.{key}")
    return found if isinstance(found, int) else None


def _difference(c: Conversion, *, loads: bool, saves: bool) -> str:
    """What remains different: here each evaluation counts, and the best is what is exported."""
    if c.table.facts.get("loads_best") and loads and not _loads_by_default(c):
        return "there without effect unless saves and evaluations are set in steps, one a multiple of the other"
    if saves:
        return "" if loads else "the best is exported, too; there the last step is"
    by_epoch = _trainer(c, "saves_per_epoch"), _trainer(c, "evals_per_epoch")
    by_steps = _trainer(c, "save_every"), _trainer(c, "eval_every")
    together = by_epoch[0] == by_epoch[1] if any(by_epoch) else by_steps[0] == by_steps[1]
    return "" if together else "the best of all evaluations; there of those at which a checkpoint was saved"


def early_stopping(c: Conversion) -> None:
    """Stopping when evaluations no longer improve."""
    patience = c.get("early_stopping_patience", "positive_whole")
    if not patience:
        return
    metric, greater = _metric(c)
    if metric != GIVEN:
        for name in ("early_stopping_patience", "metric_for_best_model"):
            c.later(name, f"stopping by {metric}: evaluations here give {GIVEN}")
        return
    c.put("early-stopping.patience", patience, "early_stopping_patience")
    c.put("early-stopping.metric", metric, "metric_for_best_model")
    c.put("early-stopping.better", "higher" if greater else "lower", "greater_is_better")
