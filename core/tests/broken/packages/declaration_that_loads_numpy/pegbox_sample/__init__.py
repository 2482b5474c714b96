"""A declaration computes something, and loads numpy for it."""

from __future__ import annotations

from collections.abc import Sequence

from pegbox.hooks import hookimpl
from pegbox.types import Item


class SamplePlugin:
    """Declarations are collected for every plan."""

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        import numpy

        return [Item(kind="sample", name="pi", target=numpy.pi)]
