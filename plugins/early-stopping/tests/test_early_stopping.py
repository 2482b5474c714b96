"""A run stops where the rule says, also after a resume."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pegbox.errors import ConfigError
from pegbox.events import Evaluated, Event, Signal, Stepped
from pegbox.hooks import hookimpl
from pegbox.plan import compose
from pegbox.run import execute
from pegbox_early_stopping.config import EarlyStoppingConfig
from pegbox_early_stopping.patience import Patience

TINY = str(Path(__file__).parents[2] / "trainer" / "tests" / "tiny_llama.py")


def stopped_after(values: list[float], **settings: Any) -> int | None:
    patience, config = Patience(), EarlyStoppingConfig(metric="m", **{"better": "lower", **settings})
    for count, value in enumerate(values, start=1):
        event = Evaluated(step=count, model=SimpleNamespace(), metrics={"m": value})
        if patience.see(config, event) is Signal.STOP:
            return count
    return None


@pytest.mark.parametrize(
    ("values", "settings", "expected"),
    [
        ([3, 2, 1, 0], {"patience": 1}, None),
        ([3, 2, 2, 1], {"patience": 1}, 3),
        ([3, 2, 2, 1, 1.5, 1.2, 1.1], {"patience": 3}, 7),
        ([3, 2.95, 2.9, 2.85], {"patience": 3, "min_delta": 0.2}, 4),
        ([0.1, 0.2, 0.3, 0.25, 0.2], {"patience": 2, "better": "higher"}, 5),
        ([3, 2.9, 2.8, 2.7], {"patience": 2, "min_delta": 0.15}, None),
    ],
)
def test_it_stops_after_patience_evaluations_without_an_improvement(
    values: list[float], settings: dict[str, Any], expected: int | None
) -> None:
    assert stopped_after(values, **settings) == expected


def run(folder: Path, instance: object = None, **settings: Any) -> Any:
    trainer = {"eval_every": settings.pop("eval_every", 2), "save_every": 3, "device": "cpu", "progress": "none"}
    config = {
        "model": {"name": "tiny"},
        "plugins": [TINY, "sft", "adamw", "trainer", "early-stopping", *(["break"] if instance else [])],
        "tiny_llama": {"rows": 24, "eval_rows": settings.pop("eval_rows", 4)},
        "adamw": {"learning_rate": 1e-9},
        "early-stopping": {"patience": 3, "min_delta": 0.1, **settings},
        "trainer": {"max_steps": 12, **trainer},
        "resume": "auto",
        "output": str(folder),
    }
    return execute(compose(config, instances={"break": instance} if instance else None))


class Break:
    @hookimpl
    def on_event(self, event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 7:
            raise KeyboardInterrupt


def test_a_run_that_does_not_improve_stops_and_exports(tmp_path: Path) -> None:
    outcome = run(tmp_path / "run")
    assert (outcome.reason, outcome.step) == ("stopped", 8)
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_a_resumed_run_stops_at_the_same_step(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", Break())
    outcome = run(tmp_path / "run")
    assert (outcome.reason, outcome.step) == ("stopped", 8)


def test_a_metric_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'eval_loss'"):
        run(tmp_path / "run", metric="eval_los", better="lower")


def test_which_way_a_metric_improves_is_said_unless_it_is_a_loss(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="metric is eval_reward, and better does not say"):
        run(tmp_path / "run", metric="eval_reward")


def test_a_run_without_held_out_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="early-stopping is in plugins"):
        run(tmp_path / "run", eval_rows=0, eval_every=None)


def test_a_run_that_was_never_evaluated_twice_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path / "run", eval_every=None)
    assert "trainer.eval_every" in caplog.text
