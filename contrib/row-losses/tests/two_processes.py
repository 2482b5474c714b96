"""What `test_runs.py` starts on two processes: one run over the frozen model."""

from __future__ import annotations

import os
import sys

from pegbox.plan import compose
from pegbox.run import execute
from stand_in import Frozen

if __name__ == "__main__":
    trainer = {"epochs": 2, "micro_batch": 2, "progress": "none", "device": "cpu", "save_every": None}
    config = {"model": {"name": "tiny"}, "plugins": ["plain", "trainer", "row-losses"], "output": sys.argv[1]}
    execute(compose({**config, "trainer": trainer}, instances={"plain": Frozen()}))
    # gloo's threads may still run when Python shuts down, and then abort the process: what is tested is done by now.
    sys.stdout.flush()
    os._exit(0)
