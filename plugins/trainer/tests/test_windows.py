"""Bins and streams: every row once, the same rows in each step on any number of processes, and exact places."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pegbox.errors import ConfigError, RunError
from pegbox.rows import Batch, Example, ExampleStream, PackedExamples
from pegbox_trainer.batches import EvalBatches, TrainBatches
from test_batches import PAD, context, rows_by_step, rows_of, steps_of
from tiny_llama import PackedRows, Rows, Stream

CAPACITY = 40


def sources_of(kind: str, count: int, split: str = "train") -> Any:
    rows = rows_of(count, split)
    capacity = CAPACITY if "packed" in kind else None
    if "stream" in kind:
        return Stream(rows, capacity, endless=split == "train")
    return PackedRows(rows, capacity) if capacity else rows


KINDS = ("rows", "packed rows", "stream", "packed stream")


def documents(batch: Batch) -> list[tuple[int, ...]]:
    """The token ids of each document of a batch, padding left out."""
    ids = batch.input_ids_BT
    if batch.cu_seqlens_S is None:
        lengths = ids.shape[1] if batch.attention_mask_BT is None else batch.attention_mask_BT.sum(1).tolist()
        lengths = [lengths] * ids.shape[0] if isinstance(lengths, int) else lengths
        found = [tuple(row[:length].tolist()) for row, length in zip(ids, lengths, strict=True)]
        return [document for document in found if set(document) != {PAD}]
    flat = ids.flatten().tolist()
    found = [tuple(flat[start:end]) for start, end in itertools.pairwise(batch.cu_seqlens_S.tolist())]
    return [document for document in found if set(document) != {PAD}]


def test_the_kinds_of_examples_are_told_apart() -> None:
    assert isinstance(sources_of("packed rows", 3), PackedExamples)
    assert not isinstance(sources_of("rows", 3), PackedExamples | ExampleStream)
    assert isinstance(sources_of("stream", 3), ExampleStream)


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 40), batch=st.integers(1, 9), ranks=st.integers(1, 3), kind=st.sampled_from(KINDS[:2]))
def test_every_document_of_an_epoch_is_trained_once(count: int, batch: int, ranks: int, kind: str) -> None:
    rows = sources_of(kind, count)
    steps = steps_of(rows, ranks, batch=batch, micro_batch=2)
    seen = Counter(document for step in steps for rank in step for made in rank for document in documents(made))
    assert seen == Counter(tuple(rows[index].input_ids) for index in range(count))


@settings(deadline=None, max_examples=40)
@given(kind=st.sampled_from(KINDS), ranks=st.integers(2, 4), micro_batch=st.integers(1, 3), window=st.integers(1, 30))
def test_a_step_takes_the_same_rows_on_any_number_of_processes(
    kind: str, ranks: int, micro_batch: int, window: int
) -> None:
    keys = {"batch": 6, "max_steps": 9, "stream_window": window}
    alone = steps_of(sources_of(kind, 23), 1, micro_batch=6, **keys)
    sources = [
        TrainBatches(context(rank, ranks, micro_batch=micro_batch, **keys), sources_of(kind, 23))
        for rank in range(ranks)
    ]
    together = [[tuple(batches) for batches in step] for step in zip(*sources, strict=True)]
    assert rows_by_step(together) == rows_by_step(alone)


@settings(deadline=None, max_examples=60)
@given(kind=st.sampled_from(KINDS), stop=st.integers(0, 12), window=st.integers(1, 40), again=st.integers(1, 3))
def test_a_source_goes_on_exactly_wherever_it_was_stopped(kind: str, stop: int, window: int, again: int) -> None:
    def fresh(ranks: int = 1) -> TrainBatches:
        keys = {"micro_batch": 2, "batch": 4, "max_steps": 12, "stream_window": window}
        return TrainBatches(context(0, ranks, **keys), sources_of(kind, 19))

    whole = [[batch.input_ids_BT.tolist() for batch in step] for step in fresh()]
    first = fresh()
    head = [[batch.input_ids_BT.tolist() for batch in step] for step in itertools.islice(first, stop)]
    state = first.state_dict()
    for _ in range(again):
        second = fresh()
        second.load_state_dict(state)
        state = second.state_dict()
    assert head + [[batch.input_ids_BT.tolist() for batch in step] for step in second] == whole


def test_a_place_holds_for_another_number_of_processes() -> None:
    keys = {"micro_batch": 1, "batch": 4, "max_steps": 8, "stream_window": 7}
    whole = rows_by_step(steps_of(sources_of("packed stream", 19), 1, **keys))
    two = [TrainBatches(context(rank, 2, **keys), sources_of("packed stream", 19)) for rank in range(2)]
    for source in two:
        list(itertools.islice(source, 3))
    one = TrainBatches(context(0, 1, **keys), sources_of("packed stream", 19))
    one.load_state_dict(two[1].state_dict())
    assert [sorted(row for batch in step for row in batch.rows) for step in one] == whole[3:]


@settings(deadline=None, max_examples=30)
@given(count=st.integers(1, 30), kind=st.sampled_from(KINDS), ranks=st.integers(1, 3), window=st.integers(1, 30))
def test_evaluation_sees_every_document_once_each_time(count: int, kind: str, ranks: int, window: int) -> None:
    rows = rows_of(count, "eval")
    sources = [
        EvalBatches(context(rank, ranks, micro_batch=2, stream_window=window), sources_of(kind, count, "eval"))
        for rank in range(ranks)
    ]
    for _ in range(2):
        seen = Counter(row for one in sources for step in one for batch in step for row in documents(batch))
        assert seen == Counter(tuple(rows[index].input_ids) for index in range(count))


def test_rows_of_a_stream_are_named_by_their_source() -> None:
    source = TrainBatches(context(micro_batch=3, max_steps=2, shuffle=False, stream_window=2), sources_of("stream", 9))
    batches = [batch for step in source for batch in step]
    named = [sorted(source.describe(batch).split(", ")) for batch in batches]
    assert named == [[f"train.jsonl:{row}" for row in rows] for rows in ((1, 2, 3), (4, 5, 6))]


def test_a_stream_needs_a_number_of_steps() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.max_steps is not set"):
        TrainBatches(context(), sources_of("stream", 5))


def test_bins_that_lose_a_row_are_refused() -> None:
    class Losing(PackedRows):
        def bins(self, order: Any) -> list[list[int]]:
            return super().bins(order)[1:]

    with pytest.raises(RunError, match="packing put 9 rows into bins"):
        TrainBatches(context(), Losing(rows_of(9), CAPACITY))


def test_a_batch_of_another_size_says_how_to_go_on() -> None:
    state = TrainBatches(context(0, 2, micro_batch=2), rows_of(9)).state_dict()
    with pytest.raises(RunError, match="takes 4 rows over all processes, one of this run 2") as failure:
        TrainBatches(context(0, 1, micro_batch=2), rows_of(9)).load_state_dict(state)
    assert "trainer.batch=4" in failure.value.next
    TrainBatches(context(0, 1, micro_batch=2, batch=4), rows_of(9)).load_state_dict(state)


def test_the_first_epoch_alone_does_not_decide_how_long_a_packed_run_is() -> None:
    source = TrainBatches(context(micro_batch=1, epochs=3), PackedRows(rows_of(40), CAPACITY))
    assert source.total_steps == sum(1 for _ in source)
    assert isinstance(rows_of(1), Rows)


def test_prompts_are_counted_one_by_one_where_completions_are_packed() -> None:
    """A step takes as many prompts as the config says; what is made from them shares bins again."""
    prompts = PackedRows(Prompts(rows_of(12)), CAPACITY)
    source = TrainBatches(context(micro_batch=2, batch=4, epochs=2), prompts)
    taken = [[row for row, _ in step] for step in iter(source.take, [])]
    assert source.total_steps == 6
    assert [len(rows) for rows in taken] == [4] * 6
    assert sorted(row for rows in taken[:3] for row in rows) == list(range(12))
    answers = [Example(input_ids=[1, 2, 3], labels=[-100, 2, 3]) for _ in range(4)]
    (batch,) = source.lay_out(answers)
    assert batch.cu_seqlens_S is not None
    assert sorted(batch.rows) == [0, 1, 2, 3]
    assert batch.trained_tokens == 8


class Prompts:
    """Rows of which no token is trained."""

    def __init__(self, rows: Any) -> None:
        self.split, self.fingerprint, self._rows = rows.split, rows.fingerprint, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        return replace(self._rows[index], labels=[-100] * len(self._rows[index].input_ids))

    def describe(self, index: int) -> str:
        return self._rows.describe(index)
