"""Where an operation computes: in its Triton kernels, or in plain PyTorch.

Kernels run on a GPU; in Triton's interpreter, for tests; and not at all, but are compiled, within `compiling`, for GPUs
that are not there (`harness/compiled.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
    interpreting = INTERPRETED


def runs_kernels(tensor: Tensor) -> bool:
    """Whether the operation on this tensor is for its Triton kernels."""
    on_host = tensor.device.type == "cpu" and (_Mode.interpreting or _Mode.compiling)
    return TRITON and (tensor.is_cuda or on_host)


def values_at_hand(tensor: Tensor) -> bool:
    """Whether looking at values (to check ids, say) costs nothing: on a CPU no device has to be waited for."""
    return tensor.device.type == "cpu" and not _Mode.compiling


@contextmanager
def compiling() -> Iterator[None]:
    """Within it, operations on CPU tensors take the way of their kernels."""
    _Mode.compiling = True
    try:
        yield
    finally:
        _Mode.compiling = False
