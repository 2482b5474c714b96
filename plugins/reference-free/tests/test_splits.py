"""Each loss is the same however a step is split, padded or packed; and what all of them refuse."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_rows import (
    Pair,
    Rows,
    Tiny,
    assert_same,
    example_of,
    filler,
    loss_of,
    packed,
    padded,
    random_pairs,
    run,
    value_and_gradient,
)
from pegbox.errors import DataError
from pegbox.rows import Example
from pegbox.testing.batches import pad_batch
from pegbox.testing.tiny import collate, tiny_model
from pegbox.types import Outputs

LOSSES: list[tuple[str, dict[str, Any]]] = [
    ("orpo", {}),
    ("orpo", {"alpha": 0.5}),
    ("cpo", {}),
    ("cpo", {"loss": "ipo", "alpha": 0.1}),
    ("cpo", {"loss": "hinge", "sft_weight": 0.0}),
    ("simpo", {}),
    ("simpo", {"sft_weight": 0.5, "alpha": 0.25}),
]
every_loss = pytest.mark.parametrize(("plugin", "config"), LOSSES)
each_plugin = pytest.mark.parametrize("plugin", ["orpo", "cpo", "simpo"])


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@every_loss
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 1000), cuts=st.sets(st.integers(1, 5)), fillers=st.integers(0, 2))
def test_any_split_padding_and_packing_gives_the_same(
    model: Any, plugin: str, config: dict[str, Any], seed: int, cuts: set[int], fillers: int
) -> None:
    loss, pairs = loss_of(plugin, config), random_pairs(6, seed)
    whole = value_and_gradient(loss, [padded(pairs)], model)
    parts = [pairs[a:b] for a, b in itertools.pairwise([0, *sorted(cuts), 6])]
    split = [*(pad_batch(padded(part), 3) for part in parts), *[filler()] * fillers]
    assert_same(value_and_gradient(loss, split, model), whole)
    assert_same(value_and_gradient(loss, [packed(part) for part in parts], model), whole)


@every_loss
def test_no_value_of_the_device_is_asked_for(plugin: str, config: dict[str, Any]) -> None:
    """Tensors without values: whatever asked for one would raise."""
    for batch in (padded(random_pairs(3)), packed(random_pairs(2)), filler()):
        away = batch.to(torch.device("meta"))
        logps_N = torch.zeros(batch.trained_tokens, device="meta", requires_grad=True)
        output = loss_of(plugin, config)(away, Outputs(logps_N=logps_N))
        assert all(term.total.device.type == "meta" and term.total.requires_grad for term in output.terms)


@every_loss
def test_a_micro_batch_without_rows_adds_zero_and_hangs_on_the_graph(plugin: str, config: dict[str, Any]) -> None:
    logps_N, loss = torch.zeros(0, requires_grad=True), loss_of(plugin, config)
    output = loss(filler(), Outputs(logps_N=logps_N))
    assert {term.name: (term.total.item(), float(term.count)) for term in output.terms} == dict.fromkeys(
        loss.counts(filler()), (0.0, 0.0)
    )
    sum(term.total for term in output.terms).backward()
    assert logps_N.grad is not None


@pytest.mark.parametrize(("plugin", "tokens"), [("orpo", 1), ("cpo", 999), ("simpo", 1)])
def test_half_precision_is_summed_in_float32(plugin: str, tokens: int) -> None:
    batch = padded([Pair([1], [7] * 999, [8])])
    logps_N = torch.full((1000,), -1.0009765625).bfloat16()
    figures = {term.name: term for term in loss_of(plugin)(batch, Outputs(logps_N=logps_N)).metrics}
    chosen = figures["logps/chosen"].total
    assert chosen.dtype == torch.float32
    assert chosen.item() == pytest.approx(logps_N[0].double().item() * tokens, rel=1e-6)


@each_plugin
def test_rows_that_are_no_preferences_are_refused(plugin: str) -> None:
    loss, pairs = loss_of(plugin), random_pairs(2)
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


@each_plugin
def test_an_answer_without_a_trained_token_is_refused(plugin: str) -> None:
    pairs = [*random_pairs(2), Pair([1, 2], [3], [])]
    with pytest.raises(DataError, match="the rejected answer of row 2 of the data has no trained token"):
        loss_of(plugin).counts(padded(pairs))


@every_loss
def test_a_run_is_the_same_however_its_steps_are_split(plugin: str, config: dict[str, Any], tmp_path: Path) -> None:
    """In the real loop, with evaluation: in one micro-batch, in several, and packed into bins."""
    made = {
        name: run(tmp_path / name, [*before, plugin], sections={plugin: config, **sections}, micro_batch=micro_batch)
        for name, before, sections, micro_batch in (
            ("whole", (), {}, 16),
            ("split", (), {}, 3),
            ("packed", ("packing",), {"packing": {"length": 40}}, 2),
        )
    }
    names = {"loss", "eval_loss", "rewards/margins", "eval_rewards/accuracies", "logps/chosen", "grad_norm"}
    names |= {"nll_loss", "eval_odds_ratio"} if plugin == "orpo" else set()
    assert names <= made["whole"].keys()
    for name in names:
        for other in ("split", "packed"):
            torch.testing.assert_close(made[other][name], made["whole"][name], rtol=2e-5, atol=2e-6, msg=name)


@each_plugin
def test_a_run_on_rows_without_signs_stops_before_a_model_is_loaded(plugin: str, tmp_path: Path) -> None:
    class Unsigned(Rows):
        def __getitem__(self, index: int) -> Example:
            return replace(example_of(self.pairs[index]), signs=())

    tiny = Tiny(Unsigned)
    with pytest.raises(DataError, match="pair 0 is no pair of a chosen and a rejected answer"):
        run(tmp_path / "run", [plugin], tiny)
    assert not tiny.loaded


@every_loss
def test_health_rules_look_at_figures_that_are_logged(plugin: str, config: dict[str, Any], tmp_path: Path) -> None:
    """A rule for the likelihood is asked of runs that have it."""
    from pegbox.plan import compose

    made = run(tmp_path / "run", [plugin], sections={plugin: config})
    rules = compose({"model": {"name": "tiny"}, "plugins": [plugin]}).items("health_rule")
    assert all(name.startswith(f"{plugin}-") for name in rules)
    looked_at = {item.target["metric"] for item in rules.values()}
    assert {"rewards/accuracies", "eval_rewards/accuracies"} < looked_at
    has_likelihood = plugin == "orpo" or config.get("sft_weight", 1.0 if plugin == "cpo" else 0.0)
    assert looked_at - made.keys() == (set() if has_likelihood or plugin == "simpo" else {"nll_loss"})
    assert all(item.target["source"] and item.target["advice"] for item in rules.values())
