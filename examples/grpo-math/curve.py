"""Prints how the reward of a run rose, from its metrics.jsonl: `python curve.py runs/grpo-math`.

A line holds the mean over some steps: rewards of sampled completions differ from step to step with the prompts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TypeAlias

Line: TypeAlias = dict[str, float | str]

STEPS = 8
WIDTH = 40
SCORE = "rewards/exact/mean"
"""Share of right answers: the reward itself, or what stands beside it where a reward model gives the reward."""


def curve(lines: Sequence[Line]) -> list[str]:
    """The table: held-out rows before and after, and between them rewards of training."""
    train = [line for line in lines if line["kind"] == "train" and SCORE in line]
    held_out = [(line["step"], float(line[f"eval_{SCORE}"])) for line in lines if f"eval_{SCORE}" in line]
    shown = ["right answers, sampled while training"]
    for start in range(0, len(train), STEPS):
        part = train[start : start + STEPS]
        right, entropy = (fmean(float(line[key]) for line in part) for key in (SCORE, "entropy"))
        steps = f"{part[0]['step']}-{part[-1]['step']}"
        shown.append(f"  steps {steps:>7}  {right:6.1%}  {'#' * round(WIDTH * right):<{WIDTH}}  entropy {entropy:.2f}")
    return [*shown, "held-out sums, greedily", *(f"  after step {step:>3}  {right:6.1%}" for step, right in held_out)]


def main(arguments: Sequence[str]) -> int:
    """Print the curve of one run; 2 if there is none."""
    if len(arguments) != 1 or not (file := Path(arguments[0]) / "metrics.jsonl").is_file():
        print("Usage: python curve.py RUN, a folder with a metrics.jsonl", file=sys.stderr)
        return 2
    print("\n".join(curve([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
