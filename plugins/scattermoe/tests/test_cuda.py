"""On a GPU: losses and gradients are those of transformers and PEFT, and the host waits for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from mixtures import EXPERTS, assembled, gradients, logps
from pegbox.testing.tiny import tiny_batches
from pegbox.types import Model
from pegbox_scattermoe.seam import layer_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEVICE = torch.device("cuda")
LORA: dict[str, Any] = {"lora": {"r": 16, "targets": ["q_proj", "o_proj"], "parameters": EXPERTS}}
FLOOR = 2e-3


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.cuda.set_sync_debug_mode("default")


def found(model: Model, half: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    batch = tiny_batches(rows=4)[0].to(DEVICE)
    model.module.to(DEVICE)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=half):
        return logps(model, batch).detach(), gradients(model, batch)


@pytest.mark.parametrize("plugins", [[], ["lora"]], ids="+".join)
@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_moe", "mixtral"])
def test_losses_and_gradients_are_those_of_the_libraries(kind: str, plugins: list[str]) -> None:
    sections = LORA if plugins else {}
    exact = found(assembled(kind, plugins, **sections)[0], half=False)
    ours = found(assembled(kind, [*plugins, "scattermoe"], **sections)[0], half=False)
    torch.testing.assert_close(ours[0], exact[0], rtol=1e-3, atol=1e-3)
    for name, gradient in exact[1].items():
        assert (ours[1][name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-5, name


@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_moe"])
def test_in_bfloat16_the_error_is_at_most_twice_that_of_the_libraries(kind: str) -> None:
    exact = found(assembled(kind, ["lora"], **LORA)[0], half=False)
    plain = found(assembled(kind, ["lora"], dtype="bfloat16", **LORA)[0], half=True)
    ours = found(assembled(kind, ["lora", "scattermoe"], dtype="bfloat16", **LORA)[0], half=True)
    assert (ours[0] - exact[0]).norm() <= 2 * (plain[0] - exact[0]).norm() + FLOOR
    for name, gradient in exact[1].items():
        error, theirs = (ours[1][name] - gradient).norm(), (plain[1][name] - gradient).norm()
        assert error <= 2 * theirs + FLOOR * gradient.norm() + 1e-4, name


@pytest.mark.parametrize("plugins", [[], ["activations"]], ids="+".join)
def test_the_host_never_waits_for_the_experts(plugins: list[str]) -> None:
    model, _ = assembled("gpt_oss", ["lora", "scattermoe", *plugins], dtype="bfloat16", **LORA)
    found(model, half=True)
    experts = next(part for part in model.module.modules() if layer_of(part) is not None)
    hidden = torch.randn(64, 32, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    index = torch.randint(4, (64, 2), device=DEVICE)
    weights = torch.rand(64, 2, device=DEVICE, dtype=torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    experts(hidden, index, weights).sum().backward()
