"""Fixtures of the trainer's tests; what runs share is in tiny_runs.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Bit-identical results need the same number of threads in every process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """Makes configs of tiny runs; each `output` is a folder of the test's own."""
    from tiny_runs import tiny_config

    def make(output: str = "run", **keys: Any) -> dict[str, Any]:
        return tiny_config(tmp_path / output, **keys)

    return make


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of everything that `peer_runs.py` does on two processes."""
    from tiny_runs import in_subprocess

    folder = tmp_path_factory.mktemp("two")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    in_subprocess(*launcher, str(HERE / "peer_runs.py"), str(folder))
    return folder
