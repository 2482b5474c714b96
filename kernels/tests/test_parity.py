from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pegbox_kernels.harness.parity import compare
from pegbox_kernels.harness.registry import specs

CASES = [
    pytest.param(spec, sample, dtype, id=f"{spec.name}-{sample.name}-{str(dtype).removeprefix('torch.')}")
    for spec in specs().values()
    for sample in spec.samples
    for dtype in spec.dtypes
]


@pytest.fixture(autouse=True)
def _give_back_memory(device) -> Iterator[None]:
    """Some samples take gigabytes, and other processes may test on this GPU."""
    yield
    if device.type == "cuda" and torch.cuda.memory_reserved(device) > 2**30:
        torch.cuda.empty_cache()


@pytest.mark.parametrize(("spec", "sample", "dtype"), CASES)
def test_values_and_gradients_are_at_most_twice_as_far_from_fp64_as_plain_pytorch(spec, sample, dtype, device) -> None:
    if reason := sample.unfit(dtype, device):
        pytest.skip(reason)
    wrong = [str(agreement) for agreement in compare(spec, sample, dtype, device) if not agreement.holds]
    assert wrong == []
