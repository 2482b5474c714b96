"""Rows stay what they are; bins follow from the order alone; long rows, held-out rows and streams."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from pegbox.errors import ConfigError, DataError
from pegbox.rows import Example, ExampleStream, PackedExamples
from pegbox_packing.config import PackingConfig
from pegbox_packing.packed import PackedRows, packed
from pegbox_packing.report import fullness, refuse_models


class Rows:
    """Rows of given lengths."""

    fingerprint = "rows"

    def __init__(self, lengths: Sequence[int], split: Any = "train") -> None:
        self.split, self._lengths = split, lengths

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> Example:
        tokens = [index] * self._lengths[index]
        return Example(input_ids=tokens, labels=tokens)

    def describe(self, index: int) -> str:
        return f"rows.jsonl:{index + 1}"


class Stream:
    """Rows of length 1, 2, 3, 1, 2, 3 ... without end."""

    split, fingerprint = "train", "stream"

    def __init__(self) -> None:
        self.at = 0

    def take(self, rows: int) -> Rows:
        taken = [(self.at + row) % 3 + 1 for row in range(rows)]
        self.at += rows
        return Rows(taken)

    def state_dict(self) -> dict[str, object]:
        return {"at": self.at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.at = state_dict["at"]


def shuffled(count: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def test_rows_are_handed_on_unchanged() -> None:
    rows = packed(Rows([3, 4, 2]), PackingConfig(length=8))
    assert isinstance(rows, PackedExamples)
    assert (len(rows), rows.split, rows.describe(2)) == (3, "train", "rows.jsonl:3")
    assert [list(rows[index].input_ids) for index in range(3)] == [[0] * 3, [1] * 4, [2] * 2]
    assert rows.fingerprint != Rows([3, 4, 2]).fingerprint


@pytest.mark.parametrize("window", [1, 7, 50, 1000])
def test_bins_follow_from_the_order_and_stay_inside_a_window_of_it(window: int) -> None:
    lengths = [random.Random(row).randint(1, 20) for row in range(200)]
    rows = PackedRows(Rows(lengths), PackingConfig(length=32, window=window))
    order = shuffled(200, seed=1)
    bins = rows.bins(order)
    assert bins == rows.bins(list(order))
    assert sorted(row for chosen in bins for row in chosen) == list(range(200))
    assert all(sum(lengths[row] for row in chosen) <= 32 for chosen in bins)
    place = {row: at for at, row in enumerate(order)}
    assert all(len({place[row] // window for row in chosen}) == 1 for chosen in bins)
    assert bins != rows.bins(shuffled(200, seed=2))


def test_bins_stand_in_the_order_of_their_first_rows() -> None:
    lengths = [random.Random(row).randint(1, 20) for row in range(200)]
    order = shuffled(200, seed=3)
    place = {row: at for at, row in enumerate(order)}
    firsts = [place[chosen[0]] for chosen in PackedRows(Rows(lengths), PackingConfig(length=32)).bins(order)]
    assert firsts == sorted(firsts)


def test_a_row_longer_than_a_bin_is_an_error_that_names_it() -> None:
    with pytest.raises(DataError, match=r"2 of 4 rows .* packing\.length, 8: rows\.jsonl:2 \(9 tokens\)") as failure:
        packed(Rows([8, 9, 1, 30]), PackingConfig(length=8))
    assert "data.max_length=8" in failure.value.next


@pytest.mark.parametrize("wanted", [True, False])
def test_held_out_rows_are_packed_as_the_config_says(wanted: bool) -> None:
    rows = packed(Rows([3, 4], "eval"), PackingConfig(length=8, eval=wanted))
    assert isinstance(rows, PackedExamples) is wanted


def test_a_stream_is_packed_among_the_rows_taken_and_keeps_its_place() -> None:
    stream = packed(Stream(), PackingConfig(length=6))
    assert isinstance(stream, ExampleStream)
    rows = stream.take(6)
    assert isinstance(rows, PackedExamples)
    assert [sum(len(rows[row].input_ids) for row in chosen) for chosen in rows.bins(range(6))] == [6, 6]
    again = packed(Stream(), PackingConfig(length=6))
    again.load_state_dict(stream.state_dict())
    assert len(again.take(2)[0].input_ids) == len(stream.take(2)[0].input_ids) == 1


def test_models_that_mix_a_row_are_refused() -> None:
    refuse_models(SimpleNamespace(name="m", traits=frozenset({"causal"})))
    with pytest.raises(ConfigError, match="m cannot be packed: its linear attention"):
        refuse_models(SimpleNamespace(name="m", traits=frozenset({"causal", "linear_attention"})))


def test_the_start_of_a_run_says_how_full_bins_are() -> None:
    source = SimpleNamespace(examples=PackedRows(Rows([4, 4, 8]), PackingConfig(length=8)))
    assert list(fullness(SimpleNamespace(train=source, eval=None))) == [
        "train: 3 rows in about 2 bins of 8 tokens, 100.0% full"
    ]
