"""What operations allocate on a GPU that is not there: they run as on one, but launch nothing.

    with allocating():
        ...  # operations of this package on CPU tensors, best on torch's fake ones

Every buffer between kernels is made by PyTorch, and by the same lines that make it in training; so who counts what
PyTorch allocates within, counts scratch memory as well as results, and no second description of it can go stale.
Values mean nothing. An operator of torch.library is a single call to PyTorch; `within` gives the function in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pegbox_kernels.dispatch import TRITON, _Mode, compiling

NAMESPACE = "pegbox_kernels"
HOPPER = ("cuda", 90, 32)
"""The GPU that is stood for: tables of launches, of which some sizes of scratch depend, know it."""


@contextmanager
def allocating() -> Iterator[None]:
    """Within it, operations take the way of a GPU and launch no kernel; without Triton there is none to take."""
    if not TRITON:
        yield
        return
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    # A process in which Triton interprets has the other kind of kernels.
    kinds, active = (JITFunction, InterpretedFunction), driver._active
    launches = [kind.run for kind in kinds]

    def nothing(self: object, *args: object, **options: object) -> None:
        """In place of a launch."""

    driver.set_active(_Absent(GPUTarget(*HOPPER)))  # type: ignore[arg-type]
    for kind in kinds:
        kind.run = nothing  # type: ignore[method-assign,assignment]
    _Mode.allocating = True
    try:
        with compiling():
            yield
    finally:
        _Mode.allocating = False
        for kind, launch in zip(kinds, launches, strict=True):
            kind.run = launch  # type: ignore[method-assign,assignment]
        driver._active = active


def within(operator: Any) -> Callable[..., Any] | None:
    """The function of an operator of this package, if operations are `allocating`; None: call the operator."""
    if not _Mode.allocating or getattr(operator, "namespace", None) != NAMESPACE:
        return None
    from torch._library.custom_ops import OPDEFS

    found = OPDEFS.get(operator._schema.name)
    return None if found is None else found._init_fn


class _Absent:
    """As much of a driver as operations ask for before they launch."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")
