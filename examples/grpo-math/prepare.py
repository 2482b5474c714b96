"""Writes data/train.jsonl and data/eval.jsonl: sums of two digits, each behind three that are solved.

    pip install --no-deps reasoning-gym==0.1.25
    python prepare.py

The task is reasoning-gym's chain_sum (Stojanovski et al. 2025, arXiv:2505.24760; Apache-2.0). Its questions are
generated, not collected: the result is always the same. A row holds a prompt and the answer.

Rows are held out by their sum, which occurs in one of the two files. Two seeds would not do: item i of a task depends
on seed + i, so that the rows of seed 2 are those of seed 1 from the second on; and there are only 200 such sums.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

FOLDER = Path(__file__).parent / "data"
SOLVED = ("2 + 3 = 5", "9 - 4 = 5", "1 - 7 = -6")
ASKED = re.compile(r"-?\d+ [-+] -?\d+")
SEED = 1
TRAIN_ROWS, EVAL_ROWS = 512, 64
EVAL_SHARE = 3


def sums() -> Iterator[tuple[str, str]]:
    """Sums as reasoning-gym makes them, such as ("4 - 1", "3"), without those that prompts solve; at most 10,000."""
    import reasoning_gym

    solved = {line.split(" = ")[0] for line in SOLVED}
    task = reasoning_gym.create_dataset(
        "chain_sum", size=10_000, seed=SEED, min_terms=2, max_terms=2, min_digits=1, max_digits=1
    )
    for item in task:
        found = ASKED.search(item["question"])
        assert found is not None, item["question"]
        if found[0] not in solved:
            yield found[0], item["answer"]


def is_held_out(expression: str) -> bool:
    """Whether a sum is for evaluation: decided by its text alone."""
    return int.from_bytes(hashlib.sha256(expression.encode()).digest()[:8], "big") % EVAL_SHARE == 0


def prompt(expression: str) -> str:
    """The text that the model goes on with: it writes the answer and then a line break."""
    return "\n".join([*SOLVED, f"{expression} ="])


def build() -> dict[str, list[tuple[str, str]]]:
    """Sums and answers of both files. Training has the same sums several times, evaluation each of them once."""
    train = islice(((e, a) for e, a in sums() if not is_held_out(e)), TRAIN_ROWS)
    held_out = dict.fromkeys(pair for pair in islice(sums(), 10 * TRAIN_ROWS) if is_held_out(pair[0]))
    return {"train": list(train), "eval": list(held_out)[:EVAL_ROWS]}


def lines(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Rows as lines of JSON."""
    return [json.dumps({"prompt": prompt(expression), "answer": answer}) + "\n" for expression, answer in pairs]


def main() -> None:
    """Write both files, and say how many rows each has."""
    FOLDER.mkdir(exist_ok=True)
    for name, pairs in build().items():
        (FOLDER / f"{name}.jsonl").write_text("".join(lines(pairs)), encoding="utf-8")
        print(f"data/{name}.jsonl: {len(pairs)} rows")


if __name__ == "__main__":
    main()
