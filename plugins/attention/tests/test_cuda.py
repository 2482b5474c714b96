"""On a GPU: what is computed by borders against eager attention in float32, with soft cap, windows and sinks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from document_batches import Run, batch_of, outcome
from pegbox.errors import ConfigError
from pegbox.testing import FakeRuntime
from pegbox_attention.installed import absent

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

Load = Callable[..., Run]
FLOOR = 1e-2
ROWS = {"padded": [[300], [170], [2]], "packed": [[50, 90, 1, 159], [128, 130, 40, 2]]}


class Gpu(FakeRuntime):
    """One GPU."""

    device = torch.device("cuda")


class Half(Gpu):
    """One GPU, forwards in bfloat16."""

    precision = "bf16"


def error(got: tuple[Any, dict[str, Any]], truth: tuple[Any, dict[str, Any]]) -> float:
    """The largest distance of log-probabilities and gradients, relative to the largest value of each."""
    pairs = [(got[0], truth[0]), *((got[1][key], truth[1][key]) for key in truth[1])]
    return max(
        float((one.float() - true.float()).abs().max() / true.float().abs().max().clamp(min=1e-3))
        for one, true in pairs
    )


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("name", ["flex", "flash-attn-4", "pegbox", "sdpa"])
def test_loss_and_gradients_are_as_near_to_float32_as_those_of_eager_attention(
    name: str, family: str, rows: str, load: Load
) -> None:
    if absent(name):
        pytest.skip(absent(name))
    batch = batch_of(ROWS[rows]).to(torch.device("cuda"))
    try:
        mine = load(family, name, runtime=Half)
    except ConfigError as refused:
        pytest.skip(refused.what)
    truth = outcome(load(family, None, runtime=Gpu).model, batch)
    plain, got = (
        outcome(replace(run.model, module=run.model.module.to(torch.bfloat16)), batch)
        for run in (load(family, None, runtime=Gpu), mine)
    )
    assert error(got, truth) <= 2 * error(plain, truth) + FLOOR
    mine.log.verify()
