"""Where an operation computes: in its Triton kernels, or in plain PyTorch.

Kernels run on a GPU; in Triton's interpreter, for tests; and not at all, but are compiled, within `compiling`, for GPUs
that are not there (`harness/compiled.py`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from torch import Tensor


class _Mode:
    """What `compiling` sets for its time; of a ContextVar torch.compile would break its graph."""

    compiling = False


@cache
def _interpreted() -> bool | None:
    """Whether Triton's interpreter runs kernels; None: there is no triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return bool(triton.knobs.runtime.interpret)


def runs_kernels(tensor: Tensor) -> bool:
    """Whether the operation on this tensor is for its Triton kernels."""
    interpreted = _interpreted()
    if interpreted is None:
        return False
    return tensor.is_cuda or (tensor.device.type == "cpu" and (interpreted or _Mode.compiling))


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
