"""What modules keep for the backward, moved to host memory and back.

Tensors that autograd saves are caught by torch's hooks for saved tensors. A tensor that several operators save (the
input of three projections, for instance) is moved once. On CUDA the copy runs on a stream of its own beside the
forward, into pinned memory, and the forward may run ahead of the copies by a fixed number of bytes only, or the device
would fill with what waits to be copied; in the backward the copy that is needed next starts while the current one is
used. Elsewhere the copy is plain. Parameters, and what is small, stay.

The streams wait for each other on the device, never the host; memory is allocated by the computing stream and given
back when it has waited for the copy, so the allocator needs to be told of no second stream.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from pegbox_activations.measuring import parts_of

if TYPE_CHECKING:
    from torch.nn import Module

IN_FLIGHT_BYTES = 1 << 30
"""How far the forward may run ahead of the copies."""


class CopyStream:
    """The stream beside the computing one, and the tensors whose copies to the host were not waited for yet."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.side = device, torch.cuda.Stream(device)
        self._leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._leaving_bytes = 0

    def send(self, tensor: Tensor, host: Tensor) -> None:
        """Start a copy to the host; the tensor is held until the computing stream has waited for it."""
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            host.copy_(tensor, non_blocking=True)
            done = self.side.record_event()
        self._leaving.append((tensor, done))
        self._leaving_bytes += _size(tensor)
        self.wait(IN_FLIGHT_BYTES)

    def wait(self, at_most: int) -> None:
        """Have the computing stream wait until no more than so many bytes are being copied to the host."""
        current = torch.cuda.current_stream(self.device)
        while self._leaving and self._leaving_bytes > at_most:
            tensor, done = self._leaving.popleft()
            current.wait_event(done)
            self._leaving_bytes -= _size(tensor)

    def bring(self, host: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """Start a copy back; it may be used once the computing stream has waited for the event."""
        self.wait(0)
        tensor = torch.empty_like(host, device=self.device, pin_memory=False)
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            tensor.copy_(host, non_blocking=True)
            return tensor, self.side.record_event()


class HostCopy:
    """A saved tensor that lies in host memory, and the one that was saved before it: the backward wants that next.

    Attributes:
        users: how often it was saved; it is dropped when each of them has taken it.
    """

    def __init__(self, tensor: Tensor, stream: CopyStream | None, before: HostCopy | None) -> None:
        self.users = 1
        self._device, self._stream = tensor.device, stream
        self._before = weakref.ref(before) if before is not None else None
        self._fetched: Tensor | None = None
        self._arrives: torch.cuda.Event | None = None
        self._host = torch.empty_like(tensor, device="cpu", pin_memory=stream is not None)
        if stream is None:
            self._host.copy_(tensor)
        else:
            stream.send(tensor, self._host)

    def fetch(self) -> None:
        """Start bringing it back."""
        if self._fetched is not None:
            return
        if self._stream is None:
            self._fetched = self._host.to(self._device, copy=True)
        else:
            self._fetched, self._arrives = self._stream.bring(self._host)

    def take(self) -> Tensor:
        """The tensor, back on its device."""
        self.fetch()
        tensor = self._fetched
        assert tensor is not None, "fetch brought it"
        if self._stream is not None and self._arrives is not None:
            torch.cuda.current_stream(self._device).wait_event(self._arrives)
            self._arrives = None
            before = self._before() if self._before is not None else None
            if before is not None:
                before.fetch()
        self.users -= 1
        if self.users <= 0:
            self._fetched = None
        return tensor


class Offload:
    """Moves what modules keep to host memory.

    Attributes:
        moved_bytes: of all tensors moved so far.
    """

    def __init__(self, min_bytes: int) -> None:
        self._min_bytes = min_bytes
        self._streams: dict[torch.device, CopyStream] = {}
        self._last: weakref.ref[HostCopy] | None = None
        self._known: dict[tuple[object, ...], tuple[StorageWeakRef, weakref.ref[HostCopy]]] = {}
        self.moved_bytes = 0

    @contextmanager
    def of(self, module: Module) -> Iterator[None]:
        """Within it, what autograd saves lies in host memory; parameters of `module` stay."""
        own = {part.untyped_storage().data_ptr() for weight in module.parameters() for part in parts_of(weight)}
        self._known = {key: both for key, both in self._known.items() if not both[0].expired() and both[1]()}

        def pack(tensor: Tensor) -> Tensor | HostCopy:
            return self._copy(tensor.detach()) if self._is_moved(tensor, own) else tensor

        def unpack(kept: Tensor | HostCopy) -> Tensor:
            return kept.take() if isinstance(kept, HostCopy) else kept

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    def _copy(self, tensor: Tensor) -> HostCopy:
        """The copy of a tensor: the one there is, if it was saved before and neither changed nor died since."""
        storage = StorageWeakRef(tensor.untyped_storage())
        view = tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype
        key = (storage.cdata, *view, tensor._version)
        known = self._known.get(key)
        copy = known[1]() if known is not None and not known[0].expired() else None
        if copy is not None:
            copy.users += 1
            return copy
        before = self._last() if self._last is not None else None
        copy = HostCopy(tensor, self._stream(tensor.device), before)
        self._last = weakref.ref(copy)
        self._known[key] = storage, weakref.ref(copy)
        self.moved_bytes += _size(tensor)
        return copy

    def _is_moved(self, tensor: Tensor, own: set[int]) -> bool:
        if type(tensor) is not Tensor or _size(tensor) < self._min_bytes:
            return False
        return tensor.untyped_storage().data_ptr() not in own

    def _stream(self, device: torch.device) -> CopyStream | None:
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = CopyStream(device)
        return self._streams[device]


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
