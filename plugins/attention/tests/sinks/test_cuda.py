"""On a GPU: every backend against eager attention in float32, no wait of the host, and the same bits if asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from document_batches import Run, batch_of, outcome
from pegbox.rows import Batch
from pegbox_attention.checking import Heads, check
from pegbox_attention.sinks.choice import Place, generation, obstacle
from transformers import AttentionInterface

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

Load = Callable[..., Run]
BACKENDS = ["flash-attn-4", "pegbox", "flex"]
FLOOR = 1e-2


@pytest.fixture(params=BACKENDS)
def name(request: pytest.FixtureRequest) -> Any:
    """A backend that can serve this GPU in bfloat16."""
    missing = obstacle(request.param, Place(generation(torch.device("cuda")), "bf16"))
    if missing:
        pytest.skip(missing)
    return request.param


def on_device(batch: Batch) -> Batch:
    return batch.to(torch.device("cuda"))


def in_half(run: Run) -> Run:
    return replace(run, model=replace(run.model, module=run.model.module.to(torch.bfloat16)))


def error(got: tuple[Any, dict[str, Any]], truth: tuple[Any, dict[str, Any]]) -> float:
    """The largest distance of log-probabilities and gradients, relative to the largest value of each."""
    pairs = [(got[0], truth[0]), *((got[1][key], truth[1][key]) for key in truth[1])]
    return max(
        float((one.float() - true.float()).abs().max() / true.float().abs().max().clamp(min=1e-3))
        for one, true in pairs
    )


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_check_passes_on_the_heads_of_gpt_oss(
    name: Any, dtype: str, window: int | None, deterministic: bool
) -> None:
    heads, device = Heads(64, 8, 64, window), torch.device("cuda")
    found = check(name, heads, device, dtype, deterministic=deterministic)
    assert found.right, found


@pytest.mark.parametrize("rows", [[[300], [170], [2]], [[50, 90, 1, 159], [128, 130, 40, 2]]], ids=["padded", "packed"])
def test_loss_and_gradients_are_as_near_to_float32_as_those_of_eager_attention(
    name: str, rows: list[list[int]], load: Load
) -> None:
    batch = on_device(batch_of(rows))
    truth = outcome(load(None, hf={"attention": "eager"}, device="cuda").model, batch)
    plain = outcome(in_half(load(None, hf={"attention": "eager"}, device="cuda")).model, batch)
    got = outcome(in_half(load({"backend": name}, device="cuda", precision="bf16")).model, batch)
    assert error(got, truth) <= 2 * error(plain, truth) + FLOOR


def test_the_host_waits_for_nothing_in_a_packed_step(name: str, load: Load) -> None:
    run = in_half(load({"backend": name}, device="cuda", precision="bf16"))
    batches = [on_device(batch_of([[50, 90, 1, 159], [128, 130, 40, 2]], seed)) for seed in range(4)]
    for batch in batches[:3]:
        outcome(run.model, batch)
        attention_of(run, batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention_of(run, batches[3])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def attention_of(run: Run, batch: Batch) -> None:
    """Attention of both layers alone: experts of a tiny model may be computed in ways that wait."""
    for layer in run.model.module.model.layers:
        module = layer.self_attn
        rows, tokens = batch.input_ids_BT.shape
        hidden = torch.ones(rows, tokens, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        positions = run.model.module.model.rotary_emb(hidden, batch.position_ids_BT)
        borders = {"cu_seq_lens_q": batch.cu_seqlens_S, "max_length_q": batch.max_seqlen}
        module(hidden, positions, None, **borders)[0].sum().backward()


def test_deterministic_gives_the_same_bits(name: str, load: Load) -> None:
    run = in_half(load({"backend": name, "deterministic": True}, device="cuda", precision="bf16"))
    function: Any = AttentionInterface()[run.model.module.config._attn_implementation]
    random = torch.Generator("cuda").manual_seed(0)
    sizes = [(1, heads, 3000, 64) for heads in (64, 8, 8)]
    parts = [torch.randn(size, generator=random, device="cuda", dtype=torch.bfloat16) for size in sizes]
    sinks = torch.randn(64, generator=random, device="cuda", dtype=torch.bfloat16)
    module, found = run.model.module.model.layers[1].self_attn, []
    for _ in range(3):
        leaves = [part.clone().requires_grad_() for part in (*parts, sinks)]
        out, _ = function(module, *leaves[:3], None, s_aux=leaves[3])
        found.append([out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)])
    assert all(torch.equal(one, other) for again in found[1:] for one, other in zip(found[0], again, strict=True))
