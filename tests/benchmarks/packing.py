"""Rows of text into bins: how many bins, and how long it takes, beside Axolotl and TRL.

    python tests/benchmarks/packing.py [--rows 20000] [--seeds 3] [--repeats 5] [--axolotl PYTHON] [--csv FILE]

Lengths are lognormal (median 300, sigma 0.9), cut off at the capacity. Every contender gets the same lengths and is
timed in the same run, in turn: seconds are the shortest of the repeats, after a first call that is not counted, since
Axolotl compiles its search then. Fewer bins than the sum of all lengths divided by the capacity, rounded up, are
impossible.

TRL's strategy `bfd` is asked through the function that it maps over an Arrow table, in batches of 1,000 rows (what
`Dataset.map` does unless told otherwise) and with all rows in one; it moves the tokens too. Axolotl's batch sampler is
asked with its defaults, one bin for each batch; it has pins of its own, so name the Python of an environment that holds
it.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

CAPACITIES = (2048, 4096, 8192)
COLUMNS = ("contender", "rows", "seed", "capacity", "bins", "lower_bound", "excess", "seconds", "date")
AXOLOTL = """
import json, sys, time
import numpy
from torch.utils.data import SequentialSampler
from axolotl.utils.samplers.multipack import MultipackBatchSampler
for line in sys.stdin:
    lengths, capacity = json.loads(line)
    began = time.perf_counter()
    sampler = MultipackBatchSampler(
        SequentialSampler(lengths), batch_size=1, batch_max_len=capacity, lengths=numpy.array(lengths), bin_size=200,
        packing_efficiency_estimate=1.0, drop_last=False, num_processes=1,
    )
    batches = sampler.generate_batches(set_stats=False)
    seconds = time.perf_counter() - began
    rows = sum(len(chosen) for batch in batches for chosen in batch)
    print("packed", json.dumps([seconds, [len(batch) for batch in batches], rows]), flush=True)
"""


@dataclass(frozen=True)
class Packed:
    """What one contender made of one list: bins, and seconds."""

    bins: int
    seconds: float


Contender = Callable[[Sequence[int], int], Packed]


def text_lengths(rows: int, seed: int, capacity: int) -> list[int]:
    """Lengths of rows as they are in data of conversations."""
    source = random.Random(seed)
    return [min(max(round(source.lognormvariate(math.log(300), 0.9)), 1), capacity) for _ in range(rows)]


def pegbox(lengths: Sequence[int], capacity: int) -> Packed:
    """The plugin `packing`: one window."""
    from pegbox_packing.bins import best_fit_decreasing

    began = time.perf_counter()
    bins = best_fit_decreasing(lengths, capacity)
    seconds = time.perf_counter() - began
    assert sorted(row for chosen in bins for row in chosen) == list(range(len(lengths)))
    return Packed(len(bins), seconds)


def trl(batch: int | None) -> Contender:
    """TRL's best-fit decreasing, over batches of rows."""
    import numpy as np
    import pyarrow as pa
    from trl.data_utils import _pack_bfd

    def pack(lengths: Sequence[int], capacity: int) -> Packed:
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = pa.array(np.zeros(offsets[-1], dtype=np.int32))
        table = pa.table({"input_ids": pa.LargeListArray.from_arrays(pa.array(offsets), tokens)})
        size, bins, began = batch or len(lengths), 0, time.perf_counter()
        for start in range(0, len(lengths), size):
            bins += len(_pack_bfd(table.slice(start, size), capacity))
        return Packed(bins, time.perf_counter() - began)

    return pack


class Axolotl:
    """Axolotl's batch sampler, in a process of its own environment."""

    def __init__(self, python: str) -> None:
        self._process = subprocess.Popen(
            [python, "-c", AXOLOTL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def __call__(self, lengths: Sequence[int], capacity: int) -> Packed:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([list(lengths), capacity]) + "\n")
        self._process.stdin.flush()
        line = ""
        while not line.startswith("packed "):
            line = self._process.stdout.readline()
            if not line:
                sys.exit("Axolotl ended without an answer.")
        seconds, sizes, rows = json.loads(line.removeprefix("packed "))
        assert rows == len(lengths)
        return Packed(sum(sizes), seconds)


def best(contender: Contender, lengths: Sequence[int], capacity: int, repeats: int) -> Packed:
    """The shortest of several runs; bins are the same in each."""
    runs = [contender(lengths, capacity) for _ in range(repeats)]
    assert len({run.bins for run in runs}) == 1
    return min(runs, key=lambda run: run.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000, help="lengths to pack (default 20,000)")
    parser.add_argument("--seeds", type=int, default=3, help="lists of lengths (default 3)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each contender on each list (default 5)")
    parser.add_argument("--axolotl", help="Python of an environment that holds Axolotl")
    parser.add_argument("--csv", type=Path, help="write the table there too")
    asked = parser.parse_args()
    contenders: dict[str, Contender] = {"pegbox": pegbox, "trl (1,000 rows)": trl(1000), "trl (all rows)": trl(None)}
    if asked.axolotl is not None:
        contenders["axolotl"] = Axolotl(asked.axolotl)
    for contender in contenders.values():
        contender(text_lengths(1000, 0, CAPACITIES[0]), CAPACITIES[0])
    today, table = datetime.now(UTC).date().isoformat(), []
    print("".join(f"{name:>12}" if name != "contender" else f"{name:18}" for name in COLUMNS))
    for capacity in CAPACITIES:
        for seed in range(asked.seeds):
            lengths = text_lengths(asked.rows, seed, capacity)
            bound = math.ceil(sum(lengths) / capacity)
            for name, contender in contenders.items():
                packed = best(contender, lengths, capacity, asked.repeats)
                excess = f"{packed.bins / bound - 1:.5f}"
                row = [name, asked.rows, seed, capacity, packed.bins, bound, excess, f"{packed.seconds:.4f}", today]
                table.append(row)
                print(f"{name:18}" + "".join(f"{cell:>12}" for cell in row[1:]))
    if asked.csv is not None:
        asked.csv.parent.mkdir(parents=True, exist_ok=True)
        with asked.csv.open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *table])


if __name__ == "__main__":
    main()
