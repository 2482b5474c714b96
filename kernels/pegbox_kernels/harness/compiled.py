"""Compiles the kernels that an operation launches, for GPUs that are not there.

    python -m pegbox_kernels.harness.compiled attention                       # its workloads, for an H100
    python -m pegbox_kernels.harness.compiled attention --target sm_80 gfx942 --samples

The operation runs forward and backward on inputs whose memory is never touched: every PyTorch operation is answered
with memory of the right shape, every launch of a kernel compiles it and does nothing else. What is printed is what the
assembler found: registers and bytes spilled per thread, shared memory, and which instructions the products of a
kernel became. A kernel that does not compile fails here, and not on a user's GPU; the interpreter accepts much that the
compiler does not.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
import triton
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from pegbox_kernels.dispatch import compiling
from pegbox_kernels.harness.opspec import Inputs, OpSpec
from pegbox_kernels.harness.parity import cotangents
from pegbox_kernels.harness.registry import specs

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_BYTES = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}
"""Shared memory that one program may take."""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """One kernel as one launch compiled it; `products` counts matrix instructions by kind."""

    kernel: str
    constants: dict[str, object]
    target: str
    warps: int
    stages: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    products: dict[str, int]

    def __str__(self) -> str:
        constants = " ".join(f"{name}={value}" for name, value in self.constants.items())
        products = " ".join(f"{count} {kind}" for kind, count in self.products.items()) or "none"
        return (
            f"{self.target} {self.kernel}: {self.warps} warps, {self.stages} stages, {self.registers} registers, "
            f"{self.spilled_bytes} B spilled, {self.shared_bytes / 1024:.1f} KiB shared, products: {products}; "
            f"{constants}"
        )


Given: TypeAlias = tuple[Callable[[], Inputs], tuple[str, ...]]
"""What makes inputs, and which of them are frozen."""


def kernels_of(spec: OpSpec, inputs: Sequence[Given], target: str) -> list[Compiled]:
    """Every kernel that the operation launches on these inputs, forward and backward, compiled once each."""
    with recording(TARGETS[target]) as found:
        for make, frozen in inputs:
            _forward_backward(spec, make(), frozen)
    return [_described(kernel, target) for kernel in found.values()]


@contextmanager
def recording(target: GPUTarget) -> Iterator[dict[str, Any]]:
    """Within it launches only compile, and PyTorch makes shapes; yields the compiled kernels by hash."""
    found: dict[str, Any] = {}
    launch = JITFunction.run

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        found.setdefault(kernel.hash, kernel)
        return kernel

    active = driver._active
    driver.set_active(_NoGpu(target))
    JITFunction.run = only_compile
    try:
        with compiling(), _Shapes():
            yield found
    finally:
        JITFunction.run = launch
        driver._active = active


class _NoGpu:
    """As much of a driver as compiling asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # Compiled kernels are kept by device.

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


READS = frozenset({"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero"})
KEPT = frozenset({"aten::detach", "aten::lift_fresh"})
COPIES = frozenset({"aten::to", "aten::contiguous", "aten::reshape"})
"""Views by their schema that may copy."""


class _Shapes(TorchDispatchMode):
    """Answers operations with new memory of the right shape, which nobody writes; views are made as ever."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name
        if name in OPDEFS:
            with self:
                return OPDEFS[name]._init_fn(*args, **kwargs)
        if func.namespace != "aten" or (func.is_view and name not in COPIES) or name in KEPT:
            return func(*args, **kwargs)
        if name in READS:
            raise RuntimeError(f"{func}: the host reads a value, for which it would have to wait for the device")
        written = [given for given in func._schema.arguments if given.alias_info and given.alias_info.is_write]
        if written:
            return kwargs[written[0].name] if written[0].is_out else args[0]
        kwargs.pop("pin_memory", None)
        kwargs.update({"generator": None} if "generator" in kwargs else {})
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta")
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        return tree_map_only(Tensor, _memory, func(*args, **kwargs))


def _memory(shape: Tensor) -> Tensor:
    return torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype, device="cpu")


def _forward_backward(spec: OpSpec, inputs: Inputs, frozen: tuple[str, ...]) -> None:
    leaves = spec.leaves(inputs, frozen)
    returned = spec.op(**{**inputs, **leaves})
    outputs = {str(i): out for i, out in enumerate(returned) if out is not None and out.requires_grad}
    torch.autograd.grad(tuple(outputs.values()), tuple(leaves.values()), cotangents(outputs), allow_unused=True)


def _described(kernel: Any, target: str) -> Compiled:
    registers, spilled, products = _nvidia(kernel) if "cubin" in kernel.asm else _amd(kernel)
    source = kernel.src
    names = source.fn.arg_names
    constants = {names[path[0]]: value for path, value in source.constants.items() if len(path) == 1}
    return Compiled(
        kernel=source.name,
        constants={name: value for name, value in constants.items() if isinstance(value, int | float | str)},
        target=target,
        warps=kernel.metadata.num_warps,
        stages=kernel.metadata.num_stages,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=kernel.metadata.shared,
        products=products,
    )


def _nvidia(kernel: Any) -> tuple[int, int, dict[str, int]]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", text)}
    return usage["REG"], usage.get("LOCAL", 0) + usage.get("STACK", 0), _counted(kernel.asm["ptx"], r"\b(wgmma|mma)\.")


def _amd(kernel: Any) -> tuple[int, int, dict[str, int]]:
    text = kernel.asm["amdgcn"]
    counts = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", text))
    spilled = int(counts.get("private_segment_fixed_size", 0))
    return int(counts.get("vgpr_count", 0)), spilled, _counted(text, r"\bv_(mfma)_")


def _counted(text: str, pattern: str) -> dict[str, int]:
    found = re.findall(pattern, text)
    return {kind: found.count(kind) for kind in sorted(set(found))}


def main(arguments: Sequence[str] | None = None) -> int:
    """0: everything compiled and nothing spills or asks for too much shared memory; 1 otherwise."""
    parser = argparse.ArgumentParser(
        prog="python -m pegbox_kernels.harness.compiled", description=__doc__.splitlines()[0]
    )
    parser.add_argument("op", nargs="+", choices=sorted(specs()))
    parser.add_argument("--target", nargs="+", choices=list(TARGETS), default=["sm_90"])
    parser.add_argument("--samples", action="store_true", help="the samples of parity, in every dtype, too")
    parser.add_argument("--only", default="", help="inputs whose name contains this")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET is set: nothing is compiled. Unset it.", file=sys.stderr)
        return 2
    found = []
    for spec in (specs()[name] for name in options.op):
        inputs = list(_inputs(spec, options.samples, options.only))
        for target in options.target:
            found += kernels_of(spec, inputs, target)
    if options.json:
        print(json.dumps([asdict(kernel) for kernel in found], default=str))
    else:
        print(*found, sep="\n")
    large = [kernel for kernel in found if kernel.shared_bytes > SHARED_BYTES[kernel.target]]
    for kernel in large:
        print(f"too much shared memory: {kernel}", file=sys.stderr)
    return 1 if large else 0


def _inputs(spec: OpSpec, samples: bool, only: str) -> Iterator[Given]:
    cpu = torch.device("cpu")
    for workload in spec.workloads:
        if only in workload.name:
            yield partial(workload.make, workload.dtype, cpu), workload.frozen
    for sample in spec.samples if samples else ():
        for dtype in spec.dtypes:
            if only in sample.name:
                yield partial(sample.make, dtype, cpu), sample.frozen


if __name__ == "__main__":
    sys.exit(main())
