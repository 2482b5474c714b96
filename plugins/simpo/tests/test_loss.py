"""The loss is the same however a step is split, padded or packed; and what it refuses."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pegbox.errors import DataError
from pegbox.rows import Example
from pegbox.testing.batches import pad_batch
from pegbox.testing.tiny import collate, tiny_model
from pegbox.types import Outputs
from pegbox_simpo.config import SimpoConfig
from pegbox_simpo.loss import SimpoLoss, shaped
from simpo_rows import (
    Pair,
    Rows,
    Tiny,
    assert_same,
    example_of,
    filler,
    packed,
    padded,
    random_pairs,
    run,
    value_and_gradient,
)

SETTINGS: list[dict[str, Any]] = [{}, {"sft_weight": 0.5, "alpha": 0.25}]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.mark.parametrize("config", SETTINGS)
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 1000), cuts=st.sets(st.integers(1, 5)), fillers=st.integers(0, 2))
def test_any_split_padding_and_packing_gives_the_same(
    model: Any, config: dict[str, Any], seed: int, cuts: set[int], fillers: int
) -> None:
    loss, pairs = SimpoLoss(SimpoConfig(**config)), random_pairs(6, seed)
    whole = value_and_gradient(loss, [padded(pairs)], model)
    parts = [pairs[a:b] for a, b in itertools.pairwise([0, *sorted(cuts), 6])]
    split = [*(pad_batch(padded(part), 3) for part in parts), *[filler()] * fillers]
    assert_same(value_and_gradient(loss, split, model), whole)
    assert_same(value_and_gradient(loss, [packed(part) for part in parts], model), whole)


@pytest.mark.parametrize("config", SETTINGS)
def test_no_value_of_the_device_is_asked_for(config: dict[str, Any]) -> None:
    """Tensors without values: whatever asked for one would raise."""
    for batch in (padded(random_pairs(3)), packed(random_pairs(2)), filler()):
        away = batch.to(torch.device("meta"))
        logps_N = torch.zeros(batch.trained_tokens, device="meta", requires_grad=True)
        output = SimpoLoss(SimpoConfig(**config))(away, Outputs(logps_N=logps_N))
        assert all(term.total.device.type == "meta" and term.total.requires_grad for term in output.terms)


@pytest.mark.parametrize("config", SETTINGS)
def test_a_micro_batch_without_rows_adds_zero_and_hangs_on_the_graph(config: dict[str, Any]) -> None:
    logps_N = torch.zeros(0, requires_grad=True)
    loss = SimpoLoss(SimpoConfig(**config))
    output = loss(filler(), Outputs(logps_N=logps_N))
    assert {term.name: (term.total.item(), float(term.count)) for term in output.terms} == dict.fromkeys(
        loss.counts(filler()), (0.0, 0.0)
    )
    sum(term.total for term in output.terms).backward()
    assert logps_N.grad is not None


def test_half_precision_is_summed_in_float32() -> None:
    batch = padded([Pair([1], [7] * 999, [8])])
    logps_N = torch.full((1000,), -1.0009765625).bfloat16()
    figures = {term.name: term for term in SimpoLoss(SimpoConfig())(batch, Outputs(logps_N=logps_N)).metrics}
    chosen = figures["logps/chosen"].total
    assert chosen.dtype == torch.float32
    assert chosen.item() == pytest.approx(logps_N[0].double().item() * 1, rel=1e-6)


def test_rows_that_are_no_preferences_are_refused() -> None:
    loss, pairs = SimpoLoss(SimpoConfig()), random_pairs(2)
    with pytest.raises(DataError, match="rows 0, 1 of the data do not say which answer is wanted"):
        loss.counts(padded(pairs, signs=None))
    with pytest.raises(DataError, match=r"the signs \[-1, 1, -1, 1\], which are no pairs"):
        loss.counts(padded(pairs, signs=(-1, 1)))
    with pytest.raises(DataError, match=r"the signs \[1, 1, 1, 1\]"):
        loss.counts(padded(pairs, signs=(1, 1)))
    alone = collate([Example(input_ids=[1, 2], labels=[-100, 2], signs=(1,))], (7,))
    with pytest.raises(DataError, match="rows 7 of the data have 1 documents, and one is left"):
        loss.counts(alone)
    with pytest.raises(DataError, match="do not say which answer is wanted"):
        loss(padded(pairs, signs=None), Outputs(logps_N=torch.zeros(99)))


def test_an_answer_without_a_trained_token_is_refused() -> None:
    pairs = [*random_pairs(2), Pair([1, 2], [3], [])]
    with pytest.raises(DataError, match="the rejected answer of row 2 of the data has no trained token"):
        SimpoLoss(SimpoConfig()).counts(padded(pairs))


@pytest.mark.parametrize("config", SETTINGS)
def test_a_run_is_the_same_however_its_steps_are_split(config: dict[str, Any], tmp_path: Path) -> None:
    """In the real loop, with evaluation: in one micro-batch, in several, and packed into bins."""
    made = {
        name: run(tmp_path / name, [*plugins, "simpo"], sections={"simpo": config, **sections}, micro_batch=micro_batch)
        for name, plugins, sections, micro_batch in (
            ("whole", (), {}, 16),
            ("split", (), {}, 3),
            ("packed", ("packing",), {"packing": {"length": 40}}, 2),
        )
    }
    names = {"loss", "eval_loss", "rewards/margins", "eval_rewards/accuracies", "logps/chosen", "grad_norm"}

    assert names <= made["whole"].keys()
    for name in names:
        for other in ("split", "packed"):
            torch.testing.assert_close(made[other][name], made["whole"][name], rtol=2e-5, atol=2e-6, msg=name)


def test_a_run_on_rows_without_signs_stops_at_once(tmp_path: Path) -> None:
    class Unsigned(Rows):
        def __getitem__(self, index: int) -> Example:
            return replace(example_of(self.pairs[index]), signs=())

    with pytest.raises(DataError, match="do not say which answer is wanted"):
        run(tmp_path / "run", ["simpo"], Tiny(Unsigned))


def test_defaults_are_those_of_the_paper() -> None:
    config = SimpoConfig()
    assert (config.beta, config.gamma, config.sft_weight, config.label_smoothing, config.alpha) == (2.0, 1.0, 0, 0, 0)


def test_length_brings_nothing() -> None:
    """An answer that repeats itself with the same probabilities has the same reward."""
    short, long = Pair([1], [2, 3], [4]), Pair([1], [2, 3] * 5, [4] * 7)
    losses = [
        SimpoLoss(SimpoConfig())(padded([pair]), Outputs(logps_N=torch.tensor(logps))).terms[0].total
        for pair, logps in ((short, [-1.0, -2.0, -3.0]), (long, [-1.0, -2.0] * 5 + [-3.0] * 7))
    ]
    torch.testing.assert_close(losses[0], losses[1])
    expected = math.log1p(math.exp(-(2.0 * (-1.5 + 3.0) - 1.0)))
    assert losses[0].item() == pytest.approx(expected, rel=1e-6)


def test_the_bent_reward_has_log_p_as_its_limit() -> None:
    logps = -torch.logspace(-3, 1, 50)
    torch.testing.assert_close(shaped(logps, 1e-6), logps, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shaped(logps, 0.25), (1 - logps.exp() ** -0.25) / 0.25, rtol=1e-5, atol=1e-5)
