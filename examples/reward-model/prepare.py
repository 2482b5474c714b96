"""Writes data/train.jsonl and data/eval.jsonl: a right and a wrong answer to each sum of ../grpo-math.

    python prepare.py

The rows are synthetic. Prompts and right answers are those of ../grpo-math/data (reasoning-gym's chain_sum, see
prepare.py there). Wrong answers are numbers drawn at random, half of them near the right one and half among all that
could be answers, so that only the sum tells which is right. A sum that is held out there is held out here, too. The
result is always the same.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

HERE = Path(__file__).parent
SUMS = HERE.parent / "grpo-math" / "data"
SEED = 1
WRONG_ANSWERS = {"train": 4, "eval": 2}
LOWEST, HIGHEST = -9, 18
NEAR = 3


def rows(name: str) -> dict[str, int]:
    """The prompts of one file of ../grpo-math, each once, with their right answers."""
    lines = (SUMS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["prompt"]: int(row["answer"]) for row in map(json.loads, lines)}


def wrong(right: int, number: int, rng: random.Random) -> list[int]:
    """So many different wrong answers: half of them near the right one (its negative counts as near)."""
    near = sorted({-right, *range(right - NEAR, right + NEAR + 1)} - {right})
    chosen = rng.sample(near, number // 2)
    others = [n for n in range(LOWEST, HIGHEST + 1) if n != right and n not in chosen]
    return [*chosen, *rng.sample(others, number - len(chosen))]


def answer(number: int) -> str:
    """An answer as the policy writes it: after "=" comes a space, and a line break ends it."""
    return f" {number}\n"


def build(name: str) -> list[str]:
    """The lines of one file."""
    rng = random.Random(f"{SEED} {name}")
    pairs = (
        {"prompt": prompt, "chosen": answer(right), "rejected": answer(number)}
        for prompt, right in rows(name).items()
        for number in wrong(right, WRONG_ANSWERS[name], rng)
    )
    return [json.dumps(pair) + "\n" for pair in pairs]


def main() -> None:
    """Write both files, and say how many rows each has."""
    (HERE / "data").mkdir(exist_ok=True)
    for name in WRONG_ANSWERS:
        lines = build(name)
        (HERE / "data" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"data/{name}.jsonl: {len(lines)} rows")


if __name__ == "__main__":
    main()
