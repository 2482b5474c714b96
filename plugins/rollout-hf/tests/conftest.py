"""A tiny policy, on one thread."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    from pegbox.types import Model


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def model() -> Model:
    """A tiny Llama, a new one for each test."""
    from rollout_policy import policy

    return policy()
