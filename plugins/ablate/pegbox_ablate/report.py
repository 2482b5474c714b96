"""An ablation as text and as JSON. Differences are reported, and marked where they may be noise; none is left out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any, Final, Literal

from pegbox.errors import UserError

from pegbox_ablate.ablation import Ablation, Difference, spread

ROUNDING = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-2}
"""Relative difference of the loss that another order of the same arithmetic makes within some steps, by precision."""
FIGURES: Final[tuple[Literal["loss", "tokens_per_s", "peak_bytes"], ...]] = ("loss", "tokens_per_s", "peak_bytes")
MIB, GIB = 1 << 20, 1 << 30
NOISE = "~"
PER_LINE = 8


def text(made: Ablation) -> str:
    """The report that the command prints."""
    lines = [f"{made.name}: the first {made.steps} steps, timed after step {made.warmup}"]
    if made.base:
        lines += [_base(made), ""]
        if made.rounds:
            lines += [*_table(_rows(made)), _legend(made), ""]
            lines += [f"{found.plugin}: {verdict(made, found)}" for found in made.differences]
        for found in made.differences:
            lines += _by_step(made, found)
        lines.append("")
    else:
        lines += ["No plugin that was asked for can be left out; nothing was run.", ""]
    for name, failure in made.failures.items():
        lines.append(
            f"{name}: {'needed' if failure.refused else 'the run without it broke'}: {_one_line(failure.what)}"
        )
    lines += [f"{name}: needed: {reason}" for name, reason in made.needed.items()]
    lines += [f"{name}: in none of the runs: it only reports a run, and would report these" for name in made.loggers]
    return "\n".join(lines).rstrip()


def to_json(made: Ablation) -> str:
    """All that the report says, and every run's own figures."""
    rows = [
        {
            **asdict(found),
            "largest_loss_step": found.largest_step,
            "percent": _percent(found),
            "noise": _noise(made, found),
            "says": verdict(made, found),
        }
        for found in made.differences
    ]
    content: dict[str, Any] = {
        "config": made.name,
        "steps": made.steps,
        "warmup": made.warmup,
        "base": [asdict(run) for run in made.base],
        "left_out": {name: [asdict(one.left_out) for one in rounds] for name, rounds in made.rounds.items()},
        "differences": rows,
        "failures": {name: asdict(failure) for name, failure in made.failures.items()},
        "needed": made.needed,
        "loggers": made.loggers,
    }
    if made.base:
        content["spread"] = _spreads(made)
    return json.dumps(content, indent=1) + "\n"


def writable(path: Path) -> Path:
    """The file that is written at the end, refused at the beginning if it cannot be.

    Raises:
        UserError: it is a folder, or its folder does not exist.
    """
    target = path.expanduser().absolute()
    if target.is_dir() or not target.parent.is_dir():
        raise UserError(
            f"--json {path} cannot be written",
            "It is a folder." if target.is_dir() else f"There is no folder {target.parent}.",
            "Name a file in a folder that exists.",
        )
    return target


def verdict(made: Ablation, found: Difference) -> str:
    """One line: speed, memory, and what the loss says; figures within the spread of the runs are not told."""
    noise = _noise(made, found)
    parts = []
    if not noise["tokens_per_s"]:
        parts.append("faster" if found.tokens_per_s > 0 else "slower")
    if not noise["peak_bytes"]:
        parts.append("less memory" if found.peak_bytes < 0 else "more memory")
    return "; ".join([", ".join(parts) or "no difference in speed or memory", _of_loss(made, found)])


def _of_loss(made: Ablation, found: Difference) -> str:
    if found.same_loss:
        return "the same loss at every step"
    if made.is_noise(found, "loss"):
        return "a loss as like as that of two runs with it"
    share, allowed = _relative(made, found), ROUNDING[made.base[0].precision]
    if share <= allowed:
        return f"the loss differs by {100 * share:.2g} % at most, as rounding may"
    return f"the loss differs by up to {100 * share:.2g} %: right if it changes training, wrong for a kernel"


def _relative(made: Ablation, found: Difference) -> float:
    """The largest difference of the loss of a step, relative to that loss."""
    with_it = made.base[0].loss
    return max(abs(loss) / max(abs(whole), 1e-12) for loss, whole in zip(found.loss, with_it, strict=True))


def _noise(made: Ablation, found: Difference) -> dict[str, bool]:
    return {figure: made.is_noise(found, figure) for figure in FIGURES}


def _base(made: Ablation) -> str:
    first, count = made.base[0], len(made.base)
    speed = fmean(run.tokens_per_s for run in made.base)
    says = (
        f"{count} run{'s' * (count > 1)} with all plugins ({first.device}, {first.precision}): "
        f"loss {first.loss[-1]:.4f}, {speed:,.0f} tokens/s, "
        f"{first.memory} {_size(fmean(run.peak_bytes for run in made.base))}"
    )
    if count == 1:
        return says
    apart = _spreads(made)
    return (
        f"{says};\napart by {max(apart['loss']):.2g} in the loss, {apart['tokens_per_s'] / speed:.1%} in tokens/s, "
        f"{_size(apart['peak_bytes'])} in {first.memory}"
    )


def _spreads(made: Ablation) -> dict[str, Any]:
    return {
        "loss": [spread(step) for step in zip(*(run.loss for run in made.base), strict=True)],
        "tokens_per_s": spread([run.tokens_per_s for run in made.base]),
        "peak_bytes": spread([run.peak_bytes for run in made.base]),
    }


def _rows(made: Ablation) -> list[list[str]]:
    head = ["plugin", f"Δ loss, step {made.steps}", "largest (step)", "tokens/s without", "Δ tokens/s", "Δ %"]
    rows = [[*head, f"Δ {made.base[0].memory}"]]
    for found in made.differences:
        marks = {name: NOISE if noise else "" for name, noise in _noise(made, found).items()}
        rows.append(
            [
                found.plugin,
                _mark(_signed(found.loss[-1]), "" if found.same_loss else marks["loss"]),
                f"{_signed(found.loss[found.largest_step - 1])} ({found.largest_step})" if any(found.loss) else "0",
                f"{found.tokens_per_s_without:,.0f}",
                _mark(f"{found.tokens_per_s:+,.0f}", marks["tokens_per_s"]),
                _mark(f"{_percent(found):+.1f}", marks["tokens_per_s"]),
                _mark(_size(found.peak_bytes, sign=True), marks["peak_bytes"]),
            ]
        )
    return rows


def _legend(made: Ablation) -> str:
    return (
        "Δ: with the plugin, less without it. "
        f"{NOISE}: no more than {len(made.base)} equal runs on this machine may differ by."
    )


def _by_step(made: Ablation, found: Difference) -> list[str]:
    """The difference of every step, where there is one beyond that of two equal runs."""
    if made.is_noise(found, "loss"):
        return []
    steps = [f"{number}: {_signed(loss)}" for number, loss in enumerate(found.loss, start=1)]
    chunks = [steps[start : start + PER_LINE] for start in range(0, len(steps), PER_LINE)]
    return ["", f"{found.plugin}, Δ loss by step", *("  " + "  ".join(chunk) for chunk in chunks)]


def _percent(found: Difference) -> float:
    return 100 * found.tokens_per_s / found.tokens_per_s_without


def _signed(value: float) -> str:
    return f"{value:+.3g}" if value else "0"


def _size(size: float, *, sign: bool = False) -> str:
    form = "+" if sign else ""
    return f"{size / GIB:{form}.2f} GiB" if abs(size) >= GIB else f"{size / MIB:{form}.1f} MiB"


def _mark(figure: str, mark: str) -> str:
    return f"{figure} {mark}".rstrip()


def _one_line(words: str) -> str:
    return " ".join(words.split())


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns: names to the left, figures to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    figures = [[cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)] for row in rows]
    return ["  ".join([row[0].ljust(widths[0]), *cells]) for row, cells in zip(rows, figures, strict=True)]
