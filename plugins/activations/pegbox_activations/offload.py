"""What modules keep for the backward, moved to host memory and back.

Tensors that autograd saves are caught by torch's hooks for saved tensors. On CUDA the copy runs on a stream of its own
beside the forward, into pinned memory; in the backward the copy that is needed next starts while the current one is
used. Elsewhere the copy is plain. Parameters, and what is small, stay.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn import Module


class HostCopy:
    """A saved tensor that lies in host memory, and the one that was saved before it: the backward wants that next."""

    def __init__(self, tensor: Tensor, stream: torch.cuda.Stream | None, before: HostCopy | None) -> None:
        self.device, self._stream = tensor.device, stream
        self._before = weakref.ref(before) if before is not None else None
        self._fetched: Tensor | None = None
        self._host = torch.empty_like(tensor, device="cpu", pin_memory=stream is not None)
        if stream is None:
            self._host.copy_(tensor)
            return
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self._host.copy_(tensor, non_blocking=True)
        # The memory is used again only when the copy has read it.
        tensor.record_stream(stream)

    def fetch(self) -> None:
        """Start bringing it back."""
        if self._fetched is not None:
            return
        if self._stream is None:
            self._fetched = self._host.to(self.device, copy=True)
            return
        with torch.cuda.stream(self._stream):
            self._fetched = self._host.to(self.device, non_blocking=True)

    def take(self) -> Tensor:
        """The tensor, back on its device."""
        self.fetch()
        tensor = self._fetched
        assert tensor is not None, "fetch brought it"
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)
            tensor.record_stream(current)
            before = self._before() if self._before is not None else None
            if before is not None:
                before.fetch()
        self._fetched = None
        return tensor


class Offload:
    """Moves what modules keep to host memory.

    Attributes:
        moved_bytes: of all tensors moved so far.
    """

    def __init__(self, min_bytes: int) -> None:
        self._min_bytes = min_bytes
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._last: weakref.ref[HostCopy] | None = None
        self.moved_bytes = 0

    @contextmanager
    def of(self, module: Module) -> Iterator[None]:
        """Within it, what autograd saves lies in host memory; parameters of `module` stay."""
        own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

        def pack(tensor: Tensor) -> Tensor | HostCopy:
            if not self._is_moved(tensor, own):
                return tensor
            before = self._last() if self._last is not None else None
            copy = HostCopy(tensor.detach(), self._stream(tensor.device), before)
            self._last = weakref.ref(copy)
            self.moved_bytes += tensor.numel() * tensor.element_size()
            return copy

        def unpack(kept: Tensor | HostCopy) -> Tensor:
            return kept.take() if isinstance(kept, HostCopy) else kept

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    def _is_moved(self, tensor: Tensor, own: set[int]) -> bool:
        if type(tensor) is not Tensor or tensor.numel() * tensor.element_size() < self._min_bytes:
            return False
        return tensor.untyped_storage().data_ptr() not in own

    def _stream(self, device: torch.device) -> torch.cuda.Stream | None:
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]
