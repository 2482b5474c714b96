"""Two processes train as one, and as transformers' Trainer on two; they stop together, and go on exactly.

Everything that needs two processes runs once, in one start of torchrun (gloo): see peer_runs.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peer_runs import assert_same_training, elastic, train_with_pegbox
from tiny_runs import HERE, assert_same_run, in_subprocess, records, run

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of everything that `peer_runs.py` does on two processes."""
    folder = tmp_path_factory.mktemp("two")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    in_subprocess(*launcher, str(HERE / "peer_runs.py"), str(folder))
    return folder


@pytest.mark.parametrize("name", ["1x4", "4x1"])
def test_two_processes_train_as_transformers_trainer(two_processes: Path, name: str) -> None:
    both = torch.load(two_processes / f"{name}.pt", weights_only=True)
    assert_same_training(both["ours"], both["theirs"])


def test_two_processes_train_as_one_on_the_same_global_batch(tmp_path: Path, two_processes: Path) -> None:
    alone = train_with_pegbox(tmp_path / "alone", accumulation=8, micro_batch=1, rows=160)
    assert_same_training(torch.load(two_processes / "4x1.pt", weights_only=True)["ours"], alone)


def test_a_ctrl_c_on_one_process_stops_all_and_the_run_goes_on_exactly(two_processes: Path) -> None:
    told = [json.loads((two_processes / f"outcomes-{rank}.json").read_text()) for rank in (0, 1)]
    assert told[0] == told[1]
    assert told[0] == {
        "whole/None": ["finished", 12],
        "parted/None": ["interrupted", 5],
        "parted/auto": ["finished", 12],
    }
    assert_same_run(two_processes / "parted", two_processes / "whole", 12)


def test_a_run_of_two_processes_goes_on_in_one(tmp_path: Path, two_processes: Path) -> None:
    run(elastic(two_processes, max_steps=10, resume="auto"))
    run(elastic(tmp_path, max_steps=10))
    parted, whole = (records(folder / "elastic", "train") for folder in (two_processes, tmp_path))
    assert [record["trained_tokens"] for record in parted] == [record["trained_tokens"] for record in whole]
    for name in ("loss", "grad_norm"):
        torch.testing.assert_close(
            torch.tensor([record[name] for record in parted]), torch.tensor([record[name] for record in whole])
        )
