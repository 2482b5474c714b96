"""On a GPU, through the engine: what is sampled, by the loop and by continuous batching, and what is left as it was.

`test_continuous.py` looks at continuous batching more closely, on a GPU too where there is one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pegbox.testing import FakeRuntime
from pegbox.types import Model
from rollout_policy import completions, engine, request

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Gpu(FakeRuntime):
    def __init__(self, precision: Any = "fp32") -> None:
        self.precision = precision

    @property
    def device(self) -> Any:
        return torch.device("cuda", 0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("continuous", ["off", "on"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_log_probabilities_are_those_of_a_forward(
    model: Model, continuous: str, precision: str, temperature: float
) -> None:
    module = model.module.cuda()
    if precision == "bf16":
        module.to(torch.bfloat16)
    state = torch.cuda.get_rng_state(), torch.get_rng_state()
    attention = module.config._attn_implementation
    made = engine(model, Gpu(precision), continuous=continuous, cache_share=0.01)
    batch = made.generate(request(samples=3, temperature=temperature), seed=5)
    assert all(
        torch.equal(a, b) for a, b in zip(state, (torch.cuda.get_rng_state(), torch.get_rng_state()), strict=True)
    )
    assert module.config._attn_implementation == attention
    assert "forward" not in vars(module)
    module.eval()
    for rollout in batch.rollouts:
        ids = torch.tensor([[*rollout.prompt, *rollout.completion]], device="cuda")
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == "bf16"):
            logits_TV = module(input_ids=ids, use_cache=False).logits[0].float() / (temperature or 1.0)
        logps_TV = logits_TV.log_softmax(-1)[len(rollout.prompt) - 1 : -1]
        expected = logps_TV.gather(1, ids[0, len(rollout.prompt) :, None])[:, 0].cpu()
        close = 1e-4 if precision == "fp32" else 0.3
        assert torch.allclose(torch.tensor(rollout.logps), expected, atol=close, rtol=0)
        if temperature == 0.0 and precision == "fp32":
            assert torch.equal(logps_TV.argmax(-1), ids[0, len(rollout.prompt) :])


def test_the_loop_samples_on_a_gpu_what_it_samples_on_a_cpu(model: Model) -> None:
    wished = request(samples=4, temperature=1.0)
    expected = completions(engine(model).generate(wished, seed=9))
    model.module.cuda()
    found = completions(engine(model, Gpu(), continuous="off").generate(wished, seed=9))
    same = sum(a == b for a, b in zip(found, expected, strict=True))
    assert same >= len(expected) - 1, "but for a draw at the very border of two tokens"
