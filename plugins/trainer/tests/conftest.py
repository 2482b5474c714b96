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
