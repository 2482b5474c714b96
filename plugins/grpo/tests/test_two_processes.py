"""Two processes learn what one learns: the same rollouts, rewards and steps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_rl import records
from two_ranks import RUNS, run_all

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of the runs of one process, and of two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    script = str(Path(__file__).with_name("two_ranks.py"))
    done = subprocess.run(
        [*command, script, str(two)], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run_all(one)
    return one, two


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_learn_what_one_learns(folders: tuple[Path, Path], name: str) -> None:
    for kind in ("train", "eval"):
        alone, together = (records(folder / name, kind) for folder in folders)
        assert len(alone) == len(together) == (4 if kind == "train" else 2 * (name == "packed"))
        for left, right in zip(alone, together, strict=True):
            shared = left.keys() - {"kind", "tokens_per_step"}
            assert left.keys() == right.keys()
            assert {k: right[k] for k in shared} == pytest.approx({k: left[k] for k in shared}, rel=1e-4, abs=2e-6)
    files = ((folder / name / "completions.jsonl").read_text().splitlines() for folder in folders)
    assert len(set(map(len, files))) == 1
