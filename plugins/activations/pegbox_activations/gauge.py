"""How much memory a process has, uses, and used at most: of a GPU from torch's allocator, on a CPU by counting.

Reading the allocator's figures asks the host only, never the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from pegbox.errors import ConfigError
from torch import Tensor, nn, optim

from pegbox_activations.measuring import parts_of

GIB = 1 << 30


class Gauge(Protocol):
    """All figures in bytes."""

    def limit(self) -> float:
        """What this process may use, with what it uses already."""

    def allocated(self) -> int:
        """What it uses now."""

    def peak(self) -> int:
        """The most it used since `restart`."""

    def restart(self) -> None:
        """Begin to look for the most anew."""

    def refusals(self) -> int:
        """How often it had to give blocks back because memory ran out."""

    def count(self, kept_bytes: int) -> None:
        """A layer keeps so much of a forward: for gauges that cannot see it."""

    def forward_begins(self) -> None:
        """A forward begins; what the last one kept is gone."""


class CudaGauge:
    """What torch's allocator says, and what others left of the device: context and other processes are not ours."""

    def __init__(self, device: torch.device, cap_gib: float | None, margin: float) -> None:
        self._device, self._cap_gib, self._margin = device, cap_gib, margin

    def limit(self) -> float:
        free, _ = torch.cuda.mem_get_info(self._device)
        ours = free + torch.cuda.memory_reserved(self._device)
        return min(ours, self._cap_gib * GIB if self._cap_gib else ours) * (1 - self._margin)

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def restart(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def refusals(self) -> int:
        return int(torch.cuda.memory_stats(self._device).get("num_alloc_retries", 0))

    def count(self, kept_bytes: int) -> None:
        """Nothing: the allocator sees it."""

    def forward_begins(self) -> None:
        """Nothing: the allocator sees it."""


class CountingGauge:
    """On a CPU, where no allocator counts: the model, its gradients, the optimizer's state, and what layers keep."""

    def __init__(self, module: nn.Module, cap_gib: float, margin: float) -> None:
        self._module, self._limit = module, cap_gib * GIB * (1 - margin)
        self.optimizer: optim.Optimizer | None = None
        self._forward = self._peak = 0

    def limit(self) -> float:
        return self._limit

    def allocated(self) -> int:
        parameters = list(self._module.parameters())
        gradients = [p for p in parameters if p.requires_grad]
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        state = [value for values in states for value in values.values() if isinstance(value, Tensor)]
        return _bytes([*parameters, *self._module.buffers(), *gradients, *state])

    def peak(self) -> int:
        return self.allocated() + self._peak

    def restart(self) -> None:
        self._forward = self._peak = 0

    def refusals(self) -> int:
        return 0

    def count(self, kept_bytes: int) -> None:
        self._forward += kept_bytes
        self._peak = max(self._peak, self._forward)

    def forward_begins(self) -> None:
        self._forward = 0


def gauge_of(device: torch.device, module: nn.Module, cap_gib: float | None, margin: float) -> Gauge:
    """The gauge of a device.

    Raises:
        ConfigError: nobody can say how much memory there is.
    """
    if device.type == "cuda":
        return CudaGauge(device, cap_gib, margin)
    if cap_gib is None:
        raise no_budget(device.type)
    return CountingGauge(module, cap_gib, margin)


def no_budget(device_type: str) -> ConfigError:
    """Nobody can say how much memory there is."""
    return ConfigError(
        f"activations.policy is auto, and the model is on {device_type}",
        "How much memory a run may use is measured on CUDA devices only.",
        "Set activations.memory_gib, or policy to full, none or a number of layers.",
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    parts = (part for tensor in map(_local, tensors) for part in parts_of(tensor))
    return sum(part.numel() * part.element_size() for part in parts)


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor."""
    part = getattr(tensor, "to_local", None)
    return tensor if part is None else part()
