"""On a GPU: offload beside the computing changes no bit, and what lies on the device shrinks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pegbox import hooks
from pegbox.patches import PatchLog
from pegbox.plan import compose
from pegbox.testing.tiny import tiny_model
from pegbox.types import Model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LAYERS, TOKENS = 8, 4096


def step(settings: dict[str, Any] | None) -> tuple[list[torch.Tensor], int]:
    """Gradients of one step in bf16, and the most bytes on the device beyond weights."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "max_position_embeddings": TOKENS}
    model: Model = tiny_model(num_hidden_layers=LAYERS, **sizes)
    model.module.to("cuda", torch.bfloat16)
    if settings is not None:
        ctx = compose({"model": {"name": "tiny"}, "plugins": ["activations"], "activations": settings})
        PatchLog().apply(model, ctx.each(hooks.patch_modules, ctx, model, "recompute"))
    ids = torch.arange(TOKENS, device="cuda").remainder(250)[None]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model.module.model(ids, use_cache=False).last_hidden_state.float().square().mean().backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return [p.grad for p in model.module.parameters() if p.grad is not None], peak


@pytest.mark.parametrize("policy", ["full", "none"])
def test_offload_gives_the_same_bits_in_less_memory(policy: str) -> None:
    plain = None if policy == "none" else {"policy": policy}
    expected, whole = step(plain)
    gradients, less = step({"policy": policy, "offload": "cpu"})
    again, _ = step(plain)
    exact = all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    for got, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0 if exact else 1e-2, atol=0 if exact else 1e-4)
    assert less < whole
