"""Without a GPU the kernels run in Triton's interpreter, which must be chosen before they are imported.

It is chosen for a whole process, and slow: tests of other packages in the same process take plain PyTorch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from pegbox_kernels import dispatch

dispatch._Mode.interpreting = False


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch._Mode, "interpreting", dispatch.INTERPRETED)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def filled_with_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def poison() -> Callable[[], AbstractContextManager[None]]:
    """`with poison():` fills new memory with NaN: what an operation does not write shows."""
    return filled_with_nan
