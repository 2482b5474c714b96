"""Two processes (gloo) train as one: the same divergence, loss and figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kto_rows import Tiny, run
from kto_two_processes import HELD_OUT, TRAIN

pytestmark = pytest.mark.distributed
FIGURES = ("loss", "kl", "rewards/margins", "logps/rejected", "grad_norm", "eval_loss", "eval_kl")


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = Path(__file__).with_name("kto_two_processes.py")
    done = subprocess.run([*launcher, script, tmp_path], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    two = [json.loads((tmp_path / f"figures-{rank}.json").read_text()) for rank in (0, 1)]
    one = run(tmp_path / "one", Tiny(TRAIN, HELD_OUT), micro_batch=2)
    for name in FIGURES:
        assert two[0][name] == two[1][name]
        torch.testing.assert_close(two[0][name], one[name], rtol=2e-5, atol=2e-6, msg=name)
