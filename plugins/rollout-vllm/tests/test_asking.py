"""Requests and answers of the completion endpoint. `recorded.json` holds answers of vLLM 0.32 as they came."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pegbox.errors import ConfigError, RunError
from pegbox.rollouts import RolloutRequest, Sampling
from pegbox_rollout_vllm.asking import (
    completion_body,
    completions,
    prompt_seed,
    require_processed,
    scores,
    single_body,
)

RECORDED: dict[str, Any] = json.loads(Path(__file__).with_name("recorded.json").read_text(encoding="utf-8"))


def request(samples: int = 2, **sampling: Any) -> RolloutRequest:
    prompts = ((5, 6, 7), (8, 9))
    return RolloutRequest(
        prompts=prompts, columns=({}, {}), samples=samples, sampling=Sampling(**{"max_tokens": 6, **sampling})
    )


def test_every_option_of_a_sampling_reaches_the_server() -> None:
    options = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}
    body = completion_body("base", request(**options, stop=("a",), stop_ids=(4,), seed=1), 1, [1, 4])
    assert {name: body[name] for name in options} == options
    assert (body["prompt"], body["n"], body["max_tokens"]) == ([8, 9], 2, 6)
    assert (body["stop"], body["stop_token_ids"], body["seed"]) == (["a"], [1, 4], prompt_seed(1, 1))


def test_without_a_seed_the_server_chooses_and_greedy_is_asked_once() -> None:
    assert "seed" not in completion_body("base", request(), 0, [])
    assert completion_body("base", request(temperature=0.0), 0, [])["n"] == 1


def test_seeds_of_neighbouring_prompts_and_their_samples_never_meet() -> None:
    seeds = sorted(prompt_seed(run, index) for run in range(4) for index in range(256))
    assert min(right - left for left, right in pairwise(seeds)) > 10_000
    assert max(seeds) < 2**62


def test_a_recorded_answer_gives_tokens_log_probabilities_and_how_it_ended() -> None:
    (cut,), (ended,) = completions(RECORDED["cut"], "base", 1), completions(RECORDED["stopped"], "base", 1)
    assert cut.tokens == (81, 132, 119, 187, 10, 21)
    assert cut.logps[0] == -3.587656021118164
    assert not cut.finished
    assert ended.tokens == (169, 207, 243, 21, 4, 235)
    assert ended.finished


def test_recorded_scores_are_those_of_the_tokens_after_the_first() -> None:
    found = scores(RECORDED["scored"], "base", [5, 6, 7, 8, 9])
    assert found == [-5.761715888977051, -6.518064975738525, -6.076834201812744, -4.8220367431640625]


def test_an_answer_of_another_model_is_refused() -> None:
    name = RECORDED["adapter"]["model"]
    assert completions(RECORDED["adapter"], name, 1)[0].tokens
    with pytest.raises(RunError, match=r"answered with 'pegbox-x-v1', 'pegbox-x-v2' was asked for"):
        completions(RECORDED["adapter"], "pegbox-x-v2", 1)
    with pytest.raises(RunError, match=r"answered with 'base', 'pegbox-x-v1' was asked for"):
        scores(RECORDED["scored"], name, [5, 6, 7, 8, 9])


def changed(**fields: Any) -> dict[str, Any]:
    """The recorded answer with other fields of its choice."""
    answer = RECORDED["cut"]
    return {**answer, "choices": [{**answer["choices"][0], **fields}]}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (changed(token_ids=None), "holds no token ids with log-probabilities"),
        (changed(logprobs=None), "holds no token ids with log-probabilities"),
        (changed(token_ids=[81, 132, 119, 187, 10, 22]), "holds no token ids with log-probabilities"),
        (changed(finish_reason="abort"), "ended a completion with 'abort' after 6 tokens"),
        ({**RECORDED["cut"], "choices": []}, "gave 0 completions of a prompt, 1 were asked for"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_an_error(answer: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        completions(answer, "base", 1)


def test_an_answer_without_scores_is_an_error() -> None:
    with pytest.raises(RunError, match="holds no log-probabilities of the prompt"):
        scores(RECORDED["cut"], "base", [5, 6, 7, 8, 9])


def test_a_single_allowed_token_must_have_the_probability_one() -> None:
    assert single_body("base", (5, 6))["top_k"] == 1
    require_processed({"choices": [{"logprobs": {"token_logprobs": [0.0]}}]})
    with pytest.raises(ConfigError, match=r"has the log-probability -3\.59"):
        require_processed(
            {
                "choices": [
                    {"logprobs": {"token_logprobs": RECORDED["cut"]["choices"][0]["logprobs"]["token_logprobs"][:1]}}
                ]
            }
        )
