"""Is the run healthy? Rules are data: a figure, how it is measured, its limits, and what to do beyond them.

A plugin adds a rule as an item of kind `health_rule` whose target is a mapping with the fields of `Rule`:

    Item(kind="health_rule", name="entropy-collapse", target={"metric": "entropy", "measure": "last", "below": 0.01,
         "says": "the entropy fell to {value}", "advice": "Lower the learning rate."})
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from pegbox.errors import PluginError, did_you_mean

Level = Literal["problem", "warning", "note"]
Values = Sequence[float | None]


@dataclass(frozen=True)
class Rule:
    """One thing to look at.

    Attributes:
        name: its id.
        metric: a figure of `metrics.jsonl`, such as `loss` or `eval_loss`.
        measure: a name in `MEASURES`.
        above, below: the rule is broken beyond these.
        says: what is told then; `{value}` is the measured value, `{value:.0%}` the same in per cent.
        advice: what to do.
        level: how bad it is.
        window: how many logged values `last`, `fall` and `rise` take together.
        least: how many values there must be for the rule to say anything.
        plugins: the rule is for runs with one of them; none: for all runs.
        without: the rule is not for runs that log one of these figures.
        source: where the limits come from.
    """

    name: str
    metric: str
    measure: str
    says: str
    advice: str
    above: float | None = None
    below: float | None = None
    level: Level = "warning"
    window: int = 10
    least: int = 1
    plugins: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    source: str = ""


@dataclass(frozen=True)
class Finding:
    """What a rule found: `value` is None where the run has too few figures for it.

    `steps` are the first and the last of those that the value was measured at.
    """

    rule: Rule
    value: float | None
    raised: bool
    steps: tuple[int, int] | None = None

    @property
    def level(self) -> Level:
        return self.rule.level

    @property
    def where(self) -> str:
        """`step 40`, `steps 31 to 40`, or nothing."""
        if self.steps is None:
            return ""
        first, last = self.steps
        return f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"

    @property
    def says(self) -> str:
        return self.rule.says.format(value=Shown(self.rule.measure, self.value))


@dataclass(frozen=True)
class Shown:
    """A measured value in a sentence: shares in per cent, others as three digits, unless the sentence says how."""

    measure: str
    value: float | None

    def __format__(self, spec: str) -> str:
        if self.value is None:
            return "?"
        return format(self.value, spec or (".0%" if self.measure in SHARES else ".3g"))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _windows(values: Sequence[float], window: int) -> tuple[float, float, float]:
    """The first window's mean, the smallest one's, and the last one's; windows are at most a third of the values."""
    size = max(1, min(window, len(values) // 3))
    means = [_mean(values[start : start + size]) for start in range(len(values) - size + 1)]
    return means[0], min(means), means[-1]


def _fall(values: Sequence[float], window: int) -> float:
    first, _, last = _windows(values, window)
    return (first - last) / abs(first) if first else 0.0


def _rise(values: Sequence[float], window: int) -> float:
    _, least, last = _windows(values, min(window, 3))
    if not least:  # a sparse reward begins at 0: whatever it becomes is no share of that
        return math.inf if last > least else 0.0
    return (last - least) / abs(least)


def _slowdown(values: Sequence[float], window: int) -> float:
    middle = statistics.median(values)
    return 1 - _windows(values, window)[2] / middle if middle else 0.0


MEASURES: dict[str, Callable[[Sequence[float], int], float]] = {
    "first": lambda values, _: values[0],
    "last": lambda values, window: _mean(values[-window:]),
    "largest": lambda values, _: max(values),
    "smallest": lambda values, _: min(values),
    "zeros": lambda values, _: sum(value == 0 for value in values) / len(values),
    "fall": _fall,
    "rise": _rise,
    "slowdown": _slowdown,
    "spike": lambda values, _: max(values) / (statistics.median(values) or float("inf")),
}
"""How a series becomes one number. `fall` and `rise` are relative: to the first window, to the lowest one; `zeros` is a
share; `spike` the largest value over the median; `slowdown` what the last window lacks of the median."""
MISSING = "missing"
"""The measure that counts what the others leave out: the share of values that are no finite numbers."""
SHARES = (MISSING, "zeros", "fall", "rise", "slowdown")
"""Measures that are parts of something."""


def rule_of(name: str, target: object) -> Rule:
    """The rule that a plugin's item describes.

    Raises:
        PluginError: it is no such description.
    """
    if isinstance(target, Rule):
        return target
    known = {field.name for field in fields(Rule)} - {"name"}
    wrong = set(target) - known if isinstance(target, Mapping) else {repr(target)}
    if wrong:
        key = sorted(map(str, wrong))[0]
        raise PluginError(
            f"the health rule '{name}' has no field '{key}'",
            did_you_mean(key, known, "Fields:"),
            "Correct the item of kind health_rule.",
        )
    assert isinstance(target, Mapping)
    made = Rule(**{"name": name, **{key: _tuple(value) for key, value in target.items()}})
    if made.measure not in (*MEASURES, MISSING):
        raise PluginError(
            f"the health rule '{name}' measures '{made.measure}'",
            did_you_mean(made.measure, (*MEASURES, MISSING), "Measures:"),
            "Correct the item of kind health_rule.",
        )
    return made


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def examine(metrics: Sequence[Mapping[str, Any]], rules: Sequence[Rule]) -> list[Finding]:
    """What each rule finds in the records of a run."""
    logged = {key for row in metrics for key in row}
    fitting = [rule for rule in rules if not logged & set(rule.without)]
    return [_examine(rule, [row for row in metrics if rule.metric in row]) for rule in fitting]


def _examine(rule: Rule, rows: Sequence[Mapping[str, Any]]) -> Finding:
    values: Values = [row[rule.metric] for row in rows]
    finite = [value for value in values if value is not None]
    if rule.measure == MISSING:
        value = (len(values) - len(finite)) / len(values) if values else None
    else:
        enough = len(finite) >= max(rule.least, 1)
        value = MEASURES[rule.measure](finite, rule.window) if enough else None
    over = value is not None and rule.above is not None and value > rule.above
    under = value is not None and rule.below is not None and value < rule.below
    steps = [row.get("step", 0) for row in rows if (row[rule.metric] is None) == (rule.measure == MISSING)]
    return Finding(rule, value, over or under, _steps(rule, finite, steps) if over or under else None)


def _steps(rule: Rule, values: Sequence[float], steps: Sequence[int]) -> tuple[int, int]:
    """Where to look: the step of one value, those of the values that count, or those of the last window."""
    if rule.measure == MISSING:
        return steps[0], steps[-1]
    if rule.measure == "zeros":
        found = [step for step, value in zip(steps, values, strict=True) if value == 0] or list(steps)
        return found[0], found[-1]
    if rule.measure in ("first", "largest", "smallest", "spike"):
        wanted = {"first": values[0], "smallest": min(values)}.get(rule.measure, max(values))
        return (steps[values.index(wanted)],) * 2
    if rule.measure == "last":
        return steps[-rule.window :][0], steps[-1]
    return steps[0], steps[-1]
