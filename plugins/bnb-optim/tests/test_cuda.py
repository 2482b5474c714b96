"""On a GPU: every optimizer of bitsandbytes steps as it does alone, pages included, and goes on from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import bitsandbytes.optim
import pytest
import torch
from pegbox_bnb_optim.optimizers import OPTIMIZERS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SETTINGS = {"learning_rate": 0.01, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def _same_sums_each_time() -> Iterator[None]:
    """Embeddings add up their gradients in one order only."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_equals_bitsandbytes_used_directly(name: str, equals: Callable[..., None]) -> None:
    exempt = {"options": {"embeddings_in_32_bits": False}}
    make = getattr(bitsandbytes.optim, OPTIMIZERS[name].class_name)
    equals({"name": name, **SETTINGS, **exempt}, lambda p: make(p, lr=0.01, weight_decay=0.1), "cuda")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_eight_steps_with_a_checkpoint_are_eight_steps_to_the_bit(name: str, resumes: Callable[..., None]) -> None:
    resumes({"name": name, **SETTINGS}, "cuda")
