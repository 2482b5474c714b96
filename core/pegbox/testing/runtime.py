"""A runtime without processes: one rank on the CPU."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Literal, cast

from pegbox.testing.libraries import torch

if TYPE_CHECKING:
    from torch import Tensor, device


class FakeRuntime:
    """One rank on the CPU (`pegbox.types.Runtime`). It does what a runtime of one process does; nothing is recorded."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"

    @cached_property
    def device(self) -> device:
        return cast("device", torch().device("cpu"))

    def barrier(self) -> None:
        """Nobody to wait for."""

    def gather_objects(self, value: object) -> list[object]:
        return [value]

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor
