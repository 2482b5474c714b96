"""Which storages live, by kind, while operators run: on real tensors or on fake ones.

Every operator's results are noted with the kind of what computes at that moment, and struck off when the last tensor
that uses the storage is gone. torch's own `torch.distributed._tools.MemTracker` counts in the same way and is what the
tests compare with; it is private to torch, and does not tell a head from a layer, which is what a user can change.

Kernels that allocate for themselves while they run are not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pegbox_memory.answers import RULES
from pegbox_memory.kernels import within

BLOCK = 512
"""torch's CUDA allocator gives memory in multiples of so many bytes."""


class Ledger(TorchDispatchMode):
    """Counts within it what lies on one kind of device.

    Attributes:
        kind: what is noted with what operators return from now on.
        live: bytes that live now, by kind.
        peak: bytes by kind when their sum was largest; `peak_during` says what ran then.
    """

    def __init__(self, device_type: str = "cpu", *, vocabulary: int | None = None) -> None:
        super().__init__()
        self._device_type = device_type
        self.kind = "other"
        self.live: dict[str, int] = {}
        self.peak: dict[str, int] = {}
        self.during = self.peak_during = ""
        self._vocabulary = vocabulary
        self._known: dict[int, tuple[weakref.ref[torch.UntypedStorage], str, int]] = {}

    @property
    def total(self) -> int:
        """Bytes that live now."""
        return sum(self.live.values())

    @property
    def peak_bytes(self) -> int:
        """The most that lived at once since `restart`."""
        return sum(self.peak.values())

    def restart(self) -> None:
        """Look for the peak anew."""
        self.peak, self.peak_during = dict(self.live), self.during

    @contextmanager
    def noting(self, kind: str) -> Iterator[None]:
        """Within it, what operators return is of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def note(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Tensors that lived before, or whose kind is known better now."""
        for tensor in tensors:
            for part in parts_of(tensor):
                self._strike(id_of(part))
                self._add(part, kind)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(is_made_of_others(kind) for kind in types):
            return NotImplemented  # its own rule computes with its parts, and they come here
        inside = within(func)
        if inside is not None:
            with self:
                return inside(*args, **(kwargs or {}))
        rule = RULES.get(func)
        if rule is None or not isinstance(args[0], torch._subclasses.FakeTensor):
            rule = func
        output = rule(*args, **(kwargs or {}))
        for tensor in tensors_in(output):
            if id_of(tensor) not in self._known:
                vast = self._vocabulary is not None and tensor.ndim > 1 and tensor.shape[-1] == self._vocabulary
                self._add(tensor, "head" if vast and self.kind in ("backward", "other") else self.kind)
        return output

    def _add(self, tensor: Tensor, kind: str) -> None:
        if tensor.device.type != self._device_type:
            return
        storage = tensor.untyped_storage()
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        key = storage._cdata
        self._known[key] = weakref.ref(storage, lambda _: self._strike(key)), kind, size
        self.live[kind] = self.live.get(kind, 0) + size
        if self.total > self.peak_bytes:
            self.restart()

    def _strike(self, key: int) -> None:
        known = self._known.pop(key, None)
        if known is not None:
            self.live[known[1]] -= known[2]


def is_made_of_others(kind: type) -> bool:
    """Whether tensors of this class hold no memory of their own, but other tensors: packed weights, shards."""
    return hasattr(kind, "__tensor_flatten__") and not issubclass(kind, torch._subclasses.FakeTensor)


def parts_of(tensor: Any) -> Iterator[Tensor]:
    """The tensors that hold the memory of one."""
    if not is_made_of_others(type(tensor)):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from parts_of(getattr(tensor, name))


def id_of(tensor: Tensor) -> int:
    """Tells storages apart while they live."""
    return int(tensor.untyped_storage()._cdata)


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors of what an operator returned."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)
