"""A launch that is repeated runs what Triton would run, with the same arguments: compared for a GPU that is not there.

In a process of its own, because kernels are compiled here, and interpreted in the other tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = """
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from pegbox_kernels.launching import READ, Repeatable, repeatable

assert READ
ran = []

class Launcher:
    def __init__(self, source, metadata):
        self.name = str(source.signature), str(source.constants), str(source.attrs), metadata.num_warps
    def __call__(self, x, y, z, stream, function, packed, launch, enter, leave, *arguments):
        at = [one.data_ptr() if isinstance(one, torch.Tensor) else one for one in arguments]
        ran.append((self.name, (x, y, z), stream, function, packed, at))

class Utils:
    def load_binary(self, name, *_): return 1, len(name), 0, 0, 1024
    def unload_module(self, module): pass
    def get_device_properties(self, device): return {"max_shared_mem": 227 << 10}

class Driver:
    utils, launcher_cls, device, stream = Utils(), Launcher, 0, 7
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return self.device
    def get_current_stream(self, device): return self.stream + device

stub = Driver()
driver.set_active(stub)

@triton.jit(do_not_specialize=["n"])
def plain(x, y, n, stride, factor, BLOCK: tl.constexpr, ADD: tl.constexpr = 0.0):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i * stride, tl.load(x + i * stride, mask=i < n) * factor + ADD, mask=i < n)

through = []
run = JITFunction.run
def counted(self, *arguments, **options):
    through.append(1)
    return run(self, *arguments, **options)
JITFunction.run = counted
kernel = repeatable(plain)
assert isinstance(kernel, Repeatable)

one, two = torch.zeros(64), torch.zeros(64)
half, odd = torch.zeros(64, dtype=torch.bfloat16), torch.zeros(65)[1:]
launches = [
    ((4,), (one, two, 64, 16, 2.0), {"BLOCK": 16}),
    ((4,), (two, one, 63, 16, 3.0), {"BLOCK": 16}),
    ((4, 2), (one, two, 64, 16, 2.0), {"BLOCK": 16}),
    ((4,), (one, two, 64, 1, 2.0), {"BLOCK": 16}),
    ((4,), (one, two, 64, 17, 2.0), {"BLOCK": 16}),
    ((4,), (half, two, 64, 16, 2.0), {"BLOCK": 16}),
    ((4,), (odd, two, 64, 16, 2.0), {"BLOCK": 16}),
    ((4,), (one, two, 2**31, 16, 2.0), {"BLOCK": 16}),
    ((4,), (one, two, 64, 16, 2.0), {"BLOCK": 32}),
    ((4,), (one, two, 64, 16, 2.0), {"BLOCK": 16, "num_warps": 8}),
    ((4,), (one, two, 64, 16, 2.0), {"BLOCK": 16, "ADD": 1.0}),
    ((4,), (one, two, 64, 16, 2), {"BLOCK": 16}),
    ((4,), (one, two, True, 16, 2.0), {"BLOCK": 16}),
]
for turn in range(3):
    for device in (0, 1):
        stub.device = device
        for grid, arguments, constants in launches:
            plain[grid](*arguments, **constants)
            kernel[grid](*arguments, **constants)
            assert ran[-1] == ran[-2], (turn, device, arguments, constants, ran[-2:])
# An unaligned pointer and a number of more than 32 bits go through Triton each time, others once for each device; the
# first three differ in nothing that a kernel is made for.
again = 2 * 3 * 2
first = 2 * (len(launches) - 2 - 2)
assert len(through) == 3 * 2 * len(launches) + again + first, (len(through), again, first)

hooked = []
triton.knobs.runtime.launch_enter_hook.add(hooked.append)
before = len(through)
kernel[(4,)](one, two, 64, 16, 2.0, BLOCK=16)
assert len(through) == before + 1, "a profiler sees the launch"
"""


def test_a_repeated_launch_runs_what_triton_would_run_with_the_same_arguments(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_the_interpreter_is_left_alone() -> None:
    from pegbox_kernels.dispatch import INTERPRETED
    from pegbox_kernels.launching import Repeatable
    from pegbox_kernels.rope.triton import rope_kernel

    assert isinstance(rope_kernel, Repeatable) != INTERPRETED
