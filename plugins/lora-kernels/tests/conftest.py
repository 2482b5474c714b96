"""What the tests of this package share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pegbox.types import Model

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def same() -> Callable[..., None]:
    """`same(model, plain)`: values and every gradient are equal, and there are as many."""

    from adapted_models import outcome

    def check(model: Model, plain: Model, rtol: float = 1e-4, atol: float = 1e-5) -> None:
        found, expected = outcome(model), outcome(plain)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
        assert found[1].keys() == expected[1].keys()
        for name, gradient in expected[1].items():
            torch.testing.assert_close(
                found[1][name], gradient, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )

    return check
