"""The pytest plugin of the core: fixtures for those who test plugins. Importing it imports pytest alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.rows import Batch
    from pegbox.testing.runtime import FakeRuntime
    from pegbox.types import Model

Composer = Callable[..., "Context"]


@pytest.fixture
def compose_config(tmp_path: Path) -> Iterator[Composer]:
    """`compose_config(mapping_or_path, overrides=(), instances=None)`: a context whose exit stack closes with the test.

    Without an `output`, that of a mapping is in the test's temporary folder.
    """
    from pegbox.plan import compose

    with ExitStack() as stack:

        def composed(
            source: str | Path | Mapping[str, Any],
            overrides: Sequence[str] = (),
            instances: dict[str, object] | None = None,
        ) -> Context:
            if isinstance(source, Mapping):
                source = {"output": str(tmp_path / "run"), **source}
            ctx = compose(source, overrides, instances=instances)
            stack.callback(ctx.exit.close)
            return ctx

        yield composed


@pytest.fixture
def fake_runtime() -> FakeRuntime:
    """One rank on the CPU."""
    from pegbox.testing.runtime import FakeRuntime

    return FakeRuntime()


@pytest.fixture
def tiny_model() -> Model:
    """A Llama of two layers with random weights; the test is skipped where torch or transformers is missing."""
    from pegbox.testing.tiny import tiny_model

    return tiny_model()


@pytest.fixture
def tiny_batches() -> list[Batch]:
    """Two micro-batches for it."""
    from pegbox.testing.tiny import tiny_batches

    return tiny_batches()
