"""Bins hold every row once and no more than they can; they are those of the plainest best-fit-decreasing."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pegbox_packing.bins import best_fit_decreasing


def plain_best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """The sums of bins, by looking through all of them for each row."""
    sums: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [at for at, used in enumerate(sums) if used + length <= capacity]
        if fitting:
            sums[max(fitting, key=sums.__getitem__)] += length
        else:
            sums.append(length)
    return sorted(sums)


rows = st.integers(1, 60).flatmap(
    lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(1, capacity), max_size=80))
)


@settings(deadline=None, max_examples=300)
@given(rows=rows)
def test_every_row_is_in_one_bin_and_no_bin_overflows(rows: tuple[int, list[int]]) -> None:
    capacity, lengths = rows
    bins = best_fit_decreasing(lengths, capacity)
    assert sorted(position for chosen in bins for position in chosen) == list(range(len(lengths)))
    assert all(sum(lengths[position] for position in chosen) <= capacity for chosen in bins)
    assert all(chosen == sorted(chosen) for chosen in bins)
    assert [chosen[0] for chosen in bins] == sorted(chosen[0] for chosen in bins)


@settings(deadline=None, max_examples=300)
@given(rows=rows)
def test_the_bins_are_those_of_a_search_through_all_bins(rows: tuple[int, list[int]]) -> None:
    capacity, lengths = rows
    sums = sorted(sum(lengths[position] for position in chosen) for chosen in best_fit_decreasing(lengths, capacity))
    assert sums == plain_best_fit_decreasing(lengths, capacity)


@pytest.mark.parametrize("capacity", [2048, 4096, 8192])
@pytest.mark.parametrize("seed", range(3))
def test_lengths_of_text_leave_a_thousandth_of_padding_at_most(capacity: int, seed: int) -> None:
    source = random.Random(seed)
    lengths = [min(max(round(source.lognormvariate(math.log(300), 0.9)), 1), capacity) for _ in range(20_000)]
    fewest = math.ceil(sum(lengths) / capacity)
    assert len(best_fit_decreasing(lengths, capacity)) <= 1.001 * fewest


def test_nothing_needs_no_bin() -> None:
    assert best_fit_decreasing([], 8) == []
