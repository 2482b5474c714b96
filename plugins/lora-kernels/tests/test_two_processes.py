"""Over two processes, replicated and sharded, gradients are those of PEFT."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "replicas.py"


@pytest.mark.slow
def test_gradients_are_those_without_the_plugin_under_ddp_and_fsdp() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith(("equal", "different"))]
    assert lines == ["equal: ddp", "equal: fsdp", "equal: fsdp bf16"]
