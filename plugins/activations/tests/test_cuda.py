"""On a GPU: offload beside the computing changes no bit and what lies on the device shrinks; `auto` keeps its limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pegbox import hooks
from pegbox.events import GradientsReady, Stepped
from pegbox.patches import PatchLog
from pegbox.plan import compose
from pegbox.testing import FakeRuntime
from pegbox.testing.tiny import tiny_model
from pegbox.types import Model
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LAYERS, TOKENS = 8, 4096
AttentionInterface.register("without masks", sdpa_attention_forward)  # Making one asks the device about positions.


def on_gpu(layers: int) -> Model:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "max_position_embeddings": TOKENS}
    model: Model = tiny_model(num_hidden_layers=layers, **sizes)
    model.module.to("cuda", torch.bfloat16)
    model.module.config._attn_implementation = "without masks"
    return model


def step(settings: dict[str, Any] | None, layers: int = LAYERS) -> tuple[list[torch.Tensor], int]:
    """Gradients of one step in bf16, and the most bytes on the device beyond weights."""
    model = on_gpu(layers)
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


@pytest.mark.parametrize(("policy", "layers"), [("full", LAYERS), ("none", 3 * LAYERS)])
def test_offload_gives_the_same_bits_in_less_memory(policy: str, layers: int) -> None:
    """Without recomputing, layers must hold more than the forward may run ahead of the copies, which is 1 GiB."""
    plain = None if policy == "none" else {"policy": policy}
    expected, whole = step(plain, layers)
    gradients, less = step({"policy": policy, "offload": "cpu"}, layers)
    again, _ = step(plain, layers)
    exact = all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    for got, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0 if exact else 1e-2, atol=0 if exact else 1e-4)
    assert less < whole


class OnGpu(FakeRuntime):
    """One process with a GPU."""

    device = torch.device("cuda")  # type: ignore[assignment]


@pytest.mark.parametrize("part", [0.1, 0.5, 2.0])
def test_auto_keeps_what_fits_below_its_limit_and_waits_for_nothing(part: float, tmp_path: Path) -> None:
    _, everything = step(None)
    _, nothing = step({"policy": "full"})
    model = on_gpu(LAYERS)
    optimizer = torch.optim.AdamW(model.module.parameters())
    states = 3 * sum(p.numel() * p.element_size() for p in model.module.parameters())
    base = torch.cuda.memory_allocated() + states
    limit = base + nothing + part * (everything - nothing)
    settings = {"policy": "auto", "memory_gib": limit / (1 << 30), "margin": 0.0}
    ctx = compose(
        {"model": {"name": "tiny"}, "plugins": ["activations"], "output": str(tmp_path), "activations": settings}
    )
    ctx.runtime = OnGpu()
    PatchLog().apply(model, ctx.each(hooks.patch_modules, ctx, model, "recompute"))
    ids = torch.arange(TOKENS, device="cuda").remainder(250)[None]
    auto = ctx.kernel.active["activations"].instance._auto  # type: ignore[attr-defined]
    peaks = []
    for number in range(1, 7):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_sync_debug_mode("error" if number > 1 else "default")
        try:
            model.module.model(ids, use_cache=False).last_hidden_state.float().square().mean().backward()
            told: dict[str, Any] = {"step": number, "model": model, "optimizer": optimizer}
            ctx.notify(GradientsReady(**told))
            peaks.append(torch.cuda.max_memory_allocated())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        optimizer.step()
        optimizer.zero_grad()
        ctx.notify(Stepped(**told, loss=torch.zeros(())))
    print(f"limit {limit / 1e6:.0f} MB, peaks {[round(peak / 1e6) for peak in peaks]}, {auto.choice}")
    assert max(peaks[1:]) <= limit or auto.choice.whole == auto.choice.attention == 0
    if part > 1:
        assert auto.choice.whole == LAYERS
