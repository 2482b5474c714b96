"""Figures that are declared as extremes: exact over micro-batches, ranks, the steps of a window, and a resume."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pegbox.errors import PluginError
from pegbox.events import Signal, Stepped
from pegbox.hooks import hookimpl
from pegbox.types import Item, LossOutput, Term
from pegbox_trainer.metrics import EXTREMES, Sums
from tiny_runs import assert_same_run, records, run, tiny_config

NAMES = {"low": EXTREMES["min"], "high": EXTREMES["max"]}


def sums_of(values: Sequence[float | None], on_device: bool) -> Sums:
    """What one rank has after micro-batches with one value each; None: it counts nothing, whatever it says."""
    sums = Sums(torch.device("cpu"), NAMES)
    for value in values:
        count: Any = float(value is not None)
        total = torch.tensor(1e9 if value is None else value)
        shared = {"total": total, "count": torch.tensor(count) if on_device else count}
        sums.add([Term(name="low", **{**shared, "total": total if value is not None else -total})])
        sums.add([Term(name="high", **shared)])
        sums.add([Term(name="mean", total=torch.tensor(value or 0.0), count=count)])
    return sums


def read(ranks: Sequence[Sums]) -> dict[str, float]:
    """The figures that all ranks get: each gives its own part to the others."""
    told: list[object] = []
    for sums in ranks:
        sums.values(SimpleNamespace(gather_objects=lambda own: [told.append(own), []][1:]))  # type: ignore[arg-type]
    return ranks[0].values(SimpleNamespace(gather_objects=lambda _: told))  # type: ignore[arg-type]


values_of_ranks = st.lists(
    st.lists(st.one_of(st.none(), st.integers(-50, 50).map(float)), max_size=5), min_size=1, max_size=4
)


@settings(deadline=None, max_examples=60)
@given(ranks=values_of_ranks, on_device=st.booleans(), stopped=st.booleans())
def test_extremes_are_those_of_all_values(ranks: list[list[float | None]], on_device: bool, stopped: bool) -> None:
    every = [value for rank in ranks for value in rank if value is not None]
    held = [sums_of(rank, on_device) for rank in ranks]
    if stopped:  # and gone on by one process
        alone = Sums(torch.device("cpu"), NAMES)
        alone.load_rank_states([sums.state_dict() for sums in held])
        held = [alone]
    found = read(held)
    assert found.keys() == ({"low", "high", "mean"} if every else set())
    if every:
        assert (found["low"], found["high"]) == (min(every), max(every))
        assert found["mean"] == pytest.approx(sum(every) / len(every))


class Lengths:
    """Logs how many trained tokens rows have: fewest, most, the mean; stops the run at a step."""

    def __init__(self, stop: int | None = None, which: str = "max") -> None:
        self.stop, self.which = stop, which

    @hookimpl
    def register_items(self) -> list[Item]:
        names = {"shortest": "min", "longest": self.which}
        return [Item(kind="metric", name=name, target=which) for name, which in names.items()]

    @hookimpl(wrapper=True)
    def build_loss(self) -> Any:
        inner = yield

        class Logging:
            needs, scope = inner.needs, inner.scope
            counts = staticmethod(inner.counts)

            def __call__(self, batch: Any, outputs: Any) -> LossOutput:
                made = inner(batch, outputs)
                tokens_B = torch.bincount(batch.document_N, minlength=len(batch.rows)).float()
                figures = {"shortest": tokens_B.min(), "longest": tokens_B.max()}
                terms = [Term(name=name, total=value, count=1.0) for name, value in figures.items()]
                mean = Term(name="length", total=tokens_B.sum(), count=float(len(tokens_B)))
                return LossOutput(terms=made.terms, metrics=(*made.metrics, *terms, mean))

        return Logging()

    @hookimpl
    def on_event(self, event: Any) -> Signal | None:
        return Signal.STOP if isinstance(event, Stepped) and event.step == self.stop else None


def lengths_run(folder: Path, probe: Lengths, **keys: Any) -> list[dict[str, Any]]:
    settings = {"max_steps": 6, "log_every": 3, "batch": 4, **keys}
    run(tiny_config(folder, plugins=["lengths"], **settings), lengths=probe)
    return records(folder)


def test_no_split_changes_an_extreme_and_a_window_has_one(tmp_path: Path) -> None:
    tiny = {"eval_rows": 6}
    whole = lengths_run(tmp_path / "whole", Lengths(), micro_batch=4, eval_at_end=True, tiny=tiny)
    split = lengths_run(tmp_path / "split", Lengths(), micro_batch=1, eval_at_end=True, tiny=tiny)
    single = [one for one in lengths_run(tmp_path / "steps", Lengths(), log_every=1) if one["kind"] == "train"]
    for one, other in zip(whole, split, strict=True):
        named = ["shortest", "longest", "length"] if one["kind"] == "train" else ["eval_shortest", "eval_longest"]
        assert {name: one[name] for name in named} == {name: other[name] for name in named}
    for at, window in enumerate(one for one in whole if one["kind"] == "train"):
        steps = single[3 * at : 3 * at + 3]
        assert window["shortest"] == min(one["shortest"] for one in steps)
        assert window["longest"] == max(one["longest"] for one in steps)
        assert window["shortest"] < window["length"] < window["longest"]


def test_a_run_stopped_within_a_window_logs_the_extremes_of_all_of_it(tmp_path: Path) -> None:
    lengths_run(tmp_path / "whole", Lengths(), save_every=2)
    lengths_run(tmp_path / "parted", Lengths(stop=2), save_every=2)
    lengths_run(tmp_path / "parted", Lengths(), save_every=2, resume="auto")
    assert records(tmp_path / "whole")[0]["longest"] > 0
    assert_same_run(tmp_path / "whole", tmp_path / "parted", 6)


def test_a_figure_is_declared_as_min_or_max(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="the metric 'longest' is declared as 'median'"):
        lengths_run(tmp_path / "run", Lengths(which="median"))
