"""Whole runs with a small honest sampler: learning, order of a step, splits, resume, what is refused on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pegbox.errors import DataError, PegboxError, PluginError, RunError
from pegbox.hooks import hookimpl
from pegbox.types import Item
from pegbox_grpo.health import RULES
from pegbox_grpo.names import EXTREMES
from tiny_rl import Plugin, config_of, records, run


def test_the_reward_rises(tmp_path: Path) -> None:
    keys = {"grpo": {"samples": 8}, "adamw": {"learning_rate": 1e-2}, "trainer": {"max_steps": 25, "micro_batch": 32}}
    run(config_of(tmp_path / "run", **keys, rewards={"wanted": 1.0}))
    rewards = [record["rewards/wanted/mean"] for record in records(tmp_path / "run")]
    assert sum(rewards[:3]) / 3 < 0.2
    assert sum(rewards[-3:]) / 3 > 0.6


def test_a_step_syncs_generates_scores_and_learns(tmp_path: Path) -> None:
    tiny = Plugin()
    run(config_of(tmp_path / "run"), tiny)
    assert tiny.versions == [0, 1, 2, 3]
    assert [len(request.prompts) for request in tiny.requests] == [4] * 4
    prompts = [prompt for request in tiny.requests for prompt in request.prompts]
    assert len(set(prompts)) == 16, "no prompt comes twice within an epoch"
    assert len({request.sampling.seed for request in tiny.requests}) == 4
    first = records(tmp_path / "run")[0]
    named = {"reward", "reward_std", "rewards/wanted/mean", "rewards/short/std", "frac_reward_zero_std", "entropy"}
    named |= {f"completions/{name}" for name in ("mean_length", "min_length", "max_length", "clipped_ratio")}
    named |= {f"clip_ratio/{name}_mean" for name in ("low", "high", "region")}
    named |= {"sampling/importance_sampling_ratio/mean", "sampling/sampling_logp_difference/mean", "num_tokens"}
    assert named <= first.keys()
    assert set(EXTREMES) <= first.keys() | {f"completions/{which}_terminated_length" for which in ("min", "max")}
    assert {str(rule["metric"]) for rule in RULES.values()} <= first.keys() | {"kl"}
    assert first["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=1e-4)
    raw = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    assert raw["generate_s"] > 0
    assert raw["learn_s"] > 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    assert len(lines) == 16
    assert lines[0].keys() == {"split", "step", "prompt", "completion", "finished", "rewards", "advantage"}
    assert set(lines[0]["rewards"]) == {"wanted", "short"}


def test_weights_of_rewards_decide_what_is_learnt(tmp_path: Path) -> None:
    run(config_of(tmp_path / "a", rewards={"wanted": 2.0, "short": 0.0}))
    first = records(tmp_path / "a")[0]
    assert first["reward"] == pytest.approx(2 * first["rewards/wanted/mean"])
    with pytest.raises(PegboxError, match="Did you mean 'wanted'"):
        run(config_of(tmp_path / "b", rewards={"wantd": 2.0}))


def test_it_is_weighed_with_other_losses(tmp_path: Path) -> None:
    run(config_of(tmp_path / "run", after=["sft"], loss={"grpo": 1.0, "sft": 0.5}))
    first = records(tmp_path / "run")[0]
    assert first["loss"] == pytest.approx(first["grpo/grpo"] + 0.5 * first["sft/sft"])
    assert "reward" in first


SPLITS: dict[str, dict[str, Any]] = {
    "whole": {"trainer": {"micro_batch": 16}},
    "rows": {"trainer": {"micro_batch": 1}},
    "packed": {"tiny": {"capacity": 24}, "trainer": {"micro_batch": 2}},
}


@pytest.mark.parametrize(
    "grpo",
    [
        {"mask_truncated": True, "entropy_coef": 0.01},
        {"loss_type": "grpo", "iterations": 2, "top_entropy_quantile": 0.5},
        {"loss_type": "vespo", "steps_per_generation": 2, "importance_sampling_correction": "token_truncate"},
    ],
    ids=["dapo", "grpo", "vespo"],
)
def test_no_split_padding_or_packing_changes_a_step(tmp_path: Path, grpo: dict[str, Any]) -> None:
    made = {}
    for name, keys in SPLITS.items():
        trainer = {"max_steps": 2, **keys["trainer"]}
        run(config_of(tmp_path / name, grpo=grpo, **{**keys, "trainer": trainer}))
        made[name] = [
            {k: v for k, v in one.items() if k not in ("kind", "tokens_per_step")} for one in records(tmp_path / name)
        ]
    for name in ("rows", "packed"):
        for left, right in zip(made["whole"], made[name], strict=True):
            assert left == pytest.approx(right, rel=2e-4, abs=2e-6), name


def test_updates_of_one_generation_share_its_rollouts(tmp_path: Path) -> None:
    tiny = Plugin()
    grpo = {"iterations": 2, "steps_per_generation": 2}
    run(config_of(tmp_path / "run", grpo=grpo, trainer={"max_steps": 8}), tiny)
    assert tiny.versions == [0, 4]
    every = records(tmp_path / "run")
    assert ["reward" in record for record in every] == [True, False, False, False] * 2
    assert every[2]["clip_ratio/region_mean"] > 0, "the second pass is off-policy"
    assert sum(record["trained_tokens"] for record in every[1:2]) == every[1]["trained_tokens"]
    assert every[0]["clip_ratio/region_mean"] == 0


def test_an_epoch_learns_from_each_prompt_as_often_as_asked(tmp_path: Path) -> None:
    tiny = Plugin()
    trainer = {"max_steps": None, "epochs": 1.0}
    outcome = run(config_of(tmp_path / "run", grpo={"iterations": 2}, trainer=trainer, tiny={"rows": 8}), tiny)
    assert (outcome.step, len(tiny.requests)) == (4, 2)


class Stop:
    """Asks for the end after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    @hookimpl
    def on_event(self, event: Any) -> Any:
        from pegbox.events import Signal

        if type(event).__name__ == "Stepped" and event.step == self.step:
            return Signal.STOP
        return None


@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.parametrize("grpo", [{}, {"iterations": 2, "steps_per_generation": 2, "top_entropy_quantile": 0.6}])
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path: Path, grpo: dict[str, Any], step: int) -> None:
    whole, parted = (Plugin(), Plugin())
    keys = {"grpo": grpo, "trainer": {"max_steps": 6}}
    run(config_of(tmp_path / "whole", after=["stop"], **keys), whole, stop=Stop(0))
    run(config_of(tmp_path / "parted", after=["stop"], **keys), parted, stop=Stop(step))
    again = Plugin()
    run(config_of(tmp_path / "parted", after=["stop"], resume="auto", **keys), again, stop=Stop(0))
    asked = [(one.prompts, one.sampling.seed) for plugin in (parted, again) for one in plugin.requests]
    assert asked == [(one.prompts, one.sampling.seed) for one in whole.requests]
    assert records(tmp_path / "whole") == records(tmp_path / "parted")
    left, right = ((tmp_path / name / "completions.jsonl").read_text() for name in ("whole", "parted"))
    assert left == right
    for one, other in zip(whole.model.module.parameters(), again.model.module.parameters(), strict=True):
        assert torch.equal(one, other)


def test_held_out_prompts_are_completed_and_scored(tmp_path: Path) -> None:
    tiny = Plugin()
    trainer = {"max_steps": 2, "eval_every": 1, "eval_at_start": True}
    run(config_of(tmp_path / "run", tiny={"eval_rows": 6}, grpo={"eval_batch": 4}, trainer=trainer), tiny)
    (before, *_) = evals = records(tmp_path / "run", "eval")
    assert len(evals) == 3
    assert {"eval_reward", "eval_rewards/wanted/mean", "eval_completions/mean_length"} <= before.keys()
    asked = [request for request in tiny.requests if request.split == "eval"]
    assert [len(request.prompts) for request in asked] == [4, 2] * 3
    assert {(request.sampling.temperature, request.samples) for request in asked} == {(0.0, 1)}
    assert tiny.versions == [0, 1, 2]


class Reference:
    """Gives the policy's first weights as a reference: batches are laid out with its log-probabilities."""

    @hookimpl
    def register_items(self) -> list[Item]:
        return [Item(kind="extra", name="reference_logps", target="here")]

    @hookimpl(wrapper=True)
    def build_batches(self, ctx: Any, model: Any) -> Any:
        from dataclasses import replace

        from pegbox.rows import Extra
        from tiny_rl import build_model

        source = yield
        frozen, plain = build_model().requires_grad_(False), source.lay_out

        def lay_out(examples: Any) -> Any:
            made = []
            for batch in plain(examples):
                logps_N = model.compute(frozen, batch, frozenset({"logps"})).logps_N
                extra = {**batch.extra, "reference_logps": Extra(value=logps_N, layout="trained")}
                made.append(replace(batch, extra=extra))
            return made

        source.lay_out = lay_out
        return source


@pytest.mark.parametrize("placement", ["loss", "reward"])
def test_the_divergence_from_the_reference_begins_at_zero_and_grows(tmp_path: Path, placement: str) -> None:
    kinds = {"loss_type": "rloo", "advantage": "rloo", "scale_rewards": "none"} if placement == "reward" else {}
    grpo = {"beta": 0.1, "kl_placement": placement, "kl_estimator": "k1" if placement == "reward" else "k3", **kinds}
    adamw = {"learning_rate": 1e-2}
    run(config_of(tmp_path / "run", before=["reference"], grpo=grpo, adamw=adamw), reference=Reference())
    kl = [record["kl"] for record in records(tmp_path / "run")]
    assert kl[0] == pytest.approx(0.0, abs=1e-6)
    assert abs(kl[-1]) > 1e-3


@pytest.mark.parametrize(
    ("tiny", "grpo", "error", "message"),
    [
        ({"trained": True}, {}, DataError, r"train.jsonl:\d+ has trained tokens"),
        ({"deaf": True}, {}, RunError, "the weights of version 1, and says that it holds version 0"),
        ({"lag": 1}, {}, RunError, "version 0, and the policy is at version 1"),
        ({"reward": "none"}, {}, RunError, r"applies to 16 of 16 completions; the first is '.+' of the prompt '.+'"),
        ({"reward": "nan"}, {}, RunError, "the reward 'nan' of plugin 'tiny' is nan"),
        ({}, {"mask_truncated": True, "max_completion_length": 1}, RunError, "none of the 16 completions of a step"),
        ({}, {"steps_per_generation": 17}, DataError, "16 completions cannot be divided into 17"),
    ],
)
def test_what_is_wrong_stops_the_run(
    tmp_path: Path, tiny: dict[str, Any], grpo: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(config_of(tmp_path / "run", tiny=tiny, grpo=grpo))


def test_staleness_that_is_allowed_is_no_error(tmp_path: Path) -> None:
    assert run(config_of(tmp_path / "run", tiny={"lag": 1}, grpo={"max_staleness": 1})).step == 4


@pytest.mark.parametrize("case", ["short", "other", "future", "logps"])
def test_an_answer_that_does_not_fit_is_refused(tmp_path: Path, case: str) -> None:
    from dataclasses import replace

    class Wrong(Plugin):
        @hookimpl
        def generate_rollouts(self, ctx: Any, request: Any) -> Any:
            made = Plugin.generate_rollouts(self, ctx, request)
            first, *rest = made.rollouts
            changed = {
                "short": (first,),
                "other": (replace(first, prompt=(5,)), *rest),
                "future": (replace(first, last_version=3), *rest),
                "logps": (replace(first, logps=first.logps[:-1]), *rest),
            }
            return replace(made, rollouts=changed[case])

    with pytest.raises(PluginError, match="tiny"):
        run(config_of(tmp_path / "run"), Wrong())
