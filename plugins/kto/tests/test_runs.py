"""Whole runs in the real loop, with a given reference and with the plugin `reference`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kto_rows import Tiny, composed, example_of, pair_of, random_answers, run
from pegbox.errors import ConfigError
from pegbox.run import execute

TRAIN = [example_of(answer) for answer in random_answers(9, seed=4)]
HELD_OUT = [pair_of(*random_answers(6, seed=1)[at : at + 2]) for at in (0, 2, 4)]
FIGURES = {"loss", "eval_loss", "kl", "eval_kl", "rewards/margins", "eval_rewards/margins", "logps/chosen", "grad_norm"}


@pytest.mark.parametrize("config", [{}, {"loss": "apo_zero_unpaired"}], ids=["kto", "apo_zero_unpaired"])
def test_a_run_is_the_same_however_its_steps_are_split(config: dict[str, Any], tmp_path: Path) -> None:
    """In one micro-batch, in several, and packed into bins; with preferences among the held-out rows."""
    whole = run(tmp_path / "whole", Tiny(TRAIN, HELD_OUT), kto=config, micro_batch=16)
    split = run(tmp_path / "split", Tiny(TRAIN, HELD_OUT), kto=config, micro_batch=2)
    packed = run(
        tmp_path / "packed",
        Tiny(TRAIN, HELD_OUT),
        ("packing", "given", "kto"),
        kto=config,
        packing={"length": 40},
        micro_batch=2,
    )
    names = FIGURES if not config else {name for name in FIGURES if not name.endswith("kl")}
    assert names <= whole.keys()
    for name in names:
        for other in (split, packed):
            torch.testing.assert_close(other[name], whole[name], rtol=2e-5, atol=2e-6, msg=name)


def test_training_raises_the_margin(tmp_path: Path) -> None:
    figures = run(tmp_path / "run", Tiny(TRAIN), max_steps=30, epochs=None, log_every=10)
    assert figures["rewards/margins"] > 0.3
    assert figures["rewards/chosen"] > figures["rewards/rejected"]


def test_it_runs_with_the_plugin_reference(tmp_path: Path) -> None:
    """Its reference is the policy's own start: the first step has no divergence, and later ones have little."""
    pytest.importorskip("pegbox_reference")
    figures = run(tmp_path / "run", Tiny(TRAIN), ("reference", "kto"), reference={"how": "copy"}, shuffle=False)
    assert 0 <= figures["kl"] < 0.5
    assert figures["rewards/margins"] > 0


def test_held_out_rows_are_measured_with_the_plugin_reference(tmp_path: Path) -> None:
    pytest.importorskip("pegbox_reference")
    figures = run(tmp_path / "run", Tiny(TRAIN, HELD_OUT), ("reference", "kto"), reference={"how": "copy"})
    assert {"eval_loss", "eval_kl", "eval_rewards/margins"} <= figures.keys()


def test_without_a_kl_term_the_reference_may_be_precomputed(tmp_path: Path) -> None:
    """With it, no order of the plugins is possible, and each error says what is."""
    pytest.importorskip("pegbox_reference")
    apo, before = {"loss": "apo_zero_unpaired"}, {"how": "precomputed", "cache": str(tmp_path / "cache")}
    settings: dict[str, Any] = {"kto": apo, "micro_batch": 2, "shuffle": True}
    copied = run(tmp_path / "a", Tiny(TRAIN, HELD_OUT), ("reference", "kto"), reference={"how": "copy"}, **settings)
    stored = run(tmp_path / "b", Tiny(TRAIN, HELD_OUT), ("kto", "reference"), reference=before, **settings)
    assert len(list((tmp_path / "cache").glob("[!.]*"))) == 2
    for name in ("loss", "eval_loss", "rewards/margins", "eval_rewards/margins", "grad_norm"):
        assert stored[name] == pytest.approx(copied[name], rel=1e-5, abs=1e-6), name

    sections = {"reference": before}
    with pytest.raises(ConfigError, match=r"they cannot be precomputed(.|\n)*kto\.loss=apo_zero_unpaired"):
        execute(composed(tmp_path / "c", Tiny(TRAIN), ("kto", "reference"), sections))
    with pytest.raises(ConfigError, match="kto, which is listed after reference, makes batches of its own"):
        execute(composed(tmp_path / "d", Tiny(TRAIN), ("reference", "kto"), sections))


def test_health_rules_look_at_figures_that_are_logged(tmp_path: Path) -> None:
    figures = run(tmp_path / "run", Tiny(TRAIN, HELD_OUT))
    rules = composed(tmp_path / "rules", Tiny(TRAIN), ("given", "kto"), {}).items("health_rule")
    assert {item.target["metric"] for item in rules.values()} <= figures.keys()
    assert all(name.startswith("kto-") and item.target["source"] for name, item in rules.items())


@pytest.mark.parametrize("kept", [1, -1, None])
def test_a_run_with_one_kind_of_answers_breaks_a_rule(kept: int | None, tmp_path: Path) -> None:
    answers = [example for example in TRAIN if kept is None or example.signs == (kept,)]
    share = run(tmp_path / "run", Tiny(answers))["share/chosen"]
    rules = composed(tmp_path / "rules", Tiny(TRAIN), ("given", "kto"), {}).items("health_rule")
    rule: Any = rules["kto-one-kind"].target
    assert rule["metric"] == "share/chosen"
    assert share == pytest.approx(sum(example.signs == (1,) for example in answers) / len(answers))
    assert (rule["below"] <= share <= rule["above"]) == (kept is None)


def test_what_is_missing_or_out_of_order_stops_the_run_before_it_begins(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no plugin brings them"):
        execute(composed(tmp_path / "none", Tiny(TRAIN), ("kto",), {}))
    with pytest.raises(ConfigError, match="kto is listed before given"):
        execute(composed(tmp_path / "order", Tiny(TRAIN), ("kto", "given"), {}))
    assert not list(tmp_path.iterdir())
