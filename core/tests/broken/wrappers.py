"""Wrappers of `build_dataset` that break one promise each. The sound one leaves out every second row."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from pegbox.hooks import hookimpl


class EveryOther:
    """Every second row of some rows."""

    def __init__(self, rows: Any) -> None:
        self.rows, self.split, self.fingerprint = rows, rows.split, f"{rows.fingerprint}/2"

    def __len__(self) -> int:
        return (len(self.rows) + 1) // 2

    def __getitem__(self, index: int) -> Any:
        return self.rows[2 * index]

    def describe(self, index: int) -> str:
        return str(self.rows.describe(2 * index))


class SoundWrapper:
    @hookimpl(wrapper=True)
    def build_dataset(self) -> Generator[None, Any, Any]:
        rows = yield
        return None if rows is None else EveryOther(rows)


class NoYield:
    @hookimpl(wrapper=True)
    def build_dataset(self, split: str) -> Generator[None, Any, Any]:
        if split == "train":
            return []
        rows = yield
        return rows


class TwoYields:
    @hookimpl(wrapper=True)
    def build_dataset(self) -> Generator[None, Any, Any]:
        rows = yield
        if rows is not None:
            yield
        return rows


class YieldsArguments:
    """Tries to give the owner another split."""

    @hookimpl(wrapper=True)
    def build_dataset(self) -> Generator[Any, Any, Any]:
        rows = yield "eval"
        return rows


class ReturnsNothing:
    @hookimpl(wrapper=True)
    def build_dataset(self) -> Generator[None, Any, Any]:
        rows = yield
        self.rows = rows


class FailsOnNone:
    @hookimpl(wrapper=True)
    def build_dataset(self) -> Generator[None, Any, Any]:
        rows = yield
        return EveryOther(rows)


class SwallowsErrors:
    @hookimpl(wrapper=True)
    def build_dataset(self) -> Generator[None, Any, Any]:
        try:
            rows = yield
        except Exception:
            rows = None
        return rows
