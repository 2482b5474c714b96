"""Quantized weights are counted by their rule, and the rule is what bitsandbytes keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pegbox import hooks
from pegbox.assembly import model_request
from pegbox.plan import compose
from pegbox_memory.estimate import estimate
from torch import nn

Config = Callable[..., dict[str, Any]]


def kept_bytes(module: nn.Module) -> int:
    """Of weights, with the scales that bitsandbytes keeps beside them; embeddings shared with the head count once."""
    total = 0
    for parameter in dict.fromkeys(module.parameters()):
        total += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            if part is not None:
                total += part.absmax.numel() * part.absmax.element_size()
        scales = getattr(parameter, "SCB", None)
        total += 0 if scales is None else scales.numel() * scales.element_size()
    return total


@pytest.mark.parametrize("settings", [{}, {"double_quant": False}, {"kind": "int8"}])
def test_the_rule_is_what_bitsandbytes_keeps(config_of: Config, settings: dict[str, Any]) -> None:
    pytest.importorskip("bitsandbytes")
    config = config_of("lora", "bnb", model="medium", bnb=settings)
    made = {row.kind: row.bytes for row in estimate(config, tokens=16).rows}
    ctx = compose(config)
    module = ctx.call(hooks.load_model, ctx, model_request(ctx)).module
    assert made["frozen weights"] == pytest.approx(kept_bytes(module), rel=0.03)
    largest = max(p.numel() for name, p in module.named_parameters() if "mlp" in name) * (
        2 if "kind" not in settings else 1
    )
    assert made["unpacked"] in (largest * torch.float32.itemsize, largest * torch.bfloat16.itemsize)
