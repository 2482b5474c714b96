"""Over two processes, replicated and sharded, recomputing changes no bit of a gradient."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def lines_of(script: str) -> list[str]:
    """What two processes that run it print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, str(FOLDER / script)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [line for line in done.stdout.splitlines() if line.startswith(("equal", "different"))]


@pytest.mark.slow
def test_gradients_are_those_without_the_plugin_under_ddp_and_fsdp() -> None:
    lines = lines_of("replicas.py")
    assert len(lines) == 2 * 2 * 4
    assert all(line.startswith("equal") for line in lines), "\n".join(lines)


@pytest.mark.slow
def test_processes_with_unlike_memory_choose_alone_unless_recomputing_communicates() -> None:
    assert lines_of("unequal_memory.py") == [
        "equal: ddp: [4, 0] of 4",
        "equal: layers: [4, 0] of 4",
        "equal: parts of layers: [0, 0] of 4",
    ]
