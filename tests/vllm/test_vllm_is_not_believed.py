"""A server that keeps old weights, serves another base, or answers with another adapter is found out within one sync.

Each is a real vLLM, most behind a proxy that meddles.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from meddling import Proxy
from pegbox.errors import ConfigError, RunError
from rollout_runs import StartedRun

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
Start = Callable[..., StartedRun]
LOAD, RELOAD = "/v1/load_lora_adapter", "/collective_rpc"


def test_a_server_that_swallows_adapters_is_found_at_the_first_sync(started: Start, proxy: Proxy) -> None:
    proxy.swallows = frozenset({LOAD})
    with pytest.raises(RunError, match=r"said that it loaded 'pegbox-\w+-canary', but lists no such adapter"):
        started(url=proxy.url).sync(0)


def test_a_server_that_stops_taking_adapters_is_found_at_that_sync(started: Start, proxy: Proxy) -> None:
    run = started(url=proxy.url)
    run.sync(0)
    proxy.swallows = frozenset({LOAD})
    run.learn(0, size=1e-6)
    with pytest.raises(RunError, match=r"said that it loaded 'pegbox-\w+-v1', but lists no such adapter"):
        run.sync(1)


def test_a_server_that_swallows_full_weights_is_found_at_the_first_sync(started: Start, proxy: Proxy) -> None:
    proxy.swallows = frozenset({RELOAD})
    with pytest.raises(RunError, match=r"keeps its old weights: after pegbox-\w+-canary"):
        started(lora=False, url=proxy.url).sync(0)


def test_a_server_that_freezes_is_found_by_its_checksums_even_if_the_update_is_tiny(
    started: Start, proxy: Proxy
) -> None:
    run = started(lora=False, url=proxy.url)
    run.sync(0)
    proxy.swallows = frozenset({RELOAD})
    run.learn(0, size=1e-6)
    with pytest.raises(RunError, match=r"does not hold the weights of pegbox-\w+-v1: 7 of 7 checksums"):
        run.sync(1)
    proxy.swallows = frozenset()


@pytest.mark.parametrize("lora", [True, False])
def test_another_base_model_is_found_at_the_first_sync(
    started: Start, proxy: Proxy, other_base: Path, lora: bool
) -> None:
    """With full weights the server is brought to ours, unless it keeps its own."""
    run = started(lora=lora, model=other_base, url=proxy.url)
    if lora:
        with pytest.raises(RunError, match=r"(?s)serves another base model than the one.*Start it with"):
            run.sync(0)
    else:
        assert run.sync(0).version == 0


@pytest.mark.parametrize("lora", [True, False])
def test_another_vocabulary_is_found_at_the_first_sync(
    started: Start, served: str, wider_base: Path, lora: bool
) -> None:
    with pytest.raises(RunError, match=r"another base model.*a token of ours is not in its vocabulary"):
        started(lora=lora, model=wider_base, url=served).sync(0)


def test_an_answer_of_another_adapter_is_refused_by_its_name(started: Start, proxy: Proxy) -> None:
    run = started(url=proxy.url)
    run.sync(0)
    proxy.asks = lambda body: {**body, "model": "base"}
    with pytest.raises(RunError, match=r"answered with 'base', 'pegbox-\w+-v0' was asked for"):
        run.generate()
    run.learn(0)
    with pytest.raises(RunError, match=r"answered with 'base', 'pegbox-\w+-v1' was asked for"):
        run.sync(1)


def test_an_answer_of_another_adapter_under_the_right_name_is_found_by_the_canary(started: Start, proxy: Proxy) -> None:
    asked: list[str] = []

    def ask_base(body: dict) -> dict:
        asked.append(body["model"])
        return {**body, "model": "base"}

    proxy.asks = ask_base
    proxy.answers = lambda body: {**body, "model": asked[-1]}
    with pytest.raises(RunError, match=r"keeps its old weights: after pegbox-\w+-canary"):
        started(url=proxy.url).sync(0)


def test_weights_that_somebody_else_sent_meanwhile_are_found_after_the_completions(
    started: Start, served: str, other_base: Path
) -> None:
    run, other = started(lora=False, url=served), started(lora=False, model=other_base, url=served)
    run.sync(0)
    other.sync(0)
    with pytest.raises(RunError, match=r"says its weights are 'pegbox-\w+-v0', it was given 'pegbox-\w+-v0'"):
        run.generate()


def test_log_probabilities_before_the_filters_are_found_at_the_first_sync(started: Start, proxy: Proxy) -> None:
    """As those of a server in its default mode are."""
    proxy.asks = lambda body: {**body, "top_k": 0}
    with pytest.raises(ConfigError, match=r"(?s)the only token it may sample has.*--logprobs-mode processed_logprobs"):
        started(url=proxy.url).sync(0)


def test_a_base_that_is_not_served_is_an_error_with_what_is(started: Start, served: str) -> None:
    run = started(url=served, served_name="nobody")
    with pytest.raises(ConfigError, match=r"serves no 'nobody'\nIt serves: base"):
        run.sync(0)
