"""Settings that clash are refused, and what is missing is said before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import environment_of_tests
import pytest
from pegbox.errors import ConfigError, PegboxError, RunError
from pegbox.hooks import hookimpl
from pegbox.plan import compose
from pegbox.types import Item
from pegbox_grpo.config import GrpoConfig
from pegbox_grpo.refusals import refuse_lengths
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


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rewards": {"wantd": 2.0}}, "rewards weighs 'wantd' .*Did you mean 'wanted'"),
        ({"rewards": {"wanted": 0.0, "short": 0.0}}, "rewards weighs 'wanted' and 'short' by 0"),
        ({"tiny": {"trained": True}}, "train.jsonl:1 has trained tokens"),
    ],
)
def test_rows_and_names_of_rewards_are_compared_before_a_model_is_loaded(
    tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(PegboxError, match=f"(?s){message}"):
        run(config_of(tmp_path / "run", **keys), without())


def test_completions_that_the_model_cannot_read_are_refused(tmp_path: Path) -> None:
    """The model of the tests reads 2,048 tokens, and its longest prompt has 5."""
    with pytest.raises(ConfigError, match=r"(?s)the longest prompt has 5 tokens.*reads 2,048.*to 2,043 or less"):
        run(config_of(tmp_path / "run", grpo={"max_completion_length": 2044}))


def test_a_model_with_scaled_positions_reads_as_many_as_it_was_stretched_to() -> None:
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048}
    text = SimpleNamespace(max_position_embeddings=2048, rope_parameters=rope)
    model: Any = SimpleNamespace(name="m", module=SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text)))
    rows: Any = [SimpleNamespace(input_ids=[1] * 5)]
    refuse_lengths(model, rows, GrpoConfig(max_completion_length=4091))
    with pytest.raises(ConfigError, match=r"reads 4,096(.|\n)*to 4,091 or less"):
        refuse_lengths(model, rows, GrpoConfig(max_completion_length=4092))


def test_a_scorer_that_says_nothing_is_named(tmp_path: Path) -> None:
    class Silent(Plugin):
        @hookimpl
        def score_rollouts(self) -> None:
            """Nothing."""

    with pytest.raises(RunError, match="tiny scored 16 completions with no reward at all"):
        run(config_of(tmp_path / "run"), Silent())


def test_a_scorer_may_name_its_scores_only_when_there_are_completions(tmp_path: Path) -> None:
    class Late(Plugin):
        @hookimpl
        def score_rollouts(self, ctx: Any, rollouts: Any) -> Any:
            return Plugin.score_rollouts(self, ctx, rollouts) if rollouts.rollouts else []

    assert run(config_of(tmp_path / "fine", rewards={"wanted": 1.0}, trainer={"max_steps": 1}), Late()).step == 1
    with pytest.raises(ConfigError, match="rewards weighs 'wantd'"):
        run(config_of(tmp_path / "run", rewards={"wantd": 1.0}), Late())


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
    grpo = {"rollout_func": "environment_of_tests:play", "max_completion_length": 4, "completions": 16}
    run(config_of(tmp_path / "run", grpo=grpo, trainer={"max_steps": 2}))
    assert len(environment_of_tests.CALLS) == 2
    first = records(tmp_path / "run")[0]
    lines = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    tokens = [len(line["completion"].split()) for line in lines if line["step"] == 0]
    assert first["trained_tokens"] == sum(tokens) - len(tokens), "the environment's token of each is not trained"
    assert first["completions/mean_length"] == pytest.approx(first["trained_tokens"] / len(tokens)), "as in TRL"
