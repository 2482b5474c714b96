"""The record of an operation: all that its tests, its benchmark and its correctness gate know of it.

An operation and its reference take the same keyword arguments and return the same tuple of tensors (None
where an output was not asked for). The reference computes fp64 inputs in fp64, which is the truth, and all
others as plain PyTorch would, which is the measure of what error is fair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

Inputs: TypeAlias = dict[str, Any]
Outputs: TypeAlias = tuple[Tensor | None, ...]
Make: TypeAlias = Callable[[torch.dtype, torch.device], Inputs]
Unfit: TypeAlias = Callable[[torch.dtype, torch.device], str | None]


def _always_fit(dtype: torch.dtype, device: torch.device) -> str | None:
    return None


def short_of_memory(needed_bytes: int, device: torch.device) -> str | None:
    """For `Sample.unfit`: why tensors of this size are not made on a GPU now (others may use it too); None if they are.

    Memory of the host counts as there: a page that nobody touches takes none of it.
    """
    if device.type != "cuda":
        return None
    free_bytes, _ = torch.cuda.mem_get_info(device)
    free_bytes += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    margin = 2**30
    if free_bytes >= needed_bytes + margin:
        return None
    return f"{needed_bytes / 2**30:.1f} GiB are needed and {free_bytes / 2**30:.1f} GiB of the GPU are free"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Small inputs that parity compares on; `make` is seeded, so that it gives the same values each time.

    `frozen` names differentiable inputs that have no gradient here. `unfit` says why the sample cannot be computed in
    a dtype on a device, or None; it is asked before anything is made.
    """

    name: str
    make: Make
    frozen: tuple[str, ...] = ()
    unfit: Unfit = _always_fit


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The least that must be done: bytes of device memory read or written, floating-point operations."""

    bytes_moved: int
    flops: int


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Inputs of a real size, for the benchmark, with the cost of each pass over them; `frozen` as in a sample."""

    name: str
    dtype: torch.dtype
    make: Make
    forward: Cost
    backward: Cost
    frozen: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class OpSpec:
    """An operation.

    Attributes:
        name: of the operation and of its directory.
        source: the papers and projects it follows.
        op, reference: called with the inputs of a sample as keyword arguments.
        differentiable: inputs that have a gradient, where they are given and not frozen.
        outputs: names of the outputs, in order; those without a gradient are compared only.
        samples: what parity compares on, in each of `dtypes`.
        workloads: what the benchmark measures.
        contenders: `contenders(inputs)` gives callables by name, ours and its peers'; a peer that is not
            installed or cannot do it is left out. Each returns tensors to differentiate.
        variants: `variants(inputs)` gives callables by name that differ in launch settings only.
        spilling: kernels that are known to keep registers in memory on some GPU; the README says why.
        floor: error allowed beyond twice that of plain PyTorch, relative to the largest value of the tensor
            (1 at least).
    """

    name: str
    source: str
    op: Callable[..., Outputs]
    reference: Callable[..., Outputs]
    differentiable: tuple[str, ...]
    outputs: tuple[str, ...]
    samples: tuple[Sample, ...]
    dtypes: tuple[torch.dtype, ...]
    workloads: tuple[Workload, ...]
    contenders: Callable[[Inputs], Mapping[str, Callable[[], Outputs]]]
    variants: Callable[[Inputs], Mapping[str, Callable[[], object]]] = field(default=lambda _: {})
    spilling: frozenset[str] = frozenset()
    floor: float = 1e-6

    def leaves(self, inputs: Inputs, frozen: tuple[str, ...]) -> dict[str, Tensor]:
        """The inputs to differentiate by, as leaves."""
        names = (name for name in self.differentiable if inputs.get(name) is not None and name not in frozen)
        return {name: inputs[name].detach().requires_grad_() for name in names}
