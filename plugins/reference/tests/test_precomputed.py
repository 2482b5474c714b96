"""What was precomputed is complete or absent, is used again by a run that it fits, and never by another one."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pegbox.errors import ConfigError, RunError
from pegbox.events import Event, Stepped
from pegbox.hooks import hookimpl
from pegbox.plan import compose
from pegbox.run import execute
from pegbox_reference import precomputing
from pegbox_reference.precomputing import weights_digest
from pegbox_reference.stored import Row, Stored, Writer
from reference_rows import Rows, Tiny, Watcher, config, expected, run
from torch import nn

SEEDS = range(10)
STEPS = 4


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precomputing, "WINDOW", 4)


def precompute(folder: Path, tiny: Tiny, *plugins: str, cache: Path | None = None, **sections: Any) -> Watcher:
    """A run whose training takes 10 forwards, of two rows each; the pass over ten rows in windows of four takes 5."""
    watcher, reference = Watcher(), {"how": "precomputed", "cache": str(cache or folder.parent / "cache")}
    reference |= sections.pop("reference", {})
    given = {"reference": reference, "trainer": {"accumulation": 2, "max_steps": 5}, **sections}
    run(folder, tiny, *plugins, "watcher", "reference", watcher=watcher, **given)
    return watcher


def values(watcher: Watcher) -> dict[int, torch.Tensor]:
    return {row: reference for seen in watcher.steps for row, (_, reference) in seen.items()}


def test_a_later_run_of_the_same_data_and_model_computes_nothing(tmp_path: Path) -> None:
    first, second, more = Tiny(SEEDS), Tiny(SEEDS), Tiny(SEEDS)
    before = values(precompute(tmp_path / "first", first))
    after = values(precompute(tmp_path / "second", second, adamw={"learning_rate": 3e-2}))
    assert first.forwards - second.forwards == 5
    assert before.keys() == after.keys()
    assert all(torch.equal(before[row], after[row]) for row in before)
    precompute(tmp_path / "third", more, "lora")
    assert more.forwards == first.forwards, "with an adapter the base is another set of trained weights"
    assert len(list((tmp_path / "cache").glob("[0-9a-f]*"))) == 2


@pytest.mark.parametrize("change", ["rows", "weights", "precision"])
def test_other_data_weights_or_arithmetic_are_computed_anew(change: str, tmp_path: Path) -> None:
    precompute(tmp_path / "first", Tiny(SEEDS))
    seeds = [*SEEDS[:-1], 77] if change == "rows" else SEEDS
    tiny = Tiny(seeds, **({"initializer_range": 0.2} if change == "weights" else {}))
    sections = {"trainer": {"precision": "bf16", "max_steps": 1}} if change == "precision" else {}
    precompute(tmp_path / "second", tiny, **sections)
    assert len(list((tmp_path / "cache").glob("[0-9a-f]*"))) == 2


@pytest.mark.parametrize("fails_at", [1, 2, 3, 5])
def test_an_interrupted_pass_goes_on_where_it_was(fails_at: int, tmp_path: Path) -> None:
    tiny, whole = Tiny(SEEDS), Tiny(SEEDS)
    tiny.fails_at = fails_at
    with pytest.raises(KeyboardInterrupt):
        precompute(tmp_path / "first", tiny)
    (partial,) = (tmp_path / "cache").glob("*.partial")
    with (partial / "logps.f32").open("ab") as file:
        file.write(b"torn")
    again = Tiny(SEEDS)
    found = values(precompute(tmp_path / "second", again))
    precompute(tmp_path / "third", whole, cache=tmp_path / "other")
    saved_windows = (fails_at - 1) // 2
    assert whole.forwards - again.forwards == 2 * saved_windows
    assert not list((tmp_path / "cache").glob("*.partial"))
    for row, logps in expected(SEEDS).items():
        torch.testing.assert_close(found[row], logps, rtol=1e-5, atol=1e-5)


class Turned:
    """Wraps `build_batches`: trains other tokens than the dataset has, as a plugin that changes rows would."""

    @hookimpl(wrapper=True)
    def build_batches(self) -> Any:
        source = yield
        inner = source._windows.window

        def turned(number: int) -> Any:
            window = inner(number)
            return type(window)(Rows([*range(100, 110)]), window.bins, window.first)

        source._windows.window = turned
        return source


class Makes:
    """Wraps `build_batches` with a source that makes its rows, as online methods do."""

    @hookimpl(wrapper=True)
    def build_batches(self) -> Any:
        return Made((yield))


class Made:
    """A source that neither hands out rows nor lays them out."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __iter__(self) -> Any:
        return iter(self.source)

    def describe(self, batch: Any) -> str:
        return self.source.describe(batch)

    @property
    def total_steps(self) -> int:
        return self.source.total_steps

    @property
    def examples(self) -> Any:
        return self.source.examples

    def state_dict(self) -> dict[str, object]:
        return self.source.state_dict()

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.source.load_state_dict(state)


def run_with(folder: Path, instance: object, **reference: Any) -> Watcher:
    watcher, section = Watcher(), {"cache": str(folder / "cache"), **reference}
    plan = config(folder, "watcher", "between", "reference", reference=section)
    execute(compose(plan, instances={"tiny": Tiny(SEEDS), "watcher": watcher, "between": instance}))
    return watcher


def test_rows_that_are_not_those_that_were_computed_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not the row whose reference was computed"):
        run_with(tmp_path, Turned(), how="precomputed")


def test_rows_that_are_made_during_the_run_are_refused_and_may_be_computed_as_they_come(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="made during the run"):
        run_with(tmp_path / "first", Makes(), how="precomputed")
    start = expected(SEEDS)
    for row, logps in values(run_with(tmp_path / "second", Makes(), how="copy")).items():
        torch.testing.assert_close(logps, start[row], rtol=1e-5, atol=1e-5)


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    source = np.random.default_rng(0)
    rows = [
        Row([int(n) for n in lengths], int(source.integers(2**32)), source.random(sum(lengths)).astype(np.float32))
        for lengths in ([3, 0], [2], [], [1, 4, 2])
    ]
    writer = Writer(tmp_path / "whole")
    writer.append(rows[:3])
    writer = Writer(tmp_path / "whole")
    assert writer.rows == 3
    assert not (tmp_path / "whole").exists()
    writer.append(rows[3:])
    writer.finish()
    stored = Stored(tmp_path / "whole")
    assert len(stored) == 4
    np.testing.assert_array_equal(stored._logps, np.concatenate([row.logps for row in rows]))
    assert [int(at) for at in stored._documents] == [0, 2, 3, 3, 6]
    assert [int(at) for at in stored._tokens] == [0, 3, 3, 5, 6, 10, 12]
    assert [int(at) for at in stored._targets] == [row.targets for row in rows]


def test_the_digest_of_weights_is_that_of_their_values() -> None:
    def made(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))

    assert weights_digest(made(0), whole=True) == weights_digest(made(0), whole=True)
    assert weights_digest(made(0), whole=True) != weights_digest(made(1), whole=True)
    assert weights_digest(made(0), whole=True) != weights_digest(made(0).bfloat16(), whole=True)
    frozen, other = made(0), made(0)
    for module in (frozen, other):
        module[0].requires_grad_(False)
    with torch.no_grad():
        other[1].weight.add_(1)
    assert weights_digest(frozen, whole=False) == weights_digest(other, whole=False)
    with torch.no_grad():
        other[0].weight[0, 0] += 1e-3
    assert weights_digest(frozen, whole=False) != weights_digest(other, whole=False)


class Looks:
    """Drops the test's own hold on the second model, and looks whether it is still there once training has begun."""

    def __init__(self, tiny: Tiny) -> None:
        self.tiny, self.alive = tiny, True

    @hookimpl
    def on_event(self, event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 1:
            there = weakref.ref(self.tiny.loaded.pop().module)
            gc.collect()
            self.alive = there() is not None


def test_another_model_that_has_computed_everything_is_let_go(tmp_path: Path) -> None:
    tiny = Tiny(SEEDS)
    looks, section = Looks(tiny), {"how": "precomputed", "model": "another", "cache": str(tmp_path / "cache")}
    plan = config(tmp_path, "watcher", "looks", "fused", "reference", reference=section)
    execute(compose(plan, instances={"tiny": tiny, "watcher": Watcher(), "looks": looks}))
    assert not looks.alive
