"""The divergence is that of the whole step, the same for every split of it, and measured as it should be."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from kto_rows import (
    LOGPS,
    Rows,
    Tiny,
    assert_same,
    example_of,
    pair_of,
    random_answers,
    source_of,
    value_and_gradient,
)
from pegbox.errors import ConfigError, DataError, PluginError
from pegbox.rows import Batch
from pegbox.testing.tiny import collate, compute, tiny_model
from pegbox_kto.batches import with_step_figures
from pegbox_kto.config import KtoConfig
from pegbox_kto.loss import KtoLoss
from pegbox_kto.mismatch import mismatched

ROWS = [example_of(answer) for answer in random_answers(7, seed=4)]
PAIRS = [pair_of(*random_answers(10, seed=9)[at : at + 2]) for at in range(0, 10, 2)]


def kl_of(batches: list[Batch]) -> float:
    """The one divergence that all micro-batches carry."""
    values = {batch.extra["kto_kl"].value.item() for batch in batches}
    assert len(values) == 1
    assert not any(batch.extra["kto_kl"].value.requires_grad for batch in batches)
    return values.pop()


def plain_kl(rows: list) -> float:
    """By a forward for each mismatched document."""
    total, made = 0.0, mismatched(rows, rows[-1])
    for example in made:
        batch = collate([example])
        ours, reference = (compute(tiny_model(seed=seed).module, batch, LOGPS).logps_N for seed in (0, 1))
        total += (ours - reference).sum().item()
    return max(total / len(made), 0.0)


@pytest.mark.parametrize("rows", [ROWS, PAIRS], ids=["answers", "preferences"])
@pytest.mark.parametrize(
    "settings",
    [
        {"micro_batch": 1},
        {"micro_batch": 3},
        {"micro_batch": 1, "plugins": ("packing", "given", "kto"), "packing": {"length": 48}},
    ],
    ids=["alone", "together", "packed"],
)
def test_every_split_of_a_step_has_the_same_loss_and_divergence(
    rows: list, settings: dict[str, Any], tmp_path: Path
) -> None:
    whole, model, _ = source_of(tmp_path / "a", Tiny(rows), micro_batch=16)
    split, _, _ = source_of(tmp_path / "b", Tiny(rows), **settings)
    whole_step, split_step = next(iter(whole)), next(iter(split))
    assert len(whole_step) == 1 < len(split_step)
    assert kl_of(whole_step) == pytest.approx(plain_kl(rows), rel=1e-5)
    assert plain_kl(rows) > 0
    loss = KtoLoss(KtoConfig())
    assert_same(value_and_gradient(loss, split_step, model), value_and_gradient(loss, whole_step, model))


def test_ranks_measure_one_divergence_together(tmp_path: Path) -> None:
    """Two ranks, each in a thread, that add up what they have in turn."""
    barrier, shared = threading.Barrier(2, timeout=20), {}

    def rank_of(rank: int) -> Any:
        def add(tensor: torch.Tensor) -> torch.Tensor:
            shared[rank] = tensor
            barrier.wait()
            total = shared[0] + shared[1]
            barrier.wait()
            return total

        runtime = SimpleNamespace(rank=rank, local_rank=0, world_size=1, device=torch.device("cpu"), sum=add)
        runtime.precision = "fp32"
        inner, model, _ = source_of(tmp_path / str(rank), Tiny(ROWS), plugins=("given", "sft"), runtime=runtime)
        # One process each: only how rows are dealt out is that of two.
        inner._source._rank, inner._source._ranks = rank, 2
        return with_step_figures(inner, cast("Any", runtime), model, KtoConfig())

    sources, made = [rank_of(0), rank_of(1)], {}
    threads = [
        threading.Thread(target=lambda r=rank: made.update({r: list(next(iter(sources[r])))}), daemon=True)
        for rank in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(row for batches in made.values() for batch in batches for row in batch.rows) == list(range(7))
    assert kl_of(made[0] + made[1]) == pytest.approx(plain_kl(ROWS), rel=1e-5)
    answers = {tuple(batch.extra["kto_answers"].value.tolist()) for batch in made[0] + made[1]}
    assert answers == {(4.0, 3.0)}


def test_batches_name_the_rows_they_hold(tmp_path: Path) -> None:
    source, _, _ = source_of(tmp_path / "run", Tiny(ROWS), micro_batch=2, batch=4, shuffle=True)
    seen = []
    for step in source:
        for batch in step:
            assert batch.last_D is not None
            width = batch.input_ids_BT.shape[1]
            for line, (row, last) in enumerate(zip(batch.rows, batch.last_D.tolist(), strict=True)):
                assert batch.input_ids_BT[line, : last - line * width + 1].tolist() == list(ROWS[row].input_ids)
            seen += batch.rows
            assert source.describe(batch).startswith(f"answer {batch.rows[0]}")
    assert sorted(seen) == sorted([*range(7)] * 3)


def test_steps_take_the_rows_they_take_without_it(tmp_path: Path) -> None:
    settings = {"micro_batch": 2, "batch": 4, "shuffle": True}
    ours, _, _ = source_of(tmp_path / "a", Tiny(ROWS), **settings)
    plain, _, _ = source_of(tmp_path / "b", Tiny(ROWS), plugins=("sft",), **settings)
    assert ours.total_steps == plain.total_steps == 6
    assert [[b.rows for b in step] for step in ours] == [[b.rows for b in step] for step in plain]
    assert ours.epoch == plain.epoch == 3.0


def test_a_source_goes_on_from_its_state(tmp_path: Path) -> None:
    first, _, _ = source_of(tmp_path / "a", Tiny(ROWS), batch=4)
    steps = iter(first)
    next(steps)
    state = first.state_dict()
    expected = next(steps)
    second, _, _ = source_of(tmp_path / "b", Tiny(ROWS), batch=4)
    second.load_state_dict(state)
    resumed = next(iter(second))
    assert [batch.rows for batch in resumed] == [batch.rows for batch in expected]
    assert kl_of(resumed) == kl_of(expected)


def test_the_only_row_of_a_step_borrows_the_answer_of_the_row_before(tmp_path: Path) -> None:
    source, _, _ = source_of(tmp_path / "run", Tiny(ROWS[:5]), batch=4)
    steps = iter(source)
    next(steps)
    (batch,) = next(steps)
    assert batch.rows == (4,)
    document = collate(mismatched([ROWS[4]], ROWS[3]))
    ours, reference = (compute(tiny_model(seed=seed).module, document, LOGPS).logps_N for seed in (0, 1))
    assert kl_of([batch]) == pytest.approx(max((ours - reference).sum().item(), 0.0), rel=1e-5)


def test_dropout_is_off_while_the_divergence_is_measured(tmp_path: Path) -> None:
    source, model, _ = source_of(tmp_path / "run", Tiny(ROWS, attention_dropout=0.5))
    assert kl_of(next(iter(source))) == pytest.approx(plain_kl(ROWS), rel=1e-5)
    assert all(part.training for part in model.module.modules())


@pytest.mark.parametrize("eval_micro_batch", [1, 16])
def test_held_out_rows_have_one_divergence_over_all_of_them(eval_micro_batch: int, tmp_path: Path) -> None:
    tiny = Tiny(ROWS[:3], ROWS * 40)
    source, _, _ = source_of(tmp_path / "run", tiny, "eval", eval_micro_batch=eval_micro_batch)
    windows = list(source)
    assert len(windows) == {1: 18, 16: 2}[eval_micro_batch]
    assert kl_of([batch for window in windows for batch in window]) == pytest.approx(plain_kl(ROWS), rel=1e-4)
    assert windows[0][0].extra["kto_answers"].value.tolist() == [160.0, 120.0]


def test_what_cannot_be_mismatched_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the train split has 1 row"):
        source_of(tmp_path / "one", Tiny(ROWS[:1]))
    source_of(tmp_path / "apo", Tiny(ROWS[:1]), kto={"loss": "apo_zero_unpaired"})

    plain = cast("Any", SimpleNamespace(examples=Rows(ROWS), total_steps=None))
    with pytest.raises(PluginError, match="the source of train batches, SimpleNamespace, does not hand out rows"):
        with_step_figures(plain, cast("Any", None), tiny_model(), KtoConfig())


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_source_that_lays_out_documents_without_reference_is_refused(split: str, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="laid out came without reference_logps"):
        source_of(tmp_path / "run", Tiny(ROWS, ROWS), split, plugins=("kto",))


class Stream:
    """Rows that are read once."""

    fingerprint = "stream"

    def __init__(self, split: str) -> None:
        self.split, self._at = split, 0

    def take(self, rows: int) -> Rows:
        self._at += rows
        return Rows([ROWS[at % 7] for at in range(self._at - rows, self._at)], self.split)

    def state_dict(self) -> dict[str, object]:
        return {"at": self._at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._at = state_dict["at"]


class Streaming(Tiny):
    """The same rows as a stream."""

    def build_dataset(self, split: str) -> Any:
        return Stream(split)

    build_dataset.pegbox_impl = Tiny.build_dataset.pegbox_impl  # type: ignore[attr-defined]


def test_a_stream_is_trained_but_not_held_out_and_not_row_by_row(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 2, "epochs": None, "stream_window": 7, "batch": 7}
    source, _, _ = source_of(tmp_path / "train", Streaming(ROWS), **settings)
    assert kl_of(next(iter(source))) == pytest.approx(plain_kl(ROWS), rel=1e-5)
    single, _, _ = source_of(tmp_path / "single", Streaming(ROWS), **{**settings, "batch": 1})
    with pytest.raises(ConfigError, match="a step has one row, 0, of a stream"):
        next(iter(single))
    held_out, _, _ = source_of(tmp_path / "eval", Streaming(ROWS), "eval", **settings)
    with pytest.raises(ConfigError, match="the held-out rows are a stream"):
        next(iter(held_out))
