"""Launching a kernel again costs the host less than the first time.

    @repeatable
    @triton.jit
    def kernel(...): ...

    kernel[grid](x, y, 3, BLOCK=64, num_warps=4)

Triton looks at every argument of every launch, at its settings, and at the globals of the kernel, to find what it
compiled before: some 20 microseconds for 30 arguments. Here a launch that looks like an earlier one (the same device,
dtypes, constants and options, aligned pointers, the same numbers where kernels are made for numbers) runs what was
compiled then, by the call that Triton itself would make. Whatever is not known to be the same goes through Triton, as
do launches that a profiler hooks, AMD GPUs (whose kernels depend on sizes of memory too), the interpreter, and versions
of Triton whose launch was not read. Settings of Triton that change while a program runs are not seen after the first
launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from operator import attrgetter, itemgetter, methodcaller, or_
from types import NoneType
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from pegbox_kernels.dispatch import _Mode

READ = tuple(int(part) for part in triton.__version__.split(".")[:2]) in ((3, 6), (3, 7), (3, 8), (3, 9))
TENSORS = (torch.Tensor, torch.nn.Parameter)
OTHERS = (int, float, bool, NoneType)
ALIGNMENT = 16
"""Bytes: Triton tells launches apart by pointers that are multiples of it."""
LARGEST = 2**31 - 1
"""Of numbers that are 32-bit; larger ones are another launch to Triton."""
MOST = 4096
"""Launches of a kernel that are remembered: strides may differ in every batch."""
_address, _dtype = methodcaller("data_ptr"), attrgetter("dtype")


class _Known(NamedTuple):
    """What a launch ran; `kernel` keeps its code loaded, `constants` follow its arguments."""

    run: Callable[..., None]
    function: int
    metadata: object
    constants: tuple[object, ...]
    kernel: CompiledKernel


class _Layout:
    """Where the tensors and numbers are among arguments of certain types, and what was launched with such."""

    def __init__(self, kernel: JITFunction[Any], types: Sequence[type]) -> None:
        parameters = kernel.params[: len(types)]
        tensors = [i for i, kind in enumerate(types) if kind in TENSORS]
        numbers = [i for i, kind in enumerate(types) if kind is int]
        self.count = len(tensors)
        self.numbers = _items(numbers)
        self.special = _items([i for i in numbers if not parameters[i].do_not_specialize])
        self.names = kernel.arg_names[len(types) :]
        defaults = ((one.name, one.default) for one in kernel.params[len(types) :] if one.has_default)
        self.defaults: dict[str, object] = dict(defaults)
        self.launched: dict[tuple[object, ...], _Known] = {}
        self.followed = (
            tensors == list(range(len(tensors)))
            and len(tensors) > 0
            and len(numbers) > 0
            and all(kind in TENSORS or kind in OTHERS for kind in types)
            and not any(one.is_constexpr for one in parameters)
            and all(one.is_constexpr for one in kernel.params[len(types) :])
        )


def _items(places: Sequence[int]) -> Callable[[tuple[Any, ...]], tuple[int, ...]]:
    if len(places) > 1:
        return itemgetter(*places)
    return itemgetter(slice(places[0], places[0] + 1) if places else slice(0))


class Repeatable:
    """A kernel with what it launched before; see the module."""

    def __init__(self, kernel: JITFunction[Any]) -> None:
        self.kernel = kernel
        self._layouts: dict[tuple[type, ...], _Layout] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        return partial(self._launch, grid)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        types = tuple(map(type, arguments))
        layout = self._layouts.get(types)
        if layout is None:
            layout = self._layouts[types] = _Layout(self.kernel, types)
        if not layout.followed or _Mode.compiling or _hooked():
            self.kernel[grid](*arguments, **constants)
            return
        tensors = arguments[: layout.count]
        addresses = [*map(_address, tensors)]
        numbers = layout.numbers(arguments)
        if reduce(or_, addresses) % ALIGNMENT or max(numbers) > LARGEST or min(numbers) < -LARGEST:
            self.kernel[grid](*arguments, **constants)
            return
        active = driver.active
        device = active.get_current_device()
        values = constants.values()
        key = (device, *map(_dtype, tensors), layout.special(arguments), *constants, *values, *map(type, values))
        known = layout.launched.get(key)
        if known is None:
            self._first(layout, key, self.kernel[grid](*arguments, **constants), constants)
            return
        run, function, metadata, after, _ = known
        x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        stream = active.get_current_stream(device)
        rest = arguments[layout.count :]
        run(x, y, z, stream, function, metadata, None, None, None, *addresses, *rest, *after)

    def _first(self, layout: _Layout, key: tuple[object, ...], kernel: object, constants: dict[str, object]) -> None:
        if not isinstance(kernel, CompiledKernel) or kernel.metadata.target.backend != "cuda":
            return
        if len(layout.launched) >= MOST:
            layout.launched.clear()
        values = {**layout.defaults, **constants}
        after = tuple(values[name] for name in layout.names)
        layout.launched[key] = _Known(kernel.run, kernel.function, kernel.packed_metadata, after, kernel)


def _hooked() -> bool:
    """Whether a profiler wants to know of launches: Triton keeps chains of hooks, which may be empty."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def repeatable(kernel: Any) -> Any:
    """The kernel, launched by the short way where it can be; decorates what `triton.jit` made."""
    return Repeatable(kernel) if READ and isinstance(kernel, JITFunction) else kernel
