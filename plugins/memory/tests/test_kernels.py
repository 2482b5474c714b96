"""Kernels run as on a GPU and launch nothing, so what they keep and their scratch memory are counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pegbox_memory.estimate import estimate
from pegbox_memory.kernels import allocating
from pegbox_memory.ledger import Ledger
from torch._subclasses import FakeTensorMode

pytest.importorskip("triton")

Config = Callable[..., dict[str, Any]]
BF16, FP32 = 2, 4
GPU = {"trainer": {"device": "auto", "precision": "bf16"}}


def sizes(config: dict[str, Any], *overrides: str, tokens: int = 128) -> dict[str, int]:
    return {row.kind: row.bytes for row in estimate(config, overrides, tokens=tokens).rows}


def test_experts_keep_their_first_product_and_need_the_rows_between_products() -> None:
    from pegbox_kernels.experts import moe_experts

    tokens, width, inner, experts, chosen = 256, 128, 192, 8, 2
    rows, ledger = tokens * chosen, Ledger()
    with FakeTensorMode():
        hidden = torch.empty(tokens, width, dtype=torch.bfloat16, requires_grad=True)
        ids, scores = torch.empty(tokens, chosen, dtype=torch.long), torch.empty(tokens, chosen)
        up = torch.empty(experts, width, 2 * inner, dtype=torch.bfloat16)
        down = torch.empty(experts, inner, width, dtype=torch.bfloat16)
        ledger.note([hidden, ids, scores, up, down], "inputs")
        given = ledger.total
        with allocating(), ledger:
            out = moe_experts(hidden, ids, scores, up, down, transposed=True)
            kept, most = ledger.total - given, ledger.peak_bytes - given
            out.backward(torch.empty_like(out))
    first, second = rows * 2 * inner * BF16, rows * width * BF16
    routing = 16 * rows
    assert first + tokens * width * BF16 <= kept <= first + tokens * width * BF16 + routing
    assert most >= first + second, "the first product, and gathered rows or the second product"
    assert ledger.peak_bytes - given >= 2 * first, "the first product and its gradient"


@pytest.mark.parametrize("budget", [1 << 20, 8 << 20])
def test_the_head_needs_its_logits_of_a_chunk_and_the_gradient_of_its_input(budget: int) -> None:
    from pegbox_kernels.linear_logprob import linear_token_logprobs
    from pegbox_kernels.linear_logprob.chunks import chunk_sizes

    rows, width, vocabulary, ledger = 2048, 64, 4096, Ledger()
    with FakeTensorMode():
        hidden = torch.empty(rows, width, dtype=torch.bfloat16, requires_grad=True)
        weight, targets = torch.empty(vocabulary, width, dtype=torch.bfloat16), torch.empty(rows, dtype=torch.long)
        ledger.note([hidden, weight, targets], "inputs")
        given = ledger.total
        with allocating(), ledger:
            linear_token_logprobs(hidden, weight, targets, logits_bytes=budget)
    scratch = chunk_sizes(rows, vocabulary * BF16, budget)[0] * vocabulary * BF16
    of_rows = 16 * rows * FP32 + 4096
    assert scratch <= budget
    assert 0 <= ledger.peak_bytes - given - scratch - rows * width * FP32 <= of_rows


def test_attention_that_adds_gradients_in_no_certain_order_needs_queries_in_fp32() -> None:
    """Of one long document on a Hopper GPU; in a process in which Triton interprets, too."""
    from pegbox_kernels.attention import attention

    tokens, heads, width = 4097, 4, 64
    peaks = {}
    for deterministic in (False, True):
        ledger = Ledger()
        with FakeTensorMode():
            q, k, v = (torch.empty(tokens, heads, width, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
            ledger.note([q, k, v], "inputs")
            with allocating(), ledger:
                out = attention(q, k, v, deterministic=deterministic).out_THD
                out.backward(torch.empty_like(out))
        peaks[deterministic] = ledger.peak_bytes
    of_rows = 128 * heads * 2 * FP32
    assert 0 <= peaks[False] - peaks[True] - tokens * heads * width * FP32 <= of_rows


def test_a_gpu_has_more_room_for_logits_than_the_cpu_that_asks(config_of: Config) -> None:
    config = config_of("lora", "cce", model="medium", **GPU)
    whole = 127 * 2 * 8192 * BF16
    assert sizes(config)["head"] >= whole


def test_packed_experts_are_counted_packed(config_of: Config, model_folder: Callable[[str], Path]) -> None:
    config = config_of("mxfp4", "lora", "scattermoe", model="gpt-oss", mxfp4={"quantize": True}, **GPU)
    plain = {**config, "plugins": [name for name in config["plugins"] if name != "mxfp4"]}
    plain.pop("mxfp4")
    shape = json.loads((model_folder("gpt-oss") / "config.json").read_text(encoding="utf-8"))
    layers, experts = shape["num_hidden_layers"], shape["num_local_experts"]
    numbers = layers * experts * 3 * shape["hidden_size"] * shape["intermediate_size"]
    packed, unpacked = (sizes(one, "model.dtype=bfloat16")["frozen weights"] for one in (config, plain))
    assert unpacked - packed == pytest.approx(numbers * (BF16 - 17 / 32), rel=0.01)


@pytest.mark.parametrize("backend", ["auto", "flash-attn-4"])
def test_attention_of_another_library_is_stood_for_by_ours(config_of: Config, backend: str) -> None:
    """Without the library, and without a GPU that could run it."""
    plugins = ("gpt-oss-attention", "lora", "scattermoe", "cce", "fused", "activations")
    sections = {"gpt-oss-attention": {"backend": backend}, "fused": {"experts": False}, **GPU}
    config = config_of(*plugins, model="gpt-oss", **sections)
    made = estimate(config, tokens=128)
    assert made.allocated > 0
    assert any("flash-attn-4" in note for note in made.notes) == (backend == "flash-attn-4")


def test_nothing_stays_of_a_step_without_data(config_of: Config) -> None:
    """A real step in the same process computes as if nothing had been estimated."""
    from pegbox_kernels import dispatch
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run
    estimate(config_of("gpt-oss-attention", "lora", "scattermoe", "cce", model="gpt-oss", **GPU), tokens=64)
    assert JITFunction.run is launch
    assert not dispatch.is_for_gpu(torch.empty(1))
    from measured_run import peak_of_run

    config = config_of("gpt-oss-attention", "lora", "scattermoe", "cce", model="gpt-oss")
    assert peak_of_run({**config, "trainer": {**config["trainer"], "max_steps": 1}}, 64) > 0
