"""When a converted run evaluates and saves, which checkpoint stays, and when it stops early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pegbox_convert.conversion import Entry, Status
from pegbox_convert.converting import Converted, convert_file

AXOLOTL = "base_model: m\ndatasets: [{path: a/b, type: alpaca}]\nval_set_size: 0.1\nlearning_rate: 1e-4\n"
TRL = "model_name_or_path: m\ndataset_name: a/b\n"
FACTORY = "model_name_or_path: m\nstage: sft\ndataset: a\nval_size: 0.1\n"
OUMI = """
model: {model_name: m}
data: {train: {datasets: [{dataset_name: a/b}]}, validation: {datasets: [{dataset_name: a/c}]}}
training: """
TIMES = ("save_every", "saves_per_epoch", "eval_every", "evals_per_epoch", "eval_at_end", "best", "best_is")


@pytest.fixture
def converted(tmp_path: Path) -> Any:
    def convert(text: str) -> Converted:
        path = tmp_path / "foreign.yaml"
        path.write_text(text)
        result = convert_file(path)
        assert result.valid, result.notes
        return result

    return convert


def times(result: Converted) -> dict[str, Any]:
    return {key: value for key, value in result.config["trainer"].items() if key in TIMES}


def entry(result: Converted, key: str) -> Entry:
    return next(entry for entry in result.entries if entry.key == key)


BY_EPOCH = {
    "axolotl": AXOLOTL + "num_epochs: 3\nsave_strategy: epoch\neval_strategy: epoch\n",
    "axolotl, by numbers": AXOLOTL
    + "num_epochs: 3\nsaves_per_epoch: 1\nevals_per_epoch: 1\nload_best_model_at_end: no\n",
    "axolotl, older": AXOLOTL + "num_epochs: 3\nsave_strategy: epoch\nevaluation_strategy: epoch\n",
    "trl": TRL + "save_strategy: epoch\neval_strategy: epoch\n",
    "trl, of so many steps": TRL + "save_strategy: epoch\neval_strategy: epoch\nmax_steps: 70\n",
    "llama-factory": FACTORY + "save_strategy: epoch\neval_strategy: epoch\n",
    "oumi": OUMI + "{save_epoch: true, save_steps: 0, eval_strategy: epoch}",
}


@pytest.mark.parametrize("name", BY_EPOCH)
def test_a_cadence_by_epoch_stays_one_whether_or_not_the_steps_are_counted(name: str, converted: Any) -> None:
    result = converted(BY_EPOCH[name])
    assert times(result) == {"saves_per_epoch": 1, "evals_per_epoch": 1}
    about = {entry.ours[0]: entry.status for entry in result.entries if "s_per_epoch" in str(entry.ours)}
    assert about == {"trainer.saves_per_epoch": Status.MAPPED, "trainer.evals_per_epoch": Status.MAPPED}


def test_axolotls_default_saves_at_each_epoch_of_a_run_of_so_many_steps(converted: Any) -> None:
    result = converted(AXOLOTL + "max_steps: 100\n")
    assert times(result)["saves_per_epoch"] == 1
    assert entry(result, "save_strategy").status is Status.DEFAULT
    assert times(converted(AXOLOTL))["save_every"] is None


def test_several_times_in_an_epoch_are_exact_in_steps_where_the_steps_are_known(converted: Any) -> None:
    per_epoch = AXOLOTL + "num_epochs: 3\nevals_per_epoch: 4\nsaves_per_epoch: 1\nload_best_model_at_end: false\n"
    known = converted(per_epoch + "max_steps: 100\n")
    assert times(known) == {"save_every": 34, "eval_every": 9}
    assert entry(known, "evals_per_epoch").status is Status.MAPPED
    unknown = converted(per_epoch)
    assert times(unknown) == {"saves_per_epoch": 1, "evals_per_epoch": 4}
    assert entry(unknown, "saves_per_epoch").status is Status.MAPPED
    assert entry(unknown, "evals_per_epoch").status is Status.DIFFERS
    assert "rounded up" in entry(unknown, "evals_per_epoch").note


def test_a_part_of_the_run_is_a_number_per_epoch_where_it_comes_out_even(converted: Any) -> None:
    even = converted(TRL + "num_train_epochs: 2\nsave_steps: 0.25\neval_strategy: steps\neval_steps: 0.125\n")
    assert times(even) == {"saves_per_epoch": 2, "evals_per_epoch": 4}
    odd = converted(TRL + "num_train_epochs: 2\nsave_steps: 0.3\n")
    assert entry(odd, "save_steps").status is Status.LATER


def test_a_key_that_another_one_overrules_has_no_effect(converted: Any) -> None:
    result = converted(TRL + "save_strategy: epoch\nsave_steps: 5\n")
    assert entry(result, "save_steps").status is Status.UNNEEDED
    result = converted(OUMI + "{save_epoch: true}")
    assert times(result)["save_every"] == 500
    assert entry(result, "training.save_epoch").status is Status.UNNEEDED


def test_evaluations_in_steps_without_a_number_follow_the_logging(converted: Any) -> None:
    assert times(converted(TRL + "eval_strategy: steps\nlogging_steps: 7\n"))["eval_every"] == 7


def test_a_stream_has_no_epochs_to_save_by(converted: Any) -> None:
    streamed = "base_model: m\npretraining_dataset: [{path: a/b, type: pretrain}]\nlearning_rate: 1e-4\nmax_steps: 10\n"
    result = converted(streamed + "save_strategy: epoch\n")
    assert entry(result, "save_strategy").status is Status.LATER
    assert "trainer.save_every" in entry(result, "save_strategy").note
    assert times(converted(streamed + "saves_per_epoch: 5\n"))["save_every"] == 2


BEST = {
    "trl": TRL + "save_strategy: epoch\neval_strategy: epoch\nload_best_model_at_end: true\n",
    "trl, saved when best": TRL + "eval_strategy: epoch\nsave_strategy: best\nload_best_model_at_end: true\n",
    "llama-factory": FACTORY + "save_strategy: epoch\neval_strategy: epoch\nload_best_model_at_end: true\n",
    "axolotl": AXOLOTL + "save_steps: 200\neval_steps: 200\nload_best_model_at_end: true\n",
    "oumi": OUMI
    + "{save_steps: 100, eval_strategy: steps, eval_steps: 100, trainer_kwargs: {load_best_model_at_end: true}}",
}


@pytest.mark.parametrize("name", BEST)
def test_the_best_checkpoint_stays_and_is_exported(name: str, converted: Any) -> None:
    result = converted(BEST[name])
    assert times(result)["best"] == "eval_loss"
    (asked,) = [entry for entry in result.entries if entry.key.endswith("load_best_model_at_end")]
    assert (asked.status, asked.note) == (Status.MAPPED, "")


def test_which_value_is_best_is_kept_and_serves_early_stopping_too(converted: Any) -> None:
    chosen = "load_best_model_at_end: true\nmetric_for_best_model: loss\ngreater_is_better: yes\n"
    result = converted(FACTORY + "save_strategy: epoch\neval_strategy: epoch\nearly_stopping_steps: 2\n" + chosen)
    assert (times(result)["best"], times(result)["best_is"]) == ("eval_loss", "highest")
    assert result.config["early-stopping"] == {"patience": 2, "metric": "eval_loss", "better": "higher"}
    assert entry(result, "greater_is_better").ours == ("trainer.best_is", "early-stopping.better")
    alone = converted(
        AXOLOTL + "save_steps: 9\neval_steps: 5\nearly_stopping_patience: 2\nmetric_for_best_model: loss\n"
    )
    assert "best" not in times(alone)
    assert alone.config["early-stopping"] == {"patience": 2, "metric": "eval_loss", "better": "lower"}


def test_axolotl_ends_with_the_best_by_default_where_saves_fall_on_evaluations(converted: Any) -> None:
    result = converted(AXOLOTL + "num_epochs: 3\nevals_per_epoch: 4\nsaves_per_epoch: 1\n")
    assert times(result)["best"] == "eval_loss"
    assert entry(result, "load_best_model_at_end").status is Status.DEFAULT
    for otherwise in (
        "save_steps: 30\neval_steps: 20",
        "save_steps: 40\neval_steps: 20\nload_best_model_at_end: false",
    ):
        assert "best" not in times(converted(AXOLOTL + otherwise + "\n"))
    asked = converted(AXOLOTL + "save_steps: 30\neval_steps: 20\nload_best_model_at_end: true\n")
    assert times(asked)["best"] == "eval_loss"
    assert entry(asked, "load_best_model_at_end").status is Status.DIFFERS


def test_differences_of_the_best_checkpoint_are_named(converted: Any) -> None:
    seldom = "eval_strategy: steps\neval_steps: 10\nsave_steps: 20\nload_best_model_at_end: true\n"
    assert "at which a checkpoint was saved" in entry(converted(TRL + seldom), "load_best_model_at_end").note
    kept = entry(converted(TRL + "eval_strategy: epoch\nsave_strategy: best\n"), "save_strategy")
    assert kept.status is Status.DIFFERS
    assert "the last step" in kept.note


def test_the_best_by_a_metric_that_evaluations_do_not_give_is_reported(converted: Any) -> None:
    wanted = "load_best_model_at_end: true\nmetric_for_best_model: accuracy\nearly_stopping_steps: 2\n"
    result = converted(FACTORY + "save_strategy: epoch\neval_strategy: epoch\n" + wanted)
    unsupported = {entry.key for entry in result.unsupported if "accuracy" in entry.note}
    assert unsupported == {line.split(":")[0] for line in wanted.splitlines()}
    assert "best" not in times(result)
    assert "early-stopping" not in result.config["plugins"]


def test_without_evaluations_nothing_is_the_best(converted: Any) -> None:
    result = converted(TRL + "load_best_model_at_end: true\n")
    assert entry(result, "load_best_model_at_end").status is Status.UNNEEDED
    assert "best" not in times(result)
