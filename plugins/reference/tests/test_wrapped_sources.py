"""The plugin keeps the contract of wrappers, and its source is the inner one in all else."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pegbox import hooks
from pegbox.assembly import model_request, prepare_model
from pegbox.context import Context
from pegbox.errors import RunError
from pegbox.plan import compose
from pegbox.rows import RowSource
from pegbox.testing import FakeRuntime, WrapperConformance
from pegbox.types import Model
from reference_rows import Rows, Tiny, Watcher, config, expected, pair


def composed(folder: Path, *plugins: str, **sections: Any) -> Context:
    return compose(config(folder, *plugins, **sections), instances={"tiny": Tiny(), "watcher": Watcher()})


def source_of(ctx: Context, *, prepared: bool = True) -> tuple[Context, Model, Any]:
    """The policy and the training source of a run, built as the run would; `prepared`: by all plugins of it."""
    ctx.runtime = FakeRuntime()  # type: ignore[assignment]
    ctx.processor = ctx.call(hooks.load_processor, ctx)
    model = prepare_model(ctx, model_request(ctx))
    ask = ctx.call if prepared else partial(ctx.kernel.ask, "trainer")
    return ctx, model, ask(hooks.build_batches, ctx, model, Rows(range(10)))


class TestItsWrappers(WrapperConformance):
    plugin = "reference"
    with_plugins: ClassVar[tuple[str, ...]] = ("tiny", "watcher", "adamw", "trainer")
    instances: ClassVar[dict[str, object]] = {"tiny": Tiny(), "watcher": Watcher()}

    def result(self, hook: str) -> Any:
        return Rows(range(10)) if hook == "build_dataset" else self._source

    def arguments(self, ctx: Context) -> dict[str, Any]:
        _, model, self._source = source_of(ctx, prepared=False)
        return {**super().arguments(ctx), "model": model, "dataset": Rows(range(10))}


def test_all_else_is_the_inner_sources(tmp_path: Path) -> None:
    _, _, plain = source_of(composed(tmp_path / "plain", "watcher"))
    ctx, _, source = source_of(composed(tmp_path / "with", "watcher", "reference"))
    assert isinstance(source, RowSource)
    assert source.total_steps == plain.total_steps
    assert len(source.examples) == len(plain.examples)
    steps, plain_steps = iter(source), iter(plain)
    for _ in range(2):
        assert source.state_dict() == plain.state_dict()
        assert source.epoch == plain.epoch
        for batch, other in zip(next(steps), next(plain_steps), strict=True):
            assert source.describe(batch) == plain.describe(other)
            assert batch.rows == other.rows
            assert torch.equal(batch.input_ids_BT, other.input_ids_BT)
            assert batch.extra.keys() - other.extra.keys() == {"reference_logps"}
    assert source.take() == plain.take()
    place = source.state_dict()
    _, _, again = source_of(composed(tmp_path / "again", "watcher", "reference"))
    again.load_state_dict(place)
    assert next(iter(again))[0].rows == next(iter(plain))[0].rows
    assert not hasattr(source, "state_scope")
    assert "trainer/batches" in ctx.states


def test_rows_that_are_laid_out_for_others_have_it_too(tmp_path: Path) -> None:
    _, _, source = source_of(composed(tmp_path, "watcher", "reference"))
    start = expected([5, 3])
    for batch in source.lay_out([pair(5), pair(3)]):
        for at, row in enumerate(batch.rows):
            logps = batch.extra["reference_logps"].value[batch.document_N // 2 == at]
            torch.testing.assert_close(logps, start[row], rtol=1e-5, atol=1e-5)


def test_rows_that_are_laid_out_for_others_were_not_precomputed(tmp_path: Path) -> None:
    reference = {"how": "precomputed", "cache": str(tmp_path / "cache")}
    _, _, source = source_of(composed(tmp_path, "watcher", "reference", reference=reference))
    with pytest.raises(RunError, match="is not the row whose reference was computed"):
        source.lay_out([pair(5), pair(3)])
