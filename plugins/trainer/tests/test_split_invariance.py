"""The loss and the gradient of a step do not depend on how its rows are split, padded, packed or filled up."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_llama
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pegbox.errors import ConfigError, PluginError
from pegbox.rows import Batch, Example
from pegbox.types import LossOutput, Outputs, Term
from pegbox_sft.loss import SftLoss
from pegbox_trainer.batches import deal
from pegbox_trainer.collation import collate
from pegbox_trainer.normalization import count_step

ROWS = tiny_llama.Rows(tiny_llama.TinyLlamaConfig(rows=24, longest=12), "train")
ALONE = SimpleNamespace(world_size=1, rank=0, device=torch.device("cpu"), sum=lambda tensor: tensor)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_llama.build_model()


def value_and_gradient(
    model: torch.nn.Module, step: list[Batch], widen: Callable[[Batch], Batch] = lambda batch: batch
) -> tuple[float, list[torch.Tensor]]:
    """The loss of a step by the loop's own arithmetic, and its gradient."""
    model.zero_grad()
    counts, total = count_step(ALONE, SftLoss(), step), 0.0
    for batch in map(widen, step):
        loss = counts.values(SftLoss()(batch, tiny_llama.compute(model, batch, frozenset({"logps"}))))[0]
        loss.backward()
        total += loss.item()
    return total, [p.grad.clone() for p in model.parameters()]


def batches(rows: list[int], micro_batch: int, ranks: int) -> list[Batch]:
    """The micro-batches of all ranks of a step."""
    dealt = deal([len(ROWS[row].input_ids) for row in rows], micro_batch, ranks)
    return [collate([[(rows[at], ROWS[rows[at]])] for at in part], 0, str) for rank in dealt for part in rank]


def assert_same(left: tuple[float, list[torch.Tensor]], right: tuple[float, list[torch.Tensor]]) -> None:
    assert left[0] == pytest.approx(right[0], rel=2e-6)
    for a, b in zip(left[1], right[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)


rows_of_a_step = st.lists(st.integers(0, 23), min_size=1, max_size=8, unique=True)


@settings(deadline=None, max_examples=25)
@given(rows=rows_of_a_step, micro_batch=st.integers(1, 4), ranks=st.integers(1, 4))
def test_any_split_gives_the_loss_and_gradient_of_the_whole(
    model: torch.nn.Module, rows: list[int], micro_batch: int, ranks: int
) -> None:
    whole = value_and_gradient(model, [collate([[(row, ROWS[row])] for row in rows], 0, str)])
    assert_same(value_and_gradient(model, batches(rows, micro_batch, ranks)), whole)


@settings(deadline=None, max_examples=15)
@given(rows=rows_of_a_step, filler=st.integers(0, 126), empty=st.integers(0, 3))
def test_padding_and_empty_micro_batches_change_nothing(
    model: torch.nn.Module, rows: list[int], filler: int, empty: int
) -> None:
    pairs = [[(row, ROWS[row])] for row in rows]
    whole = value_and_gradient(model, [collate([pair], 0, str) for pair in pairs])
    # A row of 20 tokens, none of them trained, pads all others to its length.
    longest = [(24, Example(input_ids=[5] * 20, labels=[-100] * 20))]
    padded = [collate([*pairs, longest], filler, str), *[collate([], filler, str)] * empty]
    assert_same(value_and_gradient(model, padded), whole)


@settings(deadline=None, max_examples=15)
@given(rows=rows_of_a_step)
def test_packed_documents_train_as_if_each_were_a_row(model: torch.nn.Module, rows: list[int]) -> None:
    apart = value_and_gradient(model, [collate([[(row, ROWS[row])]], 0, str) for row in rows])
    packed = Example(
        input_ids=[token for row in rows for token in ROWS[row].input_ids],
        labels=[label for row in rows for label in ROWS[row].labels],
        documents=tuple(len(ROWS[row].input_ids) for row in rows),
    )
    short = [(1, Example(input_ids=[7, 8], labels=[-100, -100], documents=(1, 1)))]
    assert_same(value_and_gradient(model, [collate([[(0, packed)], short], 0, str)]), apart)


class TwoTerms:
    """A loss of two terms with counts of their own."""

    needs = frozenset({"logps"})
    scope = "token"

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"tokens": float(batch.trained_tokens), "rows": float(len(batch.rows))}

    def __call__(self, batch: Batch, outputs: Outputs) -> LossOutput:
        counts = self.counts(batch)
        tokens = Term(name="tokens", total=-outputs.logps_N.sum(), count=counts["tokens"], weight=0.5)
        rows = Term(name="rows", total=outputs.logps_N.square().sum(), count=counts["rows"])
        return LossOutput(terms=(rows, tokens))


def test_terms_are_divided_by_their_own_counts_and_weighed(model: torch.nn.Module) -> None:
    step = batches(list(range(7)), 2, 1)
    counts = count_step(ALONE, TwoTerms(), step)
    values = torch.zeros(3)
    logps = []
    for batch in step:
        outputs = tiny_llama.compute(model, batch, frozenset({"logps"}))
        logps.append(outputs.logps_N)
        values = values + counts.values(TwoTerms()(batch, outputs))
    every = torch.cat(logps)
    tokens, rows = -every.mean(), every.square().sum() / 7
    assert counts.names == ("tokens", "rows")
    torch.testing.assert_close(values, torch.stack([0.5 * tokens + rows, tokens, rows]))


def test_a_term_that_nothing_of_the_step_belongs_to_is_zero() -> None:
    batch = collate([], 0, str)
    counts = count_step(ALONE, TwoTerms(), [batch])
    values = counts.values(TwoTerms()(batch, Outputs(logps_N=torch.zeros(0, requires_grad=True))))
    assert values.tolist() == [0.0, 0.0, 0.0]
    assert bool(counts.nothing)


def test_a_loss_that_returns_other_terms_than_it_counts_is_an_error() -> None:
    class Other(TwoTerms):
        def counts(self, batch: Batch) -> dict[str, float]:
            return {"tokens": 1.0}

    batch = collate([[(0, ROWS[0])]], 0, str)
    counts = count_step(ALONE, Other(), [batch])
    output = TwoTerms()(batch, Outputs(logps_N=torch.zeros(batch.trained_tokens)))
    with pytest.raises(PluginError, match=r"returned the terms \['rows', 'tokens'\] but counted \['tokens'\]"):
        counts.values(output)


@pytest.mark.parametrize(("ranks", "parts", "refused"), [(1, 1, False), (1, 2, True), (2, 1, True)])
def test_a_loss_over_a_whole_batch_refuses_a_split(ranks: int, parts: int, refused: bool) -> None:
    class Whole(SftLoss):
        scope = "batch"

    runtime: Any = SimpleNamespace(**{**vars(ALONE), "world_size": ranks})
    step = [collate([[(row, ROWS[row])]], 0, str) for row in range(parts)]
    if not refused:
        assert count_step(runtime, Whole(), step).names == ("sft",)
        return
    with pytest.raises(ConfigError, match="needs the whole batch at once"):
        count_step(runtime, Whole(), step)
