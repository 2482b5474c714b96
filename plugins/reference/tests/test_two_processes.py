"""On two processes each sees the reference of its own rows, whichever way it comes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peer_references import HELD_OUT, RUNS, SEEDS
from reference_rows import expected

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what `peer_references.py` does on two processes."""
    folder, script = tmp_path_factory.mktemp("two"), Path(__file__).parent / "peer_references.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(script), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_each_process_sees_the_reference_of_its_own_rows(two_processes: Path, name: str) -> None:
    files = [torch.load(two_processes / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    for split, seeds in (("train", SEEDS), ("eval", HELD_OUT)):
        start, rows = expected(seeds), set()
        for seen in files:
            rows |= seen[split].keys()
            for row, (_, reference) in seen[split].items():
                torch.testing.assert_close(reference, start[row], rtol=1e-5, atol=1e-5)
        assert rows == start.keys()
    moved = [(policy - reference).abs().max() for policy, reference in files[0]["eval"].values()]
    assert max(moved) > 0.1, "the policy has not moved: the test would prove nothing"
