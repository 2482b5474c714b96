"""On a GPU: loading holds no more than the packed model, and packed experts are computed as unpacked ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packed_checkpoints import EXPERTS, PARTS, composed, gradients, logps, prepared
from pegbox.testing.tiny import tiny_batches
from pegbox.types import Model
from pegbox_mxfp4.experts import experts_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEVICE = torch.device("cuda")
ATTENTION: dict[str, Any] = {"dtype": "bfloat16", "lora": {"r": 4, "targets": ["q_proj", "v_proj"]}}
ON_EXPERTS: dict[str, Any] = {"dtype": "bfloat16", "lora": {"r": 4, "targets": ["q_proj"], "parameters": EXPERTS}}
SLACK_BYTES = 1 << 20


def on_device(plugins: list[str], **sections: Any) -> Model:
    ctx = composed("gpt_oss", plugins, **sections)
    ctx.runtime = SimpleNamespace(rank=0, local_rank=0, world_size=1, device=DEVICE)
    model = prepared(ctx)
    model.module.to(DEVICE)
    return model


def size_of(model: Model) -> int:
    """Bytes of parameters and buffers, packed ones as they are."""
    tensors = [*model.module.parameters(), *model.module.buffers()]
    return sum(getattr(tensor, "packed_bytes", tensor.numel() * tensor.element_size()) for tensor in tensors)


def test_loading_holds_no_more_than_the_packed_model() -> None:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = on_device(["mxfp4", "lora"], **ATTENTION)
    assert torch.cuda.max_memory_allocated() - before <= size_of(model) + SLACK_BYTES
    for _, experts in experts_of(model.module):
        assert {getattr(experts, part).blocks.device.type for part in PARTS} == {"cuda"}


@pytest.mark.parametrize(
    ("plugins", "sections"),
    [([], ATTENTION), (["scattermoe"], ATTENTION), (["scattermoe", "activations"], ON_EXPERTS)],
    ids=["alone", "scattermoe", "experts"],
)
def test_losses_and_gradients_are_near_those_of_the_unpacked_model(
    plugins: list[str], sections: dict[str, Any]
) -> None:
    batch = tiny_batches(rows=4)[0].to(DEVICE)
    results = []
    for packing in ([], ["mxfp4"]):
        model = on_device([*packing, "lora", *plugins], **sections)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            results.append((logps(model, batch).detach(), gradients(model, batch)))
    (plain, expected), (ours, found) = results
    assert (ours - plain).norm() <= 1e-2 * plain.norm()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 3e-2 * gradient.norm() + 1e-3, name
