"""Settings that clash are refused, and what is missing is said before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import environment_of_tests
import pytest
from pegbox.errors import ConfigError, PegboxError
from pegbox.hooks import hookimpl
from pegbox.plan import compose
from pegbox.types import Item
from tiny_rl import Plugin, config_of, records, run


@pytest.mark.parametrize(
    ("grpo", "message"),
    [
        ({"samples": 1}, "samples"),
        ({"loss_type": "luspo"}, "set importance_sampling_level to sequence"),
        ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, "has its own ratio"),
        ({"loss_type": "sapo", "delta": 2.0}, "does not clip on two sides"),
        ({"loss_type": "cispo", "epsilon": 0.1}, "no lower bound"),
        ({"loss_type": "vespo", "epsilon_high": 0.3}, "does not clip"),
        ({"sapo_temperature_pos": 2.0}, "loss_type is dapo, not sapo"),
        ({"advantage": "rloo"}, "scale_rewards is group"),
        ({"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "none"}, "normalises by itself"),
        ({"kl_placement": "reward"}, "beta is 0"),
        ({"importance_sampling_clip_min": 4.0}, "is not below"),
        ({"importance_sampling_clip_max": None}, "has no bound"),
        ({"importance_sampling_correction": "none", "importance_sampling_clip_max": 2.0}, "is none; remove it"),
        ({"loss_type": "grop"}, "loss_type"),
    ],
)
def test_settings_that_clash_are_refused(tmp_path: Path, grpo: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(config_of(tmp_path, grpo=grpo), instances={"tiny": Plugin()})


def test_a_resolved_config_is_read_again(tmp_path: Path) -> None:
    ctx = compose(config_of(tmp_path), instances={"tiny": Plugin()})
    assert compose(ctx.config.resolved(), instances={"tiny": Plugin()}).config.sections == ctx.config.sections


class Loaded(Exception):
    """The model was asked for."""


def without(*hooks: str) -> Plugin:
    """The plugin without some hooks; loading the model is an error."""

    @hookimpl
    def load_model(self: Any, ctx: Any, request: Any) -> Any:
        raise Loaded

    return type("Less", (Plugin,), {**dict.fromkeys(hooks), "load_model": load_model})()


@pytest.mark.parametrize(
    ("missing", "grpo", "message"),
    [
        (["generate_rollouts", "sync_weights"], {}, "nobody who generates"),
        (["sync_weights"], {}, "does not implement sync_weights"),
        (["score_rollouts"], {}, "nobody who scores"),
        ([], {"beta": 0.1}, "nobody gives reference log-probabilities"),
        ([], {"rollout_func": "environment_of_tests:plya"}, "has no function 'plya'"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_loaded(
    tmp_path: Path, missing: list[str], grpo: dict[str, Any], message: str
) -> None:
    with pytest.raises(PegboxError, match=message):
        run(config_of(tmp_path / "run", grpo=grpo), without(*missing))
    assert not (tmp_path / "run").exists()
    with pytest.raises(Loaded):
        run(config_of(tmp_path / "fine"), without())


def test_a_reference_that_comes_after_the_rewards_is_refused(tmp_path: Path) -> None:
    reference = type("Late", (), {"register_items": register_items})()
    grpo = {"beta": 0.1, "kl_placement": "reward"}
    with pytest.raises(ConfigError, match="List reference before grpo"):
        run(config_of(tmp_path / "run", grpo=grpo, after=["late"]), late=reference)


@hookimpl
def register_items(self: Any) -> list[Item]:
    return [Item(kind="extra", name="reference_logps", target="here")]


def test_a_function_of_the_user_makes_the_rollouts(tmp_path: Path) -> None:
    environment_of_tests.CALLS.clear()
    grpo = {"rollout_func": "environment_of_tests:play", "max_completion_length": 4}
    run(config_of(tmp_path / "run", grpo=grpo, trainer={"max_steps": 2}))
    assert len(environment_of_tests.CALLS) == 2
    first = records(tmp_path / "run")[0]
    tokens = first["completions/mean_length"] * 16
    assert first["trained_tokens"] == pytest.approx(tokens - 16), "the environment's token of each is not trained"


@pytest.mark.parametrize("written", ["beside_the_config", "./beside_the_config.py"])
def test_a_function_is_found_in_the_folder_of_the_config(tmp_path: Path, written: str) -> None:
    import json

    source = Path(environment_of_tests.__file__).read_text()
    (tmp_path / "beside_the_config.py").write_text(source)
    config = config_of(tmp_path / "run", grpo={"rollout_func": f"{written}:play"}, trainer={"max_steps": 1})
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(config))
    assert run(path).step == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:play", "there is no module 'no_such_module'"),
        ("environment_of_tests:plya", "Did you mean 'play'"),
        ("environment_of_tests:not_a_function", "has no function"),
        ("./no_such_file.py:play", "there is no module './no_such_file.py'"),
        ("play", "rollout_func"),
    ],
)
def test_a_function_that_is_not_there_is_named(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(config_of(tmp_path / "run", grpo={"rollout_func": name}))
