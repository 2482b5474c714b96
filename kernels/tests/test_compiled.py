"""What runs in the interpreter also compiles for real GPUs, which the interpreter cannot tell."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from pegbox_kernels.harness.compiled import SHARED_BYTES
from pegbox_kernels.harness.registry import specs

pytestmark = pytest.mark.slow

TARGETS = ("sm_80", "sm_90", "gfx942")


def compiled(op: str, target: str) -> list[dict[str, object]]:
    """A process of its own: kernels of this one may be those of the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pegbox_kernels.harness.compiled", op, "--target", target, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


CASES = [pytest.param(op, target, id=f"{op}-{target}") for op in specs() for target in TARGETS]
FEW_BYTES = 64


@pytest.mark.parametrize(("op", "target"), CASES)
def test_kernels_of_real_sizes_compile_and_keep_to_registers_and_shared_memory(op: str, target: str) -> None:
    found = compiled(op, target)
    assert found
    for kernel in found:
        assert kernel["shared_bytes"] <= SHARED_BYTES[target], kernel
        if kernel["kernel"] not in specs()[op].spilling:
            assert kernel["spilled_bytes"] <= FEW_BYTES, kernel
