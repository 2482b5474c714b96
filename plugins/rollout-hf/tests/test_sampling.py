"""What is sampled: transformers' tokens, the right distribution, and log-probabilities that the model confirms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pegbox.rollouts import Rollout, Sampling
from pegbox.testing.tiny import EOS, tiny_processor
from pegbox.types import Model
from pegbox_rollout_hf.sampling import Chooser, invert, uniforms
from rollout_policy import PROMPTS, chi_square_z, completions, engine, request


def taught(module: Any, rollout: Rollout, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities of a completion by one forward over the whole of it."""
    ids = torch.tensor([[*rollout.prompt, *rollout.completion]])
    module.eval()
    with torch.no_grad():
        logps_TV = (module(input_ids=ids, use_cache=False).logits[0].double() / temperature).log_softmax(-1)
    at = range(len(rollout.prompt) - 1, ids.shape[1] - 1)
    return torch.stack([logps_TV[place, ids[0, place + 1]] for place in at])


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_completions_are_those_of_transformers_prompt_by_prompt(model: Model, penalty: float) -> None:
    batch = engine(model).generate(request(temperature=0.0, repetition_penalty=penalty), seed=0)
    model.module.eval()
    for prompt, rollout in zip(PROMPTS, batch.rollouts, strict=True):
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": EOS, "repetition_penalty": penalty}
        expected = model.module.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert rollout.completion == tuple(expected[0, len(prompt) :].tolist())


def test_greedy_completions_end_where_those_of_transformers_end(model: Model) -> None:
    ends = completions(engine(model).generate(request(temperature=0.0), seed=0))[1][4]
    model.module.generation_config.eos_token_id = [ends, EOS]
    batch = engine(model).generate(request(temperature=0.0), seed=0)
    assert any(rollout.finished for rollout in batch.rollouts)
    model.module.eval()
    for prompt, rollout in zip(PROMPTS, batch.rollouts, strict=True):
        expected = model.module.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)[0, len(prompt) :]
        assert rollout.completion == tuple(expected.tolist())
        assert rollout.finished == (rollout.completion[-1] in (ends, EOS))


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.7},
        {"temperature": 1.0},
        {"temperature": 0.0},
        {"temperature": 1.3, "top_p": 0.8, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2},
    ],
)
def test_log_probabilities_are_those_of_a_forward_under_the_temperature(model: Model, sampling: dict[str, Any]) -> None:
    batch = engine(model).generate(request(samples=3, **sampling), seed=5)
    for rollout in batch.rollouts:
        expected = taught(model.module, rollout, sampling["temperature"] or 1.0)
        assert torch.allclose(torch.tensor(rollout.logps).double(), expected, atol=1e-5, rtol=0)


def test_the_samples_are_those_of_a_plain_loop_without_cache_and_batches(model: Model) -> None:
    """The loop inverts the distribution function in double precision, one row at a time."""
    batch = engine(model).generate(request(samples=2, temperature=0.9, max_tokens=8), seed=11)
    model.module.eval()
    for place, rollout in enumerate(batch.rollouts):
        u_S = uniforms(11, [(place // 2, place % 2)], 8)[0]
        ids = list(rollout.prompt)
        for u in u_S.double():
            with torch.no_grad():
                logits_V = model.module(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()
            passed_V = (logits_V / 0.9).softmax(-1).cumsum(-1)
            ids.append(int((passed_V <= u).sum()))
            if ids[-1] == EOS:
                break
        assert tuple(ids[len(rollout.prompt) :]) == rollout.completion


def test_what_is_sampled_does_not_depend_on_what_is_beside_it(model: Model) -> None:
    wished = request(samples=3, temperature=1.0)
    whole = engine(model).generate(wished, seed=2)
    for size in (1, 2, 5):
        small = engine(model, batch=size).generate(wished, seed=2)
        assert completions(small) == completions(whole)
        for one, other in zip(small.rollouts, whole.rollouts, strict=True):
            assert torch.allclose(torch.tensor(one.logps), torch.tensor(other.logps), atol=1e-5)
    assert completions(engine(model).generate(wished, seed=3)) != completions(whole)
    assert len(set(completions(whole))) > 8


def test_tokens_come_up_as_often_as_their_probability(model: Model) -> None:
    """Pearson's test over 4000 first tokens: the statistic of a right sampler is above this once in 10,000 seeds."""
    count, prompt = 4000, PROMPTS[0]
    batch = engine(model, batch=count).generate(request(count, [prompt], max_tokens=1, temperature=1.0), seed=1)
    with torch.no_grad():
        p_V = model.module.eval()(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
    assert abs(chi_square_z(p_V, [one.completion[0] for one in batch.rollouts])) < 3.9


@pytest.mark.parametrize(
    ("sampling", "left"),
    [
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.65}, [0, 1]),
        ({"min_p": 0.35}, [0, 1]),
        ({"top_k": 1}, [0]),
        ({}, [0, 1, 2, 3]),
    ],
)
def test_filters_leave_the_tokens_that_they_should(sampling: dict[str, Any], left: list[int]) -> None:
    p_V = torch.tensor([0.5, 0.2, 0.17, 0.13])
    chooser = Chooser(Sampling(max_tokens=1, **sampling))
    u_R = torch.linspace(0, 0.9999, 400)
    ids_RT = torch.zeros(400, 1, dtype=torch.long)
    token_R, logp_R = chooser(ids_RT, p_V.log().expand(400, 4).clone(), u_R)
    assert sorted(set(token_R.tolist())) == left
    shares = torch.bincount(token_R, minlength=4)[left] / 400
    assert torch.allclose(shares, p_V[left] / p_V[left].sum(), atol=0.01)
    assert torch.allclose(logp_R, p_V.log()[token_R])


def test_a_token_of_probability_zero_is_never_chosen() -> None:
    p_RV = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).expand(3, 5)
    assert invert(p_RV, torch.tensor([0.0, 0.25, 1 - 2**-24])).tolist() == [1, 3, 3]


def test_a_stop_text_ends_a_completion_with_the_token_that_completes_it(model: Model) -> None:
    free = engine(model).generate(request(samples=2, temperature=1.0), seed=4)
    decode = tiny_processor().tokenizer.decode
    target = free.rollouts[3].completion
    stop = decode(target[2:4])
    stopped = engine(model).generate(request(samples=2, temperature=1.0, stop=(stop,)), seed=4)
    assert stopped.rollouts[3].completion == target[:4]
    for before, after in zip(free.rollouts, stopped.rollouts, strict=True):
        text = decode(before.completion)
        assert after.completion == before.completion[: len(after.completion)]
        assert after.finished == (stop in text or before.finished)
        assert (stop in decode(after.completion)) == (stop in text)


def test_stop_ids_of_a_request_end_a_completion(model: Model) -> None:
    free = engine(model).generate(request(temperature=1.0), seed=4)
    target = free.rollouts[0].completion
    stopped = engine(model).generate(request(temperature=1.0, stop_ids=(target[3],)), seed=4)
    assert stopped.rollouts[0].completion == target[: target.index(target[3]) + 1]
    assert stopped.rollouts[0].finished
    assert len(stopped.rollouts[0].logps) == len(stopped.rollouts[0].completion)


def test_the_models_own_sampling_settings_are_not_the_requests(model: Model) -> None:
    plain = completions(engine(model).generate(request(samples=2, temperature=1.0), seed=4))
    generation = model.module.generation_config
    generation.temperature, generation.top_k, generation.repetition_penalty = 0.1, 1, 1.5
    generation.do_sample = True
    assert completions(engine(model).generate(request(samples=2, temperature=1.0), seed=4)) == plain
