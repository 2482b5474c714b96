"""Started on each of two processes: the run of `test_two_processes.py`. Usage: python kto_two_processes.py FOLDER"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from kto_rows import Tiny, example_of, pair_of, random_answers, run

TRAIN = [example_of(answer) for answer in random_answers(9, seed=4)]
HELD_OUT = [pair_of(*random_answers(6, seed=1)[at : at + 2]) for at in (0, 2, 4)]

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    figures = run(folder / "run", Tiny(TRAIN, HELD_OUT), micro_batch=2)
    (folder / f"figures-{os.environ['RANK']}.json").write_text(json.dumps(dict(figures)))
