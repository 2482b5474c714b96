from __future__ import annotations

import pytest
from pegbox_kernels.harness.parity import compare
from pegbox_kernels.harness.registry import specs

CASES = [
    pytest.param(spec, sample, dtype, id=f"{spec.name}-{sample.name}-{str(dtype).removeprefix('torch.')}")
    for spec in specs().values()
    for sample in spec.samples
    for dtype in spec.dtypes
]


@pytest.mark.parametrize(("spec", "sample", "dtype"), CASES)
def test_values_and_gradients_are_at_most_twice_as_far_from_fp64_as_plain_pytorch(spec, sample, dtype, device) -> None:
    wrong = [str(agreement) for agreement in compare(spec, sample, dtype, device) if not agreement.holds]
    assert wrong == []
