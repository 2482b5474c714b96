"""Completions and updates of weights with a real vLLM, against transformers' forward and generate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pegbox.errors import RunError
from rollout_runs import PROMPTS, StartedRun

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
Start = Callable[..., StartedRun]
CLOSE = 1e-4


@pytest.fixture
def synced(started: Start, served: str) -> StartedRun:
    """A run with an adapter that has learnt something, at version 1 of its weights."""
    run = started(url=served)
    run.sync(0)
    run.learn(1, size=0.1)
    run.sync(1)
    return run


def test_greedy_completions_are_those_of_transformers_generate(synced: StartedRun) -> None:
    made = synced.generate(samples=2, temperature=0.0)
    network = synced.model.module.eval()
    for index, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        out = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        expected = tuple(out[0, len(prompt) :].tolist())
        assert [rollout.completion for rollout in made[2 * index : 2 * index + 2]] == [expected, expected]


def test_log_probabilities_are_the_trainers_under_the_temperature(synced: StartedRun) -> None:
    for temperature in (1.0, 0.6):
        for rollout in synced.generate(samples=3, temperature=temperature):
            logps = (synced.logits(rollout) / temperature).log_softmax(-1)
            expected = logps.gather(-1, torch.tensor(rollout.completion)[:, None])[:, 0]
            assert (expected - torch.tensor(rollout.logps)).abs().max() < CLOSE


def test_log_probabilities_are_those_of_the_distribution_that_filters_leave(synced: StartedRun) -> None:
    for rollout in synced.generate(samples=3, temperature=0.5, top_k=3):
        logps = synced.logits(rollout) / 0.5
        kept = logps.topk(3).values
        expected = logps.gather(-1, torch.tensor(rollout.completion)[:, None])[:, 0] - kept.logsumexp(-1)
        assert (expected - torch.tensor(rollout.logps)).abs().max() < CLOSE


def test_filters_leave_only_what_they_allow(synced: StartedRun) -> None:
    for rollout in synced.generate(samples=4, temperature=1.0, top_p=0.2):
        probability = synced.logits(rollout).softmax(-1)
        ordered, order = probability.sort(descending=True)
        allowed = (ordered.cumsum(-1) - ordered) < 0.2 + CLOSE
        places = (order == torch.tensor(rollout.completion)[:, None]).nonzero()[:, 1]
        assert allowed[torch.arange(len(places)), places].all()
    for rollout in synced.generate(samples=4, temperature=1.0, min_p=0.5):
        probability = synced.logits(rollout).softmax(-1)
        chosen = probability.gather(-1, torch.tensor(rollout.completion)[:, None])[:, 0]
        assert (chosen >= 0.5 * probability.max(-1).values - CLOSE).all()
    plain = synced.generate(temperature=0.0, max_tokens=24)
    penalized = synced.generate(temperature=0.0, max_tokens=24, repetition_penalty=5.0)
    assert all(len(set(rollout.completion)) == 24 for rollout in penalized)
    assert any(len(set(rollout.completion)) < 24 for rollout in plain)


def test_sampling_is_a_function_of_the_seed_and_the_prompts_place(synced: StartedRun) -> None:
    same = (PROMPTS[0],) * 3
    first = [rollout.completion for rollout in synced.generate(samples=3, prompts=same)]
    again = [rollout.completion for rollout in synced.generate(samples=3, prompts=same)]
    other = [rollout.completion for rollout in synced.generate(samples=3, prompts=same, seed=4)]
    assert first == again
    assert len(set(first)) == len(first)
    assert not set(first) & set(other)


def test_completions_end_at_stop_tokens_and_texts_and_say_whether_they_ended(synced: StartedRun) -> None:
    (cut,) = synced.generate(prompts=PROMPTS[:1], temperature=0.0, max_tokens=6)
    assert (len(cut.completion), cut.finished) == (6, False)
    third = cut.completion[2]
    (by_id,) = synced.generate(prompts=PROMPTS[:1], temperature=0.0, max_tokens=6, stop_ids=(third,))
    (by_text,) = synced.generate(prompts=PROMPTS[:1], temperature=0.0, max_tokens=6, stop=(f"w{third}",))
    for rollout in (by_id, by_text):
        assert rollout.finished
        assert rollout.completion == cut.completion[: cut.completion.index(third) + 1]
        assert len(rollout.logps) == len(rollout.completion)
    end = synced.ctx.processor.tokenizer.eos_token_id
    ended = [rollout for rollout in synced.generate(samples=16, max_tokens=100) if end in rollout.completion]
    assert ended
    assert all(rollout.completion.index(end) == len(rollout.completion) - 1 and rollout.finished for rollout in ended)


def test_rollouts_stand_in_order_and_carry_columns_and_versions(synced: StartedRun) -> None:
    made = synced.generate(samples=2)
    assert [rollout.prompt for rollout in made] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert [rollout.columns["row"] for rollout in made] == [row for row in range(len(PROMPTS)) for _ in range(2)]
    assert {(rollout.first_version, rollout.last_version) for rollout in made} == {(1, 1)}


def test_a_prompt_without_room_for_its_completion_is_an_error(synced: StartedRun) -> None:
    with pytest.raises(RunError, match=r"a prompt of 100 tokens and 29 new ones are more than vLLM's 128"):
        synced.generate(prompts=((5,) * 100,), max_tokens=29)


def test_each_adapter_has_a_name_of_its_version_and_the_last_one_alone_is_served(
    started: Start, served: str, listed: Callable[[], list[str]]
) -> None:
    run = started(url=served)
    names = set()
    for version in range(3):
        receipt = run.sync(version)
        assert receipt.version == version
        (name,) = set(listed()) - {"base"}
        assert name in receipt.evidence
        assert name.endswith(f"-v{version}")
        names.add(name)
        (rollout,) = run.generate(prompts=PROMPTS[:1], temperature=0.0)
        logps = run.logits(rollout).log_softmax(-1).gather(-1, torch.tensor(rollout.completion)[:, None])[:, 0]
        assert (logps - torch.tensor(rollout.logps)).abs().max() < CLOSE
        run.learn(version, size=0.1)
    assert len({name.split("-")[1] for name in names}) == 3
    run.close()
    assert listed() == ["base"]


def test_full_weights_are_read_back_and_the_base_is_put_back(
    started: Start, served: str, base: Path, other_base: Path
) -> None:
    run = started(lora=False, url=served)
    for version in range(2):
        evidence = run.sync(version).evidence
        assert "7 of 15 parameters of the workers read back with our checksums" in evidence
        (rollout,) = run.generate(prompts=PROMPTS[:1], temperature=0.0)
        logps = run.logits(rollout).log_softmax(-1).gather(-1, torch.tensor(rollout.completion)[:, None])[:, 0]
        assert (logps - torch.tensor(rollout.logps)).abs().max() < CLOSE
        run.learn(version)
    run.close()
    # No restart by hand between runs: another run finds the base as it was.
    assert started(url=served).sync(0).version == 0


def test_the_canary_leaves_no_trace_in_what_is_trained(started: Start, served: str) -> None:
    for lora in (True, False):
        run = started(lora=lora, url=served)
        before = {name: tensor.clone() for name, tensor in run.model.module.state_dict().items()}
        assert "a canary was seen before" in run.sync(0).evidence
        after = run.model.module.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
        run.close()


def test_memory_is_given_back_while_the_run_learns(started: Start, served: str) -> None:
    """A CPU's vLLM keeps its memory, but goes through sleeping and waking."""
    from pegbox_rollout_vllm.client import Client

    run, client = started(url=served, sleep=True), Client(served, 60.0)
    run.sync(0)
    expected = run.generate()
    with run.ctx.phase("learn"):
        assert client.get("/is_sleeping")["is_sleeping"]
    with run.ctx.phase("generate"):
        run.sync(1)
        assert not client.get("/is_sleeping")["is_sleeping"]
    assert [rollout.completion for rollout in run.generate()] == [rollout.completion for rollout in expected]
