"""Where an operation computes: in its Triton kernels, or in plain PyTorch.

Kernels run on a GPU; in Triton's interpreter, for tests; and not at all, but are compiled, within `compiling`, for GPUs
that are not there (`harness/compiled.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

try:
    import triton
except ImportError:
    TRITON = INTERPRETED = False
else:
    TRITON, INTERPRETED = True, bool(triton.knobs.runtime.interpret)


class _Mode:
    """What is set for a time; of a ContextVar torch.compile would break its graph."""

    compiling = False
    allocating = False
    interpreting = INTERPRETED


def runs_kernels(tensor: Tensor) -> bool:
    """Whether the operation on this tensor is for its Triton kernels."""
    if tensor.is_cuda or not TRITON:
        return TRITON
    return (_Mode.interpreting or _Mode.compiling) and tensor.device.type == "cpu"


def is_for_gpu(tensor: Tensor) -> bool:
    """Whether a choice between ways of a GPU is asked for: on one, or within `allocating`, which stands for one."""
    return tensor.is_cuda or _Mode.allocating


def values_at_hand(tensor: Tensor) -> bool:
    """Whether looking at values (to check ids, say) costs nothing: on a CPU no device has to be waited for."""
    return tensor.device.type == "cpu" and not _Mode.compiling


_HERE = nullcontext()


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Within it, launches go to the GPU of the tensor; costs next to nothing if that is the current one already."""
    index = tensor.get_device()
    return _HERE if index < 0 or index == torch.cuda.current_device() else torch.cuda.device(index)


def quotient(numbers: int, block: int) -> int:
    """How many blocks hold the numbers; `triton.cdiv` costs the host microseconds."""
    return -(-numbers // block)


def power_of_two(number: int) -> int:
    """The smallest that is not below; `triton.next_power_of_2` costs the host microseconds."""
    return 1 << max(number - 1, 0).bit_length()


@contextmanager
def compiling() -> Iterator[None]:
    """Within it, operations on CPU tensors take the way of their kernels."""
    _Mode.compiling = True
    try:
        yield
    finally:
        _Mode.compiling = False
