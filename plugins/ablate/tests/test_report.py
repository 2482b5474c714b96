"""What is called noise, and what the report says of figures that are known."""

from __future__ import annotations

import json
import random

import pytest
from pegbox_ablate.ablation import Ablation, Difference, Round, margin
from pegbox_ablate.child import Measurement
from pegbox_ablate.process import Failure
from pegbox_ablate.report import text, to_json, verdict


def run(speed: float = 1000.0, loss: tuple[float, ...] = (2.0, 1.0), peak: int = 8 << 30) -> Measurement:
    return Measurement(("a", "b"), loss, speed, peak, "peak memory", "cuda", "bf16")


def ablation(left_out: Measurement, base: list[Measurement] | None = None) -> tuple[Ablation, Difference]:
    whole = base or [run(1000.0), run(1002.0), run(1001.0), run(1003.0)]
    made = Ablation("config.yaml", 2, 1, base=whole, rounds={"a": [Round(whole[0], left_out, whole[1])]})
    return made, made.differences[0]


@pytest.mark.parametrize("plugins", [1, 2, 4, 12])
@pytest.mark.parametrize("rounds", [1, 3])
def test_equal_runs_are_told_apart_in_one_of_twenty_cases_at_most(plugins: int, rounds: int) -> None:
    source, wrong, trials = random.Random(0), 0, 4000
    for _ in range(trials):
        base = [source.gauss(100, 1) for _ in range(plugins * rounds + 1)]
        found = sum((base[at] + base[at + 1]) / 2 - source.gauss(100, 1) for at in range(0, plugins * rounds, plugins))
        wrong += abs(found / rounds) > margin(base, rounds)
    assert wrong / trials <= 0.065


def test_a_steady_drift_of_the_machine_changes_no_difference() -> None:
    drifting = [run(1000.0), run(900.0)]
    _, found = ablation(run(950.0), drifting)
    assert found.tokens_per_s == 0.0


def test_a_difference_is_the_figure_with_the_plugin_less_the_one_without() -> None:
    made, found = ablation(run(801.0, peak=12 << 30))
    assert found.tokens_per_s == pytest.approx(200.0)
    assert found.peak_bytes == -(4 << 30)
    assert verdict(made, found) == "faster, less memory; the same loss at every step"
    row = next(line for line in text(made).splitlines() if line.startswith("a "))
    assert row.split() == ["a", "0", "0", "801", "+200", "+25.0", "-4.00", "GiB"]


def test_figures_within_the_spread_are_marked_and_not_told() -> None:
    made, found = ablation(run(1002.0))
    row = next(line for line in text(made).splitlines() if line.startswith("a "))
    assert row.count("~") == 3
    assert "Δ loss by step" not in text(made)
    assert verdict(made, found).startswith("no difference in speed or memory")


@pytest.mark.parametrize(
    ("loss", "says"),
    [((2.0, 1.0), "the same loss"), ((2.0, 1.001), "as rounding may"), ((2.0, 1.1), "wrong for a kernel")],
)
def test_the_loss_is_held_to_what_rounding_may_do(loss: tuple[float, ...], says: str) -> None:
    made, found = ablation(run(loss=loss))
    assert says in verdict(made, found)
    assert ("a, Δ loss by step" in text(made)) == (loss != (2.0, 1.0))


def test_a_loss_that_equal_runs_show_as_well_is_noise() -> None:
    base = [run(loss=(2.0, 1.0)), run(loss=(2.0, 1.1)), run(loss=(2.0, 1.05))]
    made, found = ablation(run(loss=(2.0, 1.0)), base)
    assert made.is_noise(found, "loss")
    assert "as like as that of two runs with it" in verdict(made, found)


def test_a_run_that_broke_and_plugins_in_no_run_are_listed() -> None:
    made, _ = ablation(run())
    made.failures["b"] = Failure(False, "OutOfMemoryError: CUDA out of memory")
    made.loggers = ("trackers",)
    lines = text(made).splitlines()
    assert "b: the run without it broke: OutOfMemoryError: CUDA out of memory" in lines
    assert any(line.startswith("trackers: in none of the runs") for line in lines)
    assert json.loads(to_json(made))["failures"]["b"]["refused"] is False
