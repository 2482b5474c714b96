"""transformers' continuous batching, on the CPU and on a GPU where there is one: what it samples, and what it leaves.

It is asked as the engine asks it; the engine itself refuses it on a CPU, where it takes memory and brings no speed.
"""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pegbox.errors import RunError
from pegbox.testing import FakeRuntime
from pegbox.testing.tiny import EOS, PAD
from pegbox.types import Model
from pegbox_rollout_hf.completion import Completion
from pegbox_rollout_hf.config import RolloutHfConfig
from pegbox_rollout_hf.continuous import Wanted, sample_continuously
from pegbox_rollout_hf.modes import bare, sampling_from
from rollout_policy import PROMPTS, chi_square_z, request

GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
NEAR = {"fp32": 1e-4, "bf16": 0.25}
"""Two tokens whose logits are nearer change places by rounding (logits of the tiny policy reach 4)."""
FLOOR = {"fp32": 2e-5, "bf16": 0.03}
SHARE = 0.003


class On(FakeRuntime):
    """A device and a precision."""

    def __init__(self, device: str, precision: str = "fp32") -> None:
        self.precision: Any = precision
        self._device = torch.device(device, 0) if device == "cuda" else torch.device(device)

    @property
    def device(self) -> Any:
        return self._device


@pytest.fixture(params=["cpu", GPU])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def placed(model: Model, on: On) -> Any:
    return model.module.to(device=on.device, dtype=PRECISIONS[on.precision])


def sampled(model: Model, on: On, wished: Any, ending: tuple[int, ...] = (EOS,), seed: int = 5) -> list[Completion]:
    task = Wanted(range(len(wished.prompts)), ending, PAD, seed)
    with sampling_from(model.module, on):
        return sample_continuously(RolloutHfConfig(cache_share=SHARE), bare(model.module), on, wished, task)


def logits(module: Any, ids: Sequence[int]) -> torch.Tensor:
    """Of every position by one forward in the module's own data type, as float32 on the host."""
    device = next(module.parameters()).device
    with torch.no_grad():
        return (
            module.eval()(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits[0].float().cpu()
        )


def taught(module: Any, one: Completion, prompt: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities of a completion by one forward over the whole of it."""
    logps_TV = (logits(module, [*prompt, *one.tokens]) / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
    return logps_TV.gather(1, torch.tensor(one.tokens)[:, None])[:, 0]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_greedy_tokens_are_those_of_generate(model: Model, device: str, precision: str) -> None:
    """Also for a prompt that fills more than a page, which its samples share. Where two tokens are as likely but for
    rounding, the two may part."""
    on = On(device, precision)
    module = placed(model, on)
    prompts = (*PROMPTS, tuple(100 + at % 90 for at in range(300)))
    made = sampled(model, on, request(samples=2, prompts=prompts, temperature=0.0), ending=())
    assert [(one.prompt, one.sample) for one in made] == [(p, s) for p in range(len(prompts)) for s in range(2)]
    for prompt, one in zip((p for p in prompts for _ in range(2)), made, strict=True):
        ids = torch.tensor([prompt], device=on.device)
        options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": PAD}
        expected = (
            module.eval().generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
        )
        assert len(one.tokens) == 12
        assert not one.finished
        parted = next((at for at, pair in enumerate(zip(one.tokens, expected, strict=True)) if len({*pair}) > 1), None)
        if parted is not None:
            last_V = logits(module, [*prompt, *expected[:parted]])[-1]
            assert abs(last_V[one.tokens[parted]] - last_V[expected[parted]]) <= NEAR[precision]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_log_probabilities_are_those_of_a_forward(
    model: Model, device: str, precision: str, temperature: float
) -> None:
    """Against the same weights in float32: at most twice the error of a plain forward, and a floor."""
    on = On(device, precision)
    module = placed(model, on)
    exact = copy.deepcopy(module).float().cpu()
    made = sampled(model, on, request(samples=3, temperature=temperature))
    for one in made:
        truth = taught(exact, one, PROMPTS[one.prompt], temperature or 1.0)
        plain = taught(module, one, PROMPTS[one.prompt], temperature or 1.0)
        error = (torch.tensor(one.logps) - truth).abs().max()
        assert error <= 2 * (plain - truth).abs().max() + FLOOR[precision]


def test_samples_of_one_prompt_come_up_as_often_as_their_probability(model: Model, device: str) -> None:
    """Pearson's test over 1,000 first tokens of one prompt."""
    on, count = On(device), 1000
    module = placed(model, on)
    made = sampled(model, on, request(count, [PROMPTS[0]], max_tokens=1, temperature=1.0), ending=())
    p_V = logits(module, PROMPTS[0])[-1].double().softmax(-1)
    assert abs(chi_square_z(p_V, [one.tokens[0] for one in made])) < 3.9
    again = sampled(model, on, request(8, [PROMPTS[0]], max_tokens=4, temperature=1.0), ending=(), seed=6)
    assert len({one.tokens for one in again}) == 8


def test_a_completion_ends_with_a_token_that_ends_it(model: Model, device: str) -> None:
    on = On(device)
    placed(model, on)
    free = sampled(model, on, request(temperature=0.0), ending=())
    ends = free[1].tokens[4]
    made = sampled(model, on, request(temperature=0.0), ending=(EOS, ends))
    for one, before in zip(made, free, strict=True):
        cut = [at for at, token in enumerate(before.tokens) if token in (EOS, ends)]
        assert one.tokens == (before.tokens[: cut[0] + 1] if cut else before.tokens)
        assert one.finished == bool(cut)
        assert len(one.logps) == len(one.tokens)
    assert any(one.finished for one in made)


def test_weights_that_were_updated_between_two_calls_are_sampled_with(model: Model, device: str) -> None:
    """An adapter in float32 on a base in bfloat16, under bfloat16: what most runs train."""
    peft = pytest.importorskip("peft")
    on = On(device, "bf16")
    module = placed(model, on)
    module.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    wished = request(samples=2, temperature=0.0, max_tokens=6)
    before = sampled(model, on, wished)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator(on.device).manual_seed(0))
    after = sampled(model, on, wished)
    assert [one.tokens for one in after] != [one.tokens for one in before]
    with torch.autocast(device, dtype=torch.bfloat16):
        for one in after:
            expected = taught(module, one, PROMPTS[one.prompt])
            assert (torch.tensor(one.logps) - expected).abs().max() <= 0.25


def test_many_calls_leave_no_memory_no_threads_and_the_model_as_it_was(model: Model, device: str) -> None:
    on = On(device, "bf16")
    module = placed(model, on).train()
    attention, state = module.config._attn_implementation, torch.get_rng_state()
    held: list[tuple[int, int]] = []
    for _ in range(3):
        sampled(model, on, request(samples=2, temperature=1.0, max_tokens=6))
        if device == "cuda":
            gc.collect()
            torch._C._cuda_clearCublasWorkspaces()  # one for each stream, which come from a pool
        held.append((torch.cuda.memory_allocated() if device == "cuda" else 0, threading.active_count()))
    assert held[1] == held[2], held
    assert module.config._attn_implementation == attention
    assert "forward" not in vars(module)
    assert all(part.training for part in module.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_forward_that_fails_is_an_error_of_the_run_with_its_words(
    model: Model, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = On(device)
    module = placed(model, on)

    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("this layer is broken")

    monkeypatch.setattr(module.model.layers[1].mlp, "forward", broken)
    with pytest.raises(RunError, match="this layer is broken"):
        sampled(model, on, request())
    assert "forward" not in vars(module)
