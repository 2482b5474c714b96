"""The checkpoint that evaluated best stays, and is what a run exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pegbox.errors import ConfigError
from safetensors.torch import load_file
from tiny_runs import assert_same_tree, checkpoint, records, run

KEYS: dict[str, Any] = {
    "max_steps": 8, "eval_every": 2, "save_every": 1, "keep": 1, "tiny": {"rows": 48, "eval_rows": 7},
    "adamw": {"learning_rate": 3e-3, "schedule": "constant"},
}  # fmt: skip


def evaluations(folder: Path) -> dict[int, float]:
    return {record["step"]: record["eval_loss"] for record in records(folder, "eval")}


@pytest.mark.parametrize("best_is", ["highest", "lowest"])
def test_the_export_is_the_checkpoint_that_evaluated_best(config: Any, tmp_path: Path, best_is: str) -> None:
    outcome = run(config(best="eval_loss", best_is=best_is, **KEYS))
    losses = evaluations(tmp_path / "run")
    step = (max if best_is == "highest" else min)(losses, key=losses.__getitem__)
    assert len(set(losses.values())) == len(losses) == 4
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {f"step-{step:08d}", "step-00000008"}
    exported = load_file(tmp_path / "run" / "model.safetensors")
    assert_same_tree(exported, load_file(checkpoint(tmp_path / "run", step) / "model.safetensors"))
    assert outcome.step == 8


def test_another_checkpoint_may_be_the_best_after_a_resume(config: Any, tmp_path: Path) -> None:
    run(config(best="eval_loss", best_is="highest", **KEYS))
    run(config(output="parted", best="eval_loss", best_is="highest", **{**KEYS, "max_steps": 3}))
    run(config(output="parted", best="eval_loss", best_is="highest", resume="auto", **KEYS))
    whole, parted = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "parted"))
    assert_same_tree(whole, parted)


def test_an_evaluation_before_the_first_step_is_not_the_best(config: Any, tmp_path: Path) -> None:
    run(config(best="eval_loss", eval_at_start=True, **KEYS))
    losses = evaluations(tmp_path / "run")
    assert min(losses, key=losses.__getitem__) == 0
    assert checkpoint(tmp_path / "run", 2).is_dir()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"best": "eval_los", "best_is": "lowest"}, "trainer.best is eval_los, which the evaluation does not give"),
        ({"best": "eval_loss", "tiny": {"eval_rows": 0}}, "there are no held-out rows"),
        ({"best": "eval_loss", "eval_every": None}, "eval_every is not set"),
        ({"best_is": "highest"}, "best is not set"),
        ({"best": "eval_reward"}, "best_is does not say which of its values is the best"),
    ],
)
def test_what_cannot_be_chosen_is_an_error(config: Any, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(config(**{**KEYS, **keys}))


@pytest.mark.parametrize("resumed", [False, True])
def test_evaluations_and_checkpoints_spread_over_the_epochs(config: Any, tmp_path: Path, resumed: bool) -> None:
    # 48 rows in steps of 4: 12 steps make an epoch, so thirds end at steps 4, 8, 12 ...
    keys = {"epochs": 2, "batch": 4, "evals_per_epoch": 3, "saves_per_epoch": 2, "keep": None, "save_every": 100}
    keys["tiny"] = {"rows": 48, "eval_rows": 7}
    if resumed:
        run(config(**{**keys, "max_steps": 7, "epochs": None}, adamw={"schedule": "constant"}))
    run(config(**keys, resume="auto", adamw={"schedule": "constant"}))
    assert [step for step in evaluations(tmp_path / "run") if step != 7] == [4, 8, 12, 16, 20, 24]
    saved = sorted(int(path.name[5:]) for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert [step for step in saved if step != 7] == [6, 12, 18, 24]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"evals_per_epoch": 1, "eval_every": 3}, "both say when to evaluate"),
        ({"saves_per_epoch": 1, "save_every": 3}, "both say when to save"),
        ({"saves_per_epoch": 1, "max_steps": 3, "tiny": {"stream": True}, "save_every": 100}, "are a stream"),
    ],
)
def test_a_cadence_that_cannot_be_is_an_error(config: Any, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(config(**keys))
