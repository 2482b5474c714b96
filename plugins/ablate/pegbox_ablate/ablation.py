"""From a config to what each plugin changes: which are left out, in which order runs are made, what is compared.

    all plugins · without the first · all plugins · without the second · all plugins ...

A run is compared with the mean of the two beside it, so that a machine that slows down steadily changes nothing. The
runs with all plugins do the same work each time: how far they are apart says how much chance a difference holds. What
is within that, or within what so few runs would show by chance in 19 of 20 cases (Student 1908), is called noise.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import gcd, sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Literal

from pegbox.errors import RunError, UserError, did_you_mean
from pegbox.plan import compose, require_training

from pegbox_ablate.child import Measurement
from pegbox_ablate.process import Failure, measure
from pegbox_ablate.variants import Variant, check, measured, why_needed, without

if TYPE_CHECKING:
    from pegbox.context import Context

STUDENT_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12)
"""Two-sided quantile of Student's t at 95 %, by degrees of freedom from 1; the last stands for all above."""


@dataclass(frozen=True)
class Round:
    """A run without a plugin, and the runs with all plugins before and after it."""

    before: Measurement
    left_out: Measurement
    after: Measurement

    def difference(self, figure: Literal["tokens_per_s", "peak_bytes"]) -> float:
        """One figure: with the plugin, less without it."""
        first, other, second = (getattr(run, figure) for run in (self.before, self.left_out, self.after))
        return float((first + second) / 2 - other)

    @property
    def loss(self) -> tuple[float, ...]:
        """The difference of the loss of each step."""
        runs = zip(self.before.loss, self.left_out.loss, self.after.loss, strict=True)
        return tuple((first + second) / 2 - other for first, other, second in runs)


@dataclass(frozen=True)
class Difference:
    """What a plugin changes: each figure with it (the mean of the runs before and after), less the one without it.

    Attributes:
        loss: of each step.
        tokens_per_s, peak_bytes: of the run; `_without`: the figure that the difference is taken from.
    """

    plugin: str
    loss: tuple[float, ...]
    tokens_per_s: float
    tokens_per_s_without: float
    peak_bytes: float
    peak_bytes_without: float

    @classmethod
    def of(cls, plugin: str, rounds: Sequence[Round]) -> Difference:
        """The mean over all rounds that were made."""
        by_step = zip(*(one.loss for one in rounds), strict=True)
        return cls(
            plugin=plugin,
            loss=tuple(fmean(step) for step in by_step),
            tokens_per_s=fmean(one.difference("tokens_per_s") for one in rounds),
            tokens_per_s_without=fmean(one.left_out.tokens_per_s for one in rounds),
            peak_bytes=fmean(one.difference("peak_bytes") for one in rounds),
            peak_bytes_without=fmean(one.left_out.peak_bytes for one in rounds),
        )

    @property
    def same_loss(self) -> bool:
        """Whether the loss of every step is the same, to the bit."""
        return not any(self.loss)

    @property
    def largest_step(self) -> int:
        """The step at which the loss differs most."""
        return max(range(len(self.loss)), key=lambda index: abs(self.loss[index])) + 1


@dataclass
class Ablation:
    """Everything that was measured.

    Attributes:
        base: the runs with all plugins, in order.
        rounds: by plugin, in list order.
        failures: what became of a run without a plugin that broke, or that the run refused.
        needed: why the config is no run without a plugin.
        loggers: plugins that no run had.
    """

    name: str
    steps: int
    warmup: int
    base: list[Measurement] = field(default_factory=list)
    rounds: dict[str, list[Round]] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    needed: dict[str, str] = field(default_factory=dict)
    loggers: tuple[str, ...] = ()

    @property
    def differences(self) -> list[Difference]:
        """What each plugin that was left out changes, in list order."""
        return [Difference.of(plugin, rounds) for plugin, rounds in self.rounds.items()]

    def is_noise(self, found: Difference, figure: Literal["loss", "tokens_per_s", "peak_bytes"]) -> bool:
        """Whether a difference (of the loss: of every step) is one that equal runs may show."""
        rounds = len(self.rounds[found.plugin])
        if figure != "loss":
            values = [getattr(run, figure) for run in self.base]
            return bool(abs(getattr(found, figure)) <= margin(values, rounds))
        by_step = zip(*(run.loss for run in self.base), strict=True)
        return all(abs(loss) <= margin(step, rounds) for loss, step in zip(found.loss, by_step, strict=True))


def spread(values: Sequence[float]) -> float:
    """How far the runs with all plugins are apart in one figure."""
    return max(values) - min(values)


def margin(base: Sequence[float], rounds: int) -> float:
    """How large a difference may be by chance: at least the spread of the runs with all plugins.

    A difference is the mean over rounds of (mean of two runs) - (one run): its variance is 1.5 / rounds of a run's.
    """
    quantile = STUDENT_95[min(len(base) - 1, len(STUDENT_95)) - 1]
    return max(spread(base), quantile * stdev(base) * sqrt(1.5 / rounds))


def ablate(
    config: str,
    overrides: Sequence[str] = (),
    *,
    folder: Path,
    steps: int = 12,
    warmup: int = 4,
    rounds: int = 1,
    only: Sequence[str] = (),
    tell: Callable[[str], None] = lambda line: None,
) -> Ablation:
    """Measure what each plugin of a config changes.

    Args:
        folder: where the runs write; each gets a folder of its own in it.
        steps, warmup: optimizer steps of each run, and how many of the first are not timed.
        rounds: how often each plugin is left out.
        only: plugins to leave out, one at a time; all that can be, unless given.
        tell: called with a line for each run that begins.

    Raises:
        UserError: the config, or what was asked for, is wrong.
        RunError: a run with all plugins breaks.
    """
    _require_sense(steps, warmup)
    ctx = compose(config, overrides)
    require_training(ctx)
    entries = dict(zip(ctx.kernel.active, ctx.config.run.plugins, strict=True))
    _require_known(only, entries)
    made = Ablation(config, steps, warmup, loggers=_loggers(ctx))
    base = ctx.config.layer.data
    for name in made.loggers:
        base = without(base, name, entries[name])
    read_at = gcd(steps, warmup)
    inputs = ctx.config.folder.resolve()
    whole = Variant(None, measured(base, check(base, inputs), read_at), inputs)
    variants = []
    for name in entries:
        if name in made.loggers or (only and name not in only):
            continue
        data = without(base, name, entries[name])
        if reason := why_needed(data, inputs):
            made.needed[name] = reason
        else:
            variants.append(Variant(name, measured(data, check(data, inputs), read_at), inputs))
    if variants:
        _measure_all(made, whole, variants * rounds, folder, tell)
    return made


def _measure_all(
    made: Ablation, whole: Variant, variants: Sequence[Variant], folder: Path, tell: Callable[[str], None]
) -> None:
    number = 0

    def run(variant: Variant) -> Measurement | Failure:
        nonlocal number
        number += 1
        title = f"without {variant.without}" if variant.without else "all plugins"
        tell(f"run {number} of at most {2 * len(variants) + 1}: {title}")
        return measure(variant, folder / f"{number:02d}-{title.replace(' ', '-')}", made.steps, made.warmup)

    made.base.append(_required(run(whole)))
    for variant in variants:
        assert variant.without is not None, "the variants lack a plugin"
        if variant.without in made.failures:
            continue
        left_out = run(variant)
        if isinstance(left_out, Failure):
            # The next pair begins with the last run with all plugins: nothing was measured since.
            made.failures[variant.without] = left_out
            continue
        made.base.append(_required(run(whole)))
        made.rounds.setdefault(variant.without, []).append(Round(made.base[-2], left_out, made.base[-1]))


def _required(run: Measurement | Failure) -> Measurement:
    if isinstance(run, Measurement):
        return run
    if run.refused:
        raise UserError(run.what, run.why, run.next)
    lines = f"\nIts last lines:\n{run.log}" if run.log else ""
    raise RunError(
        f"the run with all plugins broke: {run.what}",
        run.why or f"Without it there is nothing to compare with.{lines}",
        run.next or "See that `pegbox run` makes some steps with this config, then type this again.",
    )


def _require_sense(steps: int, warmup: int) -> None:
    if steps <= warmup:
        raise UserError(
            f"--steps {steps} and --warmup {warmup} leave no step to be timed",
            "The first steps allocate, compile and tune; the speed is that of the others.",
            f"Type: --steps {3 * warmup} --warmup {warmup}",
        )
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            "pegbox ablate was started by a launcher of several processes",
            "It starts its runs itself, one process each, so that their memory can be told apart.",
            "Type: pegbox ablate CONFIG   (without torchrun or accelerate launch)",
        )


def _require_known(only: Sequence[str], active: dict[str, str]) -> None:
    for name in only:
        if name not in active:
            raise UserError(
                f"--only names '{name}', which is not active in this config",
                did_you_mean(name, active, "Active:"),
                "Name plugins as the config's sections do, with commas between them.",
            )


def _loggers(ctx: Context) -> tuple[str, ...]:
    """Plugins that only report a run: they would report these runs as well, some of them to the outside."""
    return tuple(name for name, plugin in ctx.kernel.active.items() if getattr(plugin.instance, "best_effort", False))
