"""Which rows a step takes, who gets them, and what their tensors are."""

from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import numpy
import pytest
import tiny_llama
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pegbox.errors import DataError, RunError
from pegbox.rows import UNTRAINED, Batch, Example
from pegbox_trainer.batches import EvalBatches, TrainBatches, deal
from pegbox_trainer.collation import collate
from pegbox_trainer.config import TrainerConfig

PAD = 99


def context(rank: int = 0, ranks: int = 1, seed: int = 0, **keys: Any) -> Any:
    """What a batch source reads of a context."""
    config = TrainerConfig(**keys)
    return SimpleNamespace(
        section=lambda schema: config,
        runtime=SimpleNamespace(rank=rank, world_size=ranks, device=torch.device("cpu")),
        processor=SimpleNamespace(pad_id=PAD),
        rng=lambda name, step=0: SimpleNamespace(seed=crc32(f"{seed}/{name}/{step}".encode())),
    )


def rows_of(count: int, split: str = "train", **keys: Any) -> tiny_llama.Rows:
    return tiny_llama.Rows(tiny_llama.TinyLlamaConfig(rows=count, eval_rows=count, **keys), split)


def steps_of(rows: tiny_llama.Rows, ranks: int, **keys: Any) -> list[list[tuple[Batch, ...]]]:
    """Micro-batches by step and rank."""
    sources = [TrainBatches(context(rank, ranks, **keys), rows) for rank in range(ranks)]
    return [[tuple(batches) for batches in step] for step in zip(*sources, strict=True)]


def rows_by_step(steps: list[list[tuple[Batch, ...]]]) -> list[list[int]]:
    return [sorted(row for rank in step for batch in rank for row in batch.rows) for step in steps]


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 40),
    micro_batch=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    ranks=st.integers(1, 4),
    shuffle=st.booleans(),
)
def test_every_row_is_trained_once_per_epoch(
    count: int, micro_batch: int, accumulation: int, ranks: int, shuffle: bool
) -> None:
    keys = {"micro_batch": micro_batch, "accumulation": accumulation, "shuffle": shuffle, "epochs": 2}
    steps = rows_by_step(steps_of(rows_of(count), ranks, **keys))
    per_epoch = len(steps) // 2
    for epoch in (steps[:per_epoch], steps[per_epoch:]):
        assert sorted(itertools.chain(*epoch)) == list(range(count))
    full = micro_batch * accumulation * ranks
    assert [len(rows) for rows in steps[:per_epoch]][:-1] == [full] * (per_epoch - 1)


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 50), seed=st.integers(0, 5), split=st.sampled_from([(1, 8), (2, 4), (4, 2), (8, 1)]))
def test_the_rows_of_each_step_are_the_same_on_any_number_of_processes(
    count: int, seed: int, split: tuple[int, int]
) -> None:
    rows, (ranks, accumulation) = rows_of(count), split
    alone = steps_of(rows, 1, seed=seed, micro_batch=1, accumulation=8, epochs=3)
    together = steps_of(rows, ranks, seed=seed, micro_batch=1, accumulation=accumulation, epochs=3)
    assert rows_by_step(together) == rows_by_step(alone)


def test_epochs_differ_and_depend_on_the_seed_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        steps = list(TrainBatches(context(seed=seed, micro_batch=1, batch=4, epochs=2), rows_of(32)))
        return [row for step in steps[8 * epoch : 8 * epoch + 8] for batch in step for row in batch.rows]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_without_shuffle_rows_come_in_the_order_of_the_data() -> None:
    steps = steps_of(rows_of(7), 1, shuffle=False, micro_batch=3, max_steps=4)
    assert rows_by_step(steps) == [[0, 1, 2], [3, 4, 5], [6], [0, 1, 2]]


@settings(deadline=None, max_examples=100)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    micro_batch=st.integers(1, 6),
    ranks=st.integers(1, 5),
)
def test_dealing_gives_each_rank_as_many_micro_batches_and_each_row_once(
    lengths: list[int], micro_batch: int, ranks: int
) -> None:
    dealt = deal(lengths, micro_batch, ranks)
    assert len(dealt) == ranks
    rounds = -(-len(lengths) // (micro_batch * ranks))
    assert {len(batches) for batches in dealt} == {rounds}
    flat = [row for batches in dealt for batch in batches for row in batch]
    assert sorted(flat) == list(range(len(lengths)))
    sizes = [len(batch) for batches in dealt for batch in batches]
    assert max(sizes) <= micro_batch
    assert max(sizes) - min(sizes) <= 1, "no micro-batch is empty unless there are fewer rows than micro-batches"


def test_dealing_by_length_pads_little_and_loads_ranks_evenly() -> None:
    lengths = [int(length) for length in numpy.random.default_rng(0).integers(10, 1000, size=64)]

    def padded(batches: list[list[int]]) -> int:
        return sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)

    dealt = deal(lengths, 4, 4)
    in_order = [list(range(start, start + 4)) for start in range(0, 64, 4)]
    loads = [padded(batches) for batches in dealt]
    assert sum(loads) < 1.1 * sum(lengths) < padded(in_order)
    assert max(loads) < 1.1 * min(loads)


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 70), micro_batch=st.integers(1, 3), ranks=st.integers(1, 3))
def test_evaluation_sees_every_row_once_over_all_ranks(count: int, micro_batch: int, ranks: int) -> None:
    rows = rows_of(count, "eval")
    sources = [EvalBatches(context(rank, ranks, eval_micro_batch=micro_batch), rows) for rank in range(ranks)]
    for _ in range(2):
        steps = [list(source) for source in sources]
        seen = Counter(row for step in itertools.chain(*steps) for batch in step for row in batch.rows)
        assert seen == dict.fromkeys(range(count), 1)
        assert len({tuple(len(step) for step in source) for source in steps}) == 1, "ranks forward in step"


@settings(deadline=None, max_examples=30)
@given(stop=st.integers(0, 11))
def test_a_source_goes_on_where_its_state_says(stop: int) -> None:
    def fresh() -> TrainBatches:
        return TrainBatches(context(micro_batch=2, accumulation=2, max_steps=11), rows_of(18))

    whole = [[batch.rows for batch in step] for step in fresh()]
    first = fresh()
    head = [[batch.rows for batch in step] for step in itertools.islice(first, stop)]
    second = fresh()
    second.load_state_dict(first.state_dict())
    assert second.epoch == first.epoch == pytest.approx(stop // 5 + stop % 5 * 4 / 18)
    tail = [[batch.rows for batch in step] for step in second]
    assert head + tail == whole
    assert len(whole) == 11


@pytest.mark.parametrize(
    ("keys", "steps"),
    [({}, 5), ({"epochs": 3}, 15), ({"epochs": 0.5}, 3), ({"max_steps": 7}, 7), ({"accumulation": 2}, 3)],
)
def test_the_length_of_a_run_follows_from_its_settings(keys: dict[str, Any], steps: int) -> None:
    source = TrainBatches(context(micro_batch=4, **keys), rows_of(18))
    assert source.total_steps == steps == len(list(source))


documents = st.lists(st.integers(1, 6), min_size=1, max_size=4)


@st.composite
def examples(draw: Any) -> Example:
    lengths = tuple(draw(documents))
    total = sum(lengths)
    ids = draw(st.lists(st.integers(1, 50), min_size=total, max_size=total))
    trained = draw(st.lists(st.booleans(), min_size=total, max_size=total))
    labels = [token if keep else UNTRAINED for token, keep in zip(ids, trained, strict=True)]
    packed = len(lengths) > 1 or draw(st.booleans())
    return Example(input_ids=ids, labels=labels, documents=lengths if packed else ())


@settings(deadline=None, max_examples=150)
@given(rows=st.lists(examples(), min_size=1, max_size=5))
def test_targets_are_the_next_token_of_the_same_document(rows: list[Example]) -> None:
    batch = collate([[(row, example)] for row, example in enumerate(rows)], PAD, str)
    expected = torch.full_like(batch.targets_BT, UNTRAINED)
    for b, row in enumerate(rows):
        start = 0
        for length in row.documents or (len(row.input_ids),):
            for t in range(start, start + length - 1):
                expected[b, t] = row.labels[t + 1]
            start += length
    assert torch.equal(batch.targets_BT, expected)
    assert torch.equal(batch.trained_N, (expected.flatten() != UNTRAINED).nonzero().flatten())
    assert batch.trained_tokens == int((expected != UNTRAINED).sum())
    assert batch.rows == tuple(range(len(rows)))


@settings(deadline=None, max_examples=150)
@given(rows=st.lists(examples(), min_size=1, max_size=5))
def test_positions_and_borders_separate_documents_and_padding(rows: list[Example]) -> None:
    batch = collate([[(row, example)] for row, example in enumerate(rows)], PAD, str)
    lengths = [len(row.input_ids) for row in rows]
    longest = max(lengths)
    for b, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        assert batch.input_ids_BT[b].tolist() == [*row.input_ids, *[PAD] * (longest - length)]
    if not any(row.documents for row in rows):
        assert batch.cu_seqlens_S is None
        assert batch.position_ids_BT is None
        mask = batch.attention_mask_BT
        assert (mask is None) == (min(lengths) == longest), "no mask where there is no padding"
        assert mask is None or mask.sum(1).tolist() == lengths
        return
    assert batch.attention_mask_BT is None
    parts = []
    for row, length in zip(rows, lengths, strict=True):
        parts += [*(row.documents or (length,)), *([longest - length] if length < longest else [])]
    assert batch.cu_seqlens_S.diff().tolist() == parts
    assert batch.cu_seqlens_S.dtype == torch.int32
    assert batch.max_seqlen == max(parts)
    assert batch.position_ids_BT.flatten().tolist() == [at for part in parts for at in range(part)]


def test_a_micro_batch_without_rows_is_untrained_padding() -> None:
    batch = collate([], PAD, str)
    assert set(batch.input_ids_BT.flatten().tolist()) == {PAD}
    assert set(batch.targets_BT.flatten().tolist()) == {UNTRAINED}
    assert batch.trained_tokens == 0
    assert batch.rows == ()
    source = TrainBatches(context(rank=0, ranks=4, micro_batch=1), rows_of(1))
    assert [source.describe(batch) for batch in next(iter(source))] == ["no row"]


def test_a_micro_batch_without_rows_is_packed_where_the_others_of_its_step_are() -> None:
    batch = collate([], PAD, str, packed=True)
    assert batch.cu_seqlens_S is not None
    assert batch.position_ids_BT is not None
    assert (batch.cu_seqlens_S.tolist(), batch.position_ids_BT.tolist()) == ([0, 2], [[0, 1]])
    assert batch.trained_tokens == 0


def test_arrays_and_lists_make_the_same_batch() -> None:
    row = Example(input_ids=[5, 6, 7, 8], labels=[UNTRAINED, 6, 7, 8], documents=(2, 2))
    arrays = Example(input_ids=numpy.array([5, 6, 7, 8]), labels=numpy.array([-100, 6, 7, 8]), documents=(2, 2))
    for name in ("input_ids_BT", "targets_BT", "trained_N", "position_ids_BT", "cu_seqlens_S"):
        made = [getattr(collate([[(0, example)]], 0, str), name) for example in (row, arrays)]
        assert torch.equal(*made)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Example(input_ids=[], labels=[]), "train.jsonl:8 has no token"),
        (Example(input_ids=[1, 2], labels=[1]), "train.jsonl:8 has 2 tokens and 1 labels"),
        (Example(input_ids=[1, 2], labels=[1, 2], documents=(1, 2)), "has 2 tokens, but its documents"),
        (Example(input_ids=[1, 2], labels=[1, 2], documents=(2, 0)), "has 2 tokens, but its documents"),
    ],
)
def test_a_row_that_cannot_be_is_named(row: Example, message: str) -> None:
    with pytest.raises(DataError, match=message):
        collate([[(7, row)]], PAD, rows_of(1).describe)


def test_a_step_without_a_trained_token_is_an_error_that_names_its_rows() -> None:
    rows = rows_of(6, untrained=(2, 3))
    source = iter(TrainBatches(context(shuffle=False, micro_batch=2), rows))
    assert sum(batch.trained_tokens for batch in next(source)) > 0
    with pytest.raises(DataError, match=r"no trained token: train\.jsonl:3, train\.jsonl:4"):
        next(source)


def test_a_label_on_the_first_token_alone_trains_nothing() -> None:
    class First(tiny_llama.Rows):
        def __getitem__(self, index: int) -> Example:
            return Example(input_ids=[4, 5, 6, 7], labels=[4, -100, 6, -100], documents=(2, 2))

    with pytest.raises(DataError, match="no trained token"):
        next(iter(TrainBatches(context(micro_batch=2), First(tiny_llama.TinyLlamaConfig(rows=2), "train"))))


def test_no_rows_at_all_are_an_error() -> None:
    with pytest.raises(DataError, match="the train split has no rows"):
        TrainBatches(context(), rows_of(0))


def test_a_state_of_other_data_is_refused() -> None:
    state = TrainBatches(context(micro_batch=2), rows_of(8)).state_dict()
    with pytest.raises(RunError, match="has rows 8, this run has 9"):
        TrainBatches(context(micro_batch=2), rows_of(9)).load_state_dict(state)


def test_a_long_batch_is_described_shortly() -> None:
    source = TrainBatches(context(), rows_of(40))
    batch = collate([[(row, rows_of(40)[row])] for row in range(40)], PAD, str)
    assert source.describe(batch).startswith("train.jsonl:1, train.jsonl:2")
    assert source.describe(batch).endswith("train.jsonl:16 and 24 more")
