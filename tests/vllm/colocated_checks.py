"""vLLM in the trainer's process. Runs in vLLM's own environment, by pytest; `test_vllm_colocated.py` starts it.

What is asked of completions is asked of both modes: those tests are imported.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from grpo_runs import Rewarding, run
from pegbox.errors import ConfigError, RunError
from rollout_runs import StartedRun
from test_vllm_rollouts import (  # noqa: F401 - collected here as well
    CLOSE,
    test_a_prompt_without_room_for_its_completion_is_an_error,
    test_completions_end_at_stop_tokens_and_texts_and_say_whether_they_ended,
    test_filters_leave_only_what_they_allow,
    test_greedy_completions_are_those_of_transformers_generate,
    test_log_probabilities_are_the_trainers_under_the_temperature,
    test_log_probabilities_are_those_of_the_distribution_that_filters_leave,
    test_rollouts_stand_in_order_and_carry_columns_and_versions,
    test_sampling_is_a_function_of_the_seed_and_the_prompts_place,
)

Start = Callable[..., StartedRun]
HERE = {
    "mode": "colocate",
    "eager": True,
    "max_model_len": 128,
    "args": ["--kv-cache-memory-bytes", str(2**26), "--max-num-seqs", "32"],
}


@pytest.fixture
def synced(started: Start) -> StartedRun:
    """A run with an adapter that has learnt something, at version 1 of its weights."""
    run = started(**HERE)
    run.sync(0)
    run.learn(1, size=0.1)
    run.sync(1)
    return run


@pytest.mark.parametrize("lora", [True, False])
def test_each_version_is_proven_and_sampled_with_and_what_was_learnt_since_is_not(started: Start, lora: bool) -> None:
    run = started(lora=lora, **HERE)
    for version in range(3):
        evidence = run.sync(version).evidence
        assert ("7 of 15 parameters of the workers read back with our checksums" in evidence) is not lora
        assert ("a canary was seen" in evidence) is (version == 0)
        made = run.generate(temperature=0.0)
        assert {(rollout.first_version, rollout.last_version) for rollout in made} == {(version, version)}
        for rollout in made:
            logps = run.logits(rollout).log_softmax(-1).gather(-1, torch.tensor(rollout.completion)[:, None])[:, 0]
            assert (logps - torch.tensor(rollout.logps)).abs().max() < CLOSE
        # vLLM's weights are its own: none of the trainer's tensors is among them.
        run.learn(version, size=0.1)
        assert run.generate(temperature=0.0) == made
    assert bool(list(run.ctx.folder.rglob("*.safetensors"))) is lora
    assert not lora or len(run.vllm.adapters()) == 1


def test_weights_that_are_not_taken_are_found_at_the_first_and_at_a_later_sync(
    started: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def freeze(run: StartedRun) -> None:
        ask = run.vllm._llm.collective_rpc
        deaf = lambda method, **named: [None] if method == "reload_weights" else ask(method, **named)  # noqa: E731
        monkeypatch.setattr(run.vllm._llm, "collective_rpc", deaf)

    first = started(lora=False, **HERE)
    freeze(first)
    with pytest.raises(RunError, match=r"vLLM in this process keeps its old weights: after pegbox-\w+-canary"):
        first.sync(0)
    first.close()
    later = started(lora=False, **HERE)
    later.sync(0)
    freeze(later)
    later.learn(0, size=1e-6)
    with pytest.raises(RunError, match=r"does not hold the weights of pegbox-\w+-v1: 7 of 7 checksums"):
        later.sync(1)


def test_another_base_model_and_another_vocabulary_are_found_at_the_first_sync(
    started: Start, base: Path, other_base: Path, wider_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pegbox_rollout_vllm import routes

    # As if model.base named another folder than the one that was loaded.
    shape_of = routes.shape_of
    monkeypatch.setattr(routes, "shape_of", lambda model: shape_of(model)._replace(base=str(base)))
    other = started(model=other_base, **HERE)
    with pytest.raises(RunError, match=r"(?s)in this process serves another base model than the one.*Start it with"):
        other.sync(0)
    other.close()
    with pytest.raises(RunError, match=r"another base model.*a token of ours is not in its vocabulary"):
        started(model=wider_base, **HERE).sync(0)


def test_vllm_leaves_randomness_environment_and_threads_as_they_were(started: Start) -> None:
    def state() -> tuple[Any, ...]:
        return (
            torch.get_rng_state().tolist(),
            random.getstate(),
            numpy.random.get_state()[1].tolist(),
            dict(os.environ),
            torch.get_num_threads(),
            torch.set_num_threads,
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
        )

    before, joined = state(), torch.distributed.is_initialized()
    run = started(lora=False, **HERE)
    # The adapter-free model is loaded without randomness, so vLLM alone could have changed anything.
    assert state() == before
    run.sync(0)
    run.generate(samples=3, seed=None)
    assert state() == before
    run.close()
    assert torch.distributed.is_initialized() is joined


def test_sleep_is_refused_where_vllm_has_none(started: Start) -> None:
    with pytest.raises(ConfigError, match=r"sleep is true, and vLLM has no sleep mode on a cpu"):
        started(**HERE, sleep=True)


def test_arguments_that_vllm_does_not_know_are_an_error(started: Start) -> None:
    with pytest.raises(ConfigError, match=r"does not take these arguments: .*--no-such-option"):
        started(**{**HERE, "args": ["--no-such-option"]})


def test_an_engine_that_does_not_start_is_an_error_with_vllms_own_words(started: Start) -> None:
    with pytest.raises(RunError, match=r"(?s)did not start in this process.*max_model_len"):
        started(**{**HERE, "max_model_len": 100_000})


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_grpo_runs(base: Path, tmp_path: Path, lora: bool) -> None:
    """Its rewards are compared outside, with those of a run on a server."""
    assert run(tmp_path, base, Rewarding(), lora=lora, **HERE).reason == "finished"


def test_a_second_vllm_in_one_process_is_an_error_and_the_first_goes_on(synced: StartedRun, started: Start) -> None:
    expected = synced.generate()
    with pytest.raises(RunError, match=r"another vLLM is in this process"):
        started(**HERE)
    assert synced.generate() == expected
