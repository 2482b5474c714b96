"""What `test_runs.py` starts on two processes: one run over the frozen model."""

from __future__ import annotations

import sys

from pegbox.plan import compose
from pegbox.run import execute
from stand_in import Frozen

if __name__ == "__main__":
    trainer = {"epochs": 2, "micro_batch": 2, "progress": "none", "device": "cpu", "save_every": None}
    config = {"model": {"name": "tiny"}, "plugins": ["plain", "trainer", "row-losses"], "output": sys.argv[1]}
    execute(compose({**config, "trainer": trainer}, instances={"plain": Frozen()}))
