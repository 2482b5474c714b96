"""What everything that hooks pass is made of: frozen records, plain data, and state that checkpoints hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ParamSpec, Protocol, TypeVar, dataclass_transform, runtime_checkable

P = ParamSpec("P")
R = TypeVar("R")
Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Record:
    """Base of what hooks pass: every subclass is a frozen dataclass whose fields are given by keyword."""

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)


@runtime_checkable
class Stateful(Protocol):
    """State that a checkpoint holds (torch's protocol); `state_scope = "rank"` on the object: one for each rank."""

    def state_dict(self) -> dict[str, object]: ...
    def load_state_dict(self, state_dict: dict[str, object]) -> None: ...
